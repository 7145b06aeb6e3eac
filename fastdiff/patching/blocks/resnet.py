"""``ResnetBlock2D``: both norms with their SiLU, the time embedding folded into the second.

Another activation than SiLU (GELU in DeepFloyd IF) stays an operation of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops import group_norm_silu
from fastdiff.patching.blocks import Block, activated_once, drop, forward, is_plain, parameter, why_stock
from fastdiff.patching.blocks.layout import large_weight_conv
from fastdiff.patching.blocks.packed import packed_conv


def resnet_block(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces ``ResnetBlock2D.forward``."""
    site = self._fastdiff_site
    parts = self._modules  # as live as self.norm1, without the microsecond that a module's getattr takes
    norm1, norm2, activation = parts["norm1"], parts["norm2"], parts["nonlinearity"]
    conv1, conv2, projection = parts["conv1"], parts["conv2"], parts.get("time_emb_proj")
    silu = is_plain(activation, nn.SiLU)
    reason = why_stock(input_tensor, norm1, norm2)
    if args or kwargs:
        reason = "called with deprecated arguments"
    elif temb is None:
        if projection is not None or self.time_embedding_norm == "scale_shift":
            reason = "no time embedding"
    elif projection is None:
        reason = "a time embedding without projection"
    elif temb.shape[0] != input_tensor.shape[0]:
        reason = "time embedding and input differ in batch size"
    if reason is not None:
        return site.stock(reason, self, input_tensor, temb, *args, **kwargs)

    h = site.serve(
        "norm1", group_norm_silu, input_tensor, norm1.num_groups, parameter(norm1, "weight"), parameter(norm1, "bias"),
        norm1.eps, silu=silu,
    )  # fmt: skip
    if not silu:
        h = activation(h)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        if self.upsample is not None and h.shape[0] >= 64:  # nearest upsampling of NHWC fails for large batches
            input_tensor, h = input_tensor.contiguous(), h.contiguous()
        input_tensor, h = resample(input_tensor), resample(h)
    h = conv1(h)

    embedding = scale = shift = None
    if projection is not None and temb is not None:  # one without the other ran stock
        embedding = projection(temb if self.skip_time_act else activated_once(activation, temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = embedding.chunk(2, dim=1)
            embedding = None
        elif self.time_embedding_norm != "default":
            embedding = None
    h = site.serve(
        "norm2", group_norm_silu, h, norm2.num_groups, parameter(norm2, "weight"), parameter(norm2, "bias"), norm2.eps,
        temb=embedding, scale=scale, shift=shift, silu=silu,
    )  # fmt: skip
    if not silu:
        h = activation(h)
    h = conv2(drop(parts["dropout"], h))

    shortcut = parts.get("conv_shortcut")
    if shortcut is not None:
        if self.training:
            input_tensor = input_tensor.contiguous()
        input_tensor = shortcut(input_tensor)
    if is_fresh(conv2) and h.dtype == input_tensor.dtype:
        h += input_tensor  # bitwise the same sum, without a third tensor of this size
    else:
        h = input_tensor + h
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


#: What fastdiff itself puts in the place of a convolution's forward.
_FRESH = (packed_conv, large_weight_conv)


def is_fresh(conv: nn.Module) -> bool:
    """Whether nobody but the caller can hold the output that ``conv`` has just made."""
    state = conv.__dict__
    if type(conv) not in (nn.Conv2d, nn.Conv3d) or torch.is_grad_enabled():
        return False
    if state["_forward_hooks"] or "_conv_forward" in state:
        return False
    return "forward" not in state or getattr(state["forward"], "func", None) in _FRESH


def refuse_norms(module: Any) -> str | None:
    """Why the norms are not such that :func:`resnet_block` and its like could do their work."""
    for norm in (module.norm1, module.norm2):
        if type(norm) is not nn.GroupNorm:
            return f"a norm is a {type(norm).__name__}"
    return None


def _what(module: Any) -> str:
    activation = " + SiLU" if type(module.nonlinearity) is nn.SiLU else ""
    if module.time_emb_proj is None:
        return f"GroupNorm{activation}, twice; residual"
    if module.time_embedding_norm == "scale_shift":
        return f"GroupNorm{activation}; GroupNorm + scale and shift{activation}; residual"
    return f"GroupNorm{activation}; time embedding + GroupNorm{activation}; residual"


RESNET_BLOCK = Block(
    cls="diffusers.models.resnet:ResnetBlock2D",
    what=_what,
    sources=("forward",),
    methods=forward(resnet_block),
    refuse=refuse_norms,
    covers=("norm1", "norm2"),
)

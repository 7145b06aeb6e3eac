"""``ResnetBlock2D``: both norms with their SiLU, the time embedding folded into the second."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ops import group_norm_silu
from fastdiff.patching.blocks import Block, drop, forward, is_plain, why_stock
from fastdiff.patching.blocks.layout import large_weight_conv
from fastdiff.patching.blocks.packed import packed_conv


def resnet_block(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces ``ResnetBlock2D.forward``."""
    site = self._fastdiff_site
    norm1, norm2, projection = self.norm1, self.norm2, self.time_emb_proj
    reason = why_stock(input_tensor, norm1, norm2)
    if args or kwargs:
        reason = "called with deprecated arguments"
    elif not is_plain(self.nonlinearity, nn.SiLU):
        reason = "its activation was replaced, or has hooks"
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
        "norm1", group_norm_silu, input_tensor, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps
    )  # fmt: skip
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        if self.upsample is not None and h.shape[0] >= 64:  # nearest upsampling of NHWC fails for large batches
            input_tensor, h = input_tensor.contiguous(), h.contiguous()
        input_tensor, h = resample(input_tensor), resample(h)
    h = self.conv1(h)

    embedding = scale = shift = None
    if projection is not None and temb is not None:  # one without the other ran stock
        embedding = projection(temb if self.skip_time_act else silu_once(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = embedding.chunk(2, dim=1)
            embedding = None
        elif self.time_embedding_norm != "default":
            embedding = None
    h = site.serve(
        "norm2", group_norm_silu, h, norm2.num_groups, norm2.weight, norm2.bias, norm2.eps,
        temb=embedding, scale=scale, shift=shift,
    )  # fmt: skip
    conv2 = self.conv2
    h = conv2(drop(self.dropout, h))

    if self.conv_shortcut is not None:
        if self.training:
            input_tensor = input_tensor.contiguous()
        input_tensor = self.conv_shortcut(input_tensor)
    if _is_fresh(conv2, h) and h.dtype == input_tensor.dtype:
        h += input_tensor  # bitwise the same sum, without a third tensor of this size
    else:
        h = input_tensor + h
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


#: What fastdiff itself puts in the place of a convolution's forward.
_FRESH = (packed_conv, large_weight_conv)


def _is_fresh(conv: nn.Module, output: Tensor) -> bool:
    """Whether nobody but the caller can hold the output of ``conv``."""
    state = conv.__dict__
    if type(conv) is not nn.Conv2d or torch.is_grad_enabled() or state["_forward_hooks"] or "_conv_forward" in state:
        return False
    return "forward" not in state or getattr(state["forward"], "func", None) in _FRESH


def silu_once(temb: Tensor) -> Tensor:
    """``silu(temb)``, computed once for all blocks of a forward, which are handed the same tensor.

    It is kept on ``temb`` itself, as long as that lives and is not written to.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or temb.is_inference():
        return F.silu(temb)
    # A CUDA graph must not refer to what was computed before its capture.
    capturing = temb.is_cuda and torch.cuda.is_current_stream_capturing()
    state = temb.__dict__
    known = state.get("_fastdiff_silu")
    if known is None or known[0] != temb._version or known[1] is not capturing:
        known = state["_fastdiff_silu"] = (temb._version, capturing, F.silu(temb))
    return known[2]


def _refuse(module: Any) -> str | None:
    if type(module.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(module.nonlinearity).__name__}"
    for norm in (module.norm1, module.norm2):
        if type(norm) is not nn.GroupNorm:
            return f"a norm is a {type(norm).__name__}"
    return None


def _what(module: Any) -> str:
    if module.time_emb_proj is None:
        return "GroupNorm + SiLU, twice; residual"
    if module.time_embedding_norm == "scale_shift":
        return "GroupNorm + SiLU; GroupNorm + scale and shift + SiLU; residual"
    return "GroupNorm + SiLU; time embedding + GroupNorm + SiLU; residual"


RESNET_BLOCK = Block(
    cls="diffusers.models.resnet:ResnetBlock2D",
    what=_what,
    sources=("forward",),
    methods=forward(resnet_block),
    refuse=_refuse,
    covers=("norm1", "norm2"),
)

"""Norms that are replaced by themselves: conditional GroupNorms, and those that transformers read as tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ops import group_norm_silu
from fastdiff.patching.blocks import Block, activated_once, forward, is_plain, once, why_stock


def norm_to_tokens(self: Any, input: Tensor) -> Tensor:
    """Replaces the forward of a GroupNorm whose parent goes on with tokens (B, H * W, C): they need no copy."""
    reason = why_stock(input)
    if reason is not None:
        return self._fastdiff_site.stock(reason, self, input)
    return _channels_innermost(self, input)


def norm_to_frames(self: Any, input: Tensor) -> Tensor:
    """Replaces the forward of a GroupNorm over (B, C, T, H, W) whose parent goes on with (B * H * W, T, C)."""
    reason = why_stock(input) or (None if input.dim() == 5 else "its input is not (B, C, T, H, W)")
    if reason is not None:
        return self._fastdiff_site.stock(reason, self, input)
    return _channels_innermost(self, input.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)


def _channels_innermost(norm: Any, x: Tensor) -> Tensor:
    """The norm of x, whose channels follow all other axes in memory."""
    h = norm._fastdiff_site.serve(
        "norm", group_norm_silu, x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False, tokens=True
    )  # fmt: skip
    batch, channels, *spatial = x.shape
    return h.view(batch, *spatial, channels).movedim(-1, 1)


def ada_group_norm(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Replaces ``AdaGroupNorm.forward``."""
    site = self._fastdiff_site
    reason = why_stock(x)
    if reason is not None:
        return site.stock(reason, self, x, emb)
    if self.act:
        emb = activated_once(self.act, emb)
    scale, shift = self.linear(emb).chunk(2, dim=1)
    return site.serve("norm", group_norm_silu, x, self.num_groups, eps=self.eps, scale=scale, shift=shift, silu=False)


def kandinsky3_norm(self: Any, x: Tensor, context: Tensor) -> Tensor:
    """Replaces ``Kandinsky3ConditionalGroupNorm.forward``."""
    site, norm = self._fastdiff_site, self.norm
    reason = why_stock(x, norm)
    if reason is None and not (is_plain(self.context_mlp, nn.Sequential) and len(self.context_mlp) == 2):
        reason = "its MLP was replaced, or has hooks"
    if reason is not None:
        return site.stock(reason, self, x, context)
    activation, linear = self.context_mlp
    scale, shift = linear(activated_once(activation, context)).chunk(2, dim=1)
    return site.serve(
        "norm", group_norm_silu, x, norm.num_groups, norm.weight, norm.bias, norm.eps,
        scale=scale, shift=shift, silu=False,
    )  # fmt: skip


def spatial_norm(self: Any, f: Tensor, zq: Tensor) -> Tensor:
    """Replaces ``SpatialNorm.forward``; product and sum, with a value per pixel, are one operation of PyTorch."""
    site, norm = self._fastdiff_site, self.norm_layer
    reason = why_stock(f, norm) or (None if f.dtype == zq.dtype else "input and latents differ in dtype")
    if reason is not None:
        return site.stock(reason, self, f, zq)
    h = site.serve("norm", group_norm_silu, f, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False)
    size = f.shape[-2:]
    zq = once(zq, ("nearest", size), lambda zq: F.interpolate(zq, size=size, mode="nearest"))
    return torch.addcmul(self.conv_b(zq), h, self.conv_y(zq))


def _refuse(name: str) -> Any:
    def refuse(module: Any) -> str | None:
        norm = getattr(module, name)
        return None if type(norm) is nn.GroupNorm else f"{name} is a {type(norm).__name__}"

    return refuse


ADA_GROUP_NORM = Block(
    cls="diffusers.models.normalization:AdaGroupNorm",
    what="GroupNorm + scale and shift",
    sources=("forward",),
    methods=forward(ada_group_norm),
)

KANDINSKY3_NORM = Block(
    cls="diffusers.models.unets.unet_kandinsky3:Kandinsky3ConditionalGroupNorm",
    what="GroupNorm + scale and shift",
    sources=("forward",),
    methods=forward(kandinsky3_norm),
    refuse=_refuse("norm"),
    covers=("norm",),
)

SPATIAL_NORM = Block(
    cls="diffusers.models.attention_processor:SpatialNorm",
    what="GroupNorm; product and sum",
    sources=("forward",),
    methods=forward(spatial_norm),
    refuse=_refuse("norm_layer"),
    covers=("norm_layer",),
)


def _before_tokens(cls: str, function: Any, what: str) -> Block:
    return Block(
        cls=cls,
        what=what,
        sources=("forward",),
        methods=lambda module: [(module.norm, "forward", function)],
        refuse=_refuse("norm"),
        owner=lambda module: module.norm,
    )


#: The entrances of the transformers in video models.
TOKEN_NORMS = (
    _before_tokens(
        "diffusers.models.transformers.transformer_temporal:TransformerSpatioTemporalModel",
        norm_to_tokens, "GroupNorm to tokens",
    ),
    _before_tokens(
        "diffusers.models.transformers.transformer_temporal:TransformerTemporalModel",
        norm_to_frames, "GroupNorm to frames as tokens",
    ),
    _before_tokens(
        "diffusers.models.unets.unet_motion_model:AnimateDiffTransformer3D",
        norm_to_frames, "GroupNorm to frames as tokens",
    ),
)  # fmt: skip

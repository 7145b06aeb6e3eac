"""Convolutions over frames: the temporal half of Stable Video Diffusion's blocks, and ModelScope's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops import group_norm_silu
from fastdiff.patching.blocks import Block, activated_once, drop, forward, is_plain, why_stock
from fastdiff.patching.blocks.resnet import is_fresh, refuse_norms


def temporal_resnet_block(self: Any, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
    """Replaces ``TemporalResnetBlock.forward``. Its time embedding has a value per frame, and is added by itself."""
    site = self._fastdiff_site
    norm1, norm2, conv1, conv2 = self.norm1, self.norm2, self.conv1, self.conv2
    reason = why_stock(input_tensor, norm1, norm2)
    if not is_plain(self.nonlinearity, nn.SiLU):
        reason = "its activation was replaced, or has hooks"
    elif (temb is None) is not (self.time_emb_proj is None):
        reason = "no time embedding" if temb is None else "a time embedding without projection"
    if reason is not None:
        return site.stock(reason, self, input_tensor, temb)
    h = conv1(
        site.serve(
            "norm1", group_norm_silu, input_tensor, norm1.num_groups, norm1.weight, norm1.bias, norm1.eps
        )
    )  # fmt: skip
    if temb is not None:
        embedding = self.time_emb_proj(_silu_of_base(self.nonlinearity, temb)).mT[..., None, None]
        h = h.add_(embedding) if is_fresh(conv1) and h.dtype == embedding.dtype else h + embedding
    h = site.serve("norm2", group_norm_silu, h, norm2.num_groups, norm2.weight, norm2.bias, norm2.eps)
    h = conv2(drop(self.dropout, h))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    if is_fresh(conv2) and h.dtype == input_tensor.dtype:
        h += input_tensor
        return h
    return input_tensor + h


def _silu_of_base(silu: nn.Module, temb: Tensor) -> Tensor:
    """``silu(temb)``: a view per frame of one and the same tensor, which is new in every block."""
    whole = temb._base
    if whole is None or whole.numel() != temb.numel() or not (whole.is_contiguous() and temb.is_contiguous()):
        return silu(temb)
    return activated_once(silu, whole).view(temb.shape)


def temporal_conv_layer(self: Any, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
    """Replaces ``TemporalConvLayer.forward``: four times GroupNorm + SiLU + convolution over the frames."""
    site = self._fastdiff_site
    layers = (self.conv1, self.conv2, self.conv3, self.conv4)
    reason = why_stock(hidden_states, *(layer[0] for layer in layers))
    if not all(is_plain(layer, nn.Sequential) and is_plain(layer[1], nn.SiLU) for layer in layers):
        reason = "a layer or its activation was replaced, or has hooks"
    if reason is not None:
        return site.stock(reason, self, hidden_states, num_frames)
    h = identity = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2)  # (B, C, T, H, W)
    for index, layer in enumerate(layers, start=1):
        norm, _, *rest = layer
        h = site.serve(f"norm{index}", group_norm_silu, h, norm.num_groups, norm.weight, norm.bias, norm.eps)
        for module in rest:
            h = module(h)
    return (identity + h).transpose(1, 2).flatten(0, 1)


def blend(self: Any, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
    """Replaces ``AlphaBlender.forward``: the interpolation is one operation of PyTorch's."""
    if x_spatial.dtype != x_temporal.dtype or torch._C._is_any_autocast_enabled():
        return type(self).forward(self, x_spatial, x_temporal, image_only_indicator)
    alpha = self.get_alpha(image_only_indicator, x_spatial.ndim).to(x_spatial.dtype)
    ends = (x_spatial, x_temporal) if self.switch_spatial_to_temporal_mix else (x_temporal, x_spatial)
    return torch.lerp(*ends, alpha)


BLENDER = "diffusers.models.resnet:AlphaBlender"


def _refuse_layer(module: Any) -> str | None:
    for layer in (module.conv1, module.conv2, module.conv3, module.conv4):
        if type(layer[0]) is not nn.GroupNorm:
            return f"a norm is a {type(layer[0]).__name__}"
    return None


TEMPORAL_RESNET_BLOCK = Block(
    cls="diffusers.models.resnet:TemporalResnetBlock",
    what="GroupNorm + SiLU, twice, over frames; residual",
    sources=("forward",),
    methods=forward(temporal_resnet_block),
    refuse=refuse_norms,
    covers=("norm1", "norm2"),
)

TEMPORAL_CONV_LAYER = Block(
    cls="diffusers.models.resnet:TemporalConvLayer",
    what="GroupNorm + SiLU, four times, over frames",
    sources=("forward",),
    methods=forward(temporal_conv_layer),
    refuse=_refuse_layer,
    covers=("conv1.0", "conv2.0", "conv3.0", "conv4.0"),
)

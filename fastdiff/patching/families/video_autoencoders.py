"""The VAEs of the transformers: Wan, Qwen-Image, HunyuanVideo, CogVideoX, LTX, Mochi, EasyAnimate, Sana, and their kin.

Flux and Flux 2 have the VAE of Stable Diffusion, which is in ``autoencoders``. Causal convolutions, their caches of the
frames before, tiles and chunks are the stock code's: it stays, and calls norms and activations that are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import MochiVaeAttnProcessor2_0
from diffusers.models.normalization import LpNorm
from torch import Tensor, nn

from fastdiff.ops import attention, qk_norm_rope, rms_norm_silu
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, drop, forward, is_plain, is_unwatched, why_stock
from fastdiff.patching.blocks.attention import ATTENTION, why_not_mode
from fastdiff.patching.blocks.channel_norms import (
    ANYWHERE,
    GROUP_NORM,
    RMS_NORM,
    group_norm,
    group_norm_by_frames,
    norm_row,
    sources_of,
    why_not_weight,
)
from fastdiff.patching.blocks.joint_attention import heads_of
from fastdiff.patching.blocks.norm_out import norm_out, then_silu
from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets
from fastdiff.patching.families.sana import GATED_CONVOLUTION

_FILES = "diffusers.models.autoencoders.autoencoder_"
_WAN, _QWEN, _QWEN21 = f"{_FILES}kl_wan:Wan", f"{_FILES}kl_qwenimage:QwenImage", f"{_FILES}kl_qwenimage21:QwenImage21"
_HUNYUAN, _HUNYUAN15 = f"{_FILES}kl_hunyuan_video:HunyuanVideo", f"{_FILES}kl_hunyuanvideo15:HunyuanVideo15"
_IMAGE, _REFINER = f"{_FILES}kl_hunyuanimage:HunyuanImage", f"{_FILES}kl_hunyuanimage_refiner:HunyuanImageRefiner"
_COGVIDEOX, _MOCHI = f"{_FILES}kl_cogvideox:CogVideoX", f"{_FILES}kl_mochi:Mochi"
_LTX, _LTX2, _DC = f"{_FILES}kl_ltx:LTXVideo", f"{_FILES}kl_ltx2:LTX2", f"{_FILES}dc:"
_MAGVIT = f"{_FILES}kl_magvit:EasyAnimate"
_LINEAR_ATTENTION = "diffusers.models.attention_processor:SanaMultiscaleLinearAttention"


def ltx_resnet(
    self: Any,
    inputs: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    *causal: bool,
    **named: bool,
) -> Tensor:
    """Replaces ``LTXVideoResnetBlock3d.forward``, and that of LTX-2, whose convolutions may be ``causal``."""
    site, norms = self._fastdiff_site, (self.norm1, self.norm2)
    reason = why_stock(inputs) or next(filter(None, (_why_not_norm(norm, inputs) for norm in norms)), None)
    if not is_plain(self.nonlinearity, nn.SiLU):
        reason = "its activation was replaced, or has hooks"
    elif temb is None and self.scale_shift_table is not None:
        reason = "no time embedding"
    if reason is not None:
        return site.stock(reason, self, inputs, temb, generator, *causal, **named)
    shift1 = scale1 = shift2 = scale2 = None
    if temb is not None and self.scale_shift_table is not None:
        temb = temb.unflatten(1, (4, -1)) + self.scale_shift_table[None, ..., None, None, None]
        shift1, scale1, shift2, scale2 = temb.unbind(dim=1)
    h = self.conv1(_activated(site, "norm1", self.norm1, inputs, scale1, shift1), *causal, **named)
    h = _noisy(h, self.per_channel_scale1, generator)
    h = _activated(site, "norm2", self.norm2, h, scale2, shift2)
    h = _noisy(self.conv2(drop(self.dropout, h), *causal, **named), self.per_channel_scale2, generator)
    if self.norm3 is not None:
        inputs = self.norm3(inputs.movedim(1, -1)).movedim(-1, 1)
    if self.conv_shortcut is not None:
        inputs = self.conv_shortcut(inputs)
    return h + inputs


def _activated(site: Site, slot: str, norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return site.serve(slot, rms_norm_silu, x, weight, bias, norm.eps, scale=scale, shift=shift)


def _noisy(h: Tensor, scale: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """h with the noise that stock code draws, one picture for all frames and samples."""
    if scale is None:
        return h
    noise = torch.randn(h.shape[-2:], generator=generator, device=h.device, dtype=h.dtype)[None]
    return h + (noise * scale)[None, :, None, ...]


def _why_not_norm(norm: Any, x: Tensor) -> str | None:
    if not is_unwatched(norm):
        return "a norm has hooks"
    weight = getattr(norm, "weight", None)
    return None if weight is None else why_not_weight(weight, x)


def _ltx_resnet(cls: str, norm: str) -> Block:
    return Block(
        cls=cls,
        what=lambda module: (
            "RMSNorm + SiLU, twice" if module.scale_shift_table is None else "RMSNorm + scale and shift + SiLU, twice"
        ),
        sources=("forward", *sources_of(norm)),
        methods=forward(ltx_resnet),
        refuse=lambda module: None if type(module.nonlinearity) is nn.SiLU else "its activation is no SiLU",
        covers=("norm1", "norm2"),
    )


def magvit_resnet(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces ``EasyAnimateResidualBlock3D.forward``, whose norms are of single frames or of all."""
    site, norms = self._fastdiff_site, (self.norm1, self.norm2)
    reason = why_stock(hidden_states, *norms)
    if not is_plain(self.nonlinearity, nn.SiLU):
        reason = "its activation was replaced, or has hooks"
    if reason is not None:
        return site.stock(reason, self, hidden_states)

    def activated(slot: str, norm: Any, x: Tensor) -> Tensor:
        return (group_norm_by_frames if self.spatial_group_norm else group_norm)(site, norm, x, silu=True, slot=slot)

    h = self.conv1(activated("norm1", self.norm1, hidden_states))
    h = self.conv2(drop(self.dropout, activated("norm2", self.norm2, h)))
    h = h + self.shortcut(hidden_states)
    return h if self.output_scale_factor == 1 else h / self.output_scale_factor


MAGVIT_RESNET = Block(
    cls=f"{_MAGVIT}ResidualBlock3D",
    what="GroupNorm + SiLU, twice",
    sources=("forward",),
    methods=forward(magvit_resnet),
    refuse=lambda module: None if type(module.nonlinearity) is nn.SiLU else "its activation is no SiLU",
    covers=("norm1", "norm2"),
)


#: A smaller one has no finite gradient at 0; this one matters to vectors shorter than 1e-7 only.
MOCHI_EPS = 1e-24


def causal_attention(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """Replaces ``Attention.forward`` in Mochi's VAE: every place attends to itself in its own and earlier frames, with
    queries and keys of length 1.

    These are what an RMSNorm gives, divided by sqrt(D), and the division is part of the scale.
    """
    site = self._fastdiff_site
    reason = why_stock(hidden_states) or _why_not_causal(self) or why_not_mode()
    if kwargs or encoder_hidden_states is not None or attention_mask is not None:
        reason = "called with another sequence or a mask"
    elif hidden_states.shape[1] == 1:
        reason = "a single frame has nothing to attend to"
    if reason is not None:
        return site.stock(reason, self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    query, key, value = (heads_of(self, layer(hidden_states)) for layer in (self.to_q, self.to_k, self.to_v))
    query, key = site.serve("norm", qk_norm_rope, query, key, eps=MOCHI_EPS)
    scale = query.shape[-1] ** -1.5
    h, _ = site.serve("attention", attention, query, key, value, scale=scale, is_causal=self.is_causal)
    h = drop(self.to_out[1], self.to_out[0](h.flatten(2)))
    if self.residual_connection:
        h = h + hidden_states
    return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor


def _why_not_causal(attn: Any) -> str | None:
    if type(attn.processor) is not MochiVaeAttnProcessor2_0:
        return f"its processor is {type(attn.processor).__name__}"
    for norm in (attn.norm_q, attn.norm_k):
        if type(norm) is not LpNorm or (norm.p, norm.dim) != (2, -1):
            return "its queries or keys are not normalised to length 1"
        if not is_unwatched(norm):
            return "a norm has hooks"
    return None


_PROCESSOR = "diffusers.models.attention_processor:MochiVaeAttnProcessor2_0.__call__"
CAUSAL_ATTENTION = Block(
    cls=ATTENTION.cls,
    what="norm of queries and keys, causal attention",
    sources=("forward", _PROCESSOR, "diffusers.models.normalization:LpNorm.forward"),
    methods=forward(causal_attention),
    refuse=_why_not_causal,
    applies=lambda module: type(module.processor) is MochiVaeAttnProcessor2_0,
)


def _causal(name: str, exit_activation: str = "nonlinearity") -> tuple[Block, ...]:
    """ResNet blocks and exits of Wan and those made after it; ``name`` is the prefix of their classes."""
    norm = f"{name}RMS_norm"
    block = "ResidualBlock" if exit_activation == "nonlinearity" else "ResnetBlock"
    parts = ("Encoder3d", "Decoder3d") if exit_activation == "nonlinearity" else ("Encoder3D", "Decoder3D")
    return (
        *then_silu(name + block, ("norm1", "norm2"), "nonlinearity", norm),
        *(norm_out(name + part, "norm_out", exit_activation, norm) for part in parts),
    )


_SPATIAL_NORM = f"{_COGVIDEOX}SpatialNorm3D"
_BY_FRAMES = f"{_MOCHI}ChunkedGroupNorm3D"

#: All of them in every family: a VAE is patched wherever their classes occur.
BLOCKS = (
    *_causal(_WAN),
    *_causal(_QWEN),
    *_causal(_QWEN21),
    *_causal(_HUNYUAN15, "conv_act"),
    *_causal(_REFINER, "conv_act"),
    *then_silu(f"{_HUNYUAN}ResnetBlockCausal3D"),
    *(norm_out(f"{_HUNYUAN}{part}") for part in ("Encoder3D", "Decoder3D")),
    *then_silu(f"{_IMAGE}ResnetBlock"),
    *(norm_out(f"{_IMAGE}{part}", "norm_out", "nonlinearity") for part in ("Encoder2D", "Decoder2D")),
    norm_row(f"{_IMAGE}AttentionBlock", "norm"),
    *then_silu(f"{_COGVIDEOX}ResnetBlock3D", ("norm1", "norm2"), "nonlinearity", GROUP_NORM, _SPATIAL_NORM),
    norm_out(f"{_COGVIDEOX}Encoder3D", "norm_out"),
    norm_out(f"{_COGVIDEOX}Decoder3D", "norm_out", "conv_act", _SPATIAL_NORM),
    *then_silu(f"{_MOCHI}ResnetBlock3D", ("norm1", "norm2"), "nonlinearity", _BY_FRAMES),
    norm_out(f"{_MOCHI}Encoder3D", "norm_out", "nonlinearity", _BY_FRAMES),
    CAUSAL_ATTENTION,
    _ltx_resnet(f"{_LTX}ResnetBlock3d", RMS_NORM),
    _ltx_resnet(f"{_LTX2}VideoResnetBlock3d", f"{_FILES}kl_ltx2:PerChannelRMSNorm"),
    MAGVIT_RESNET,
    *(norm_row(f"{_MAGVIT}{part}", "conv_norm_out") for part in ("Encoder", "Decoder")),
    *(norm_row(f"{_LTX}{part}3d", "norm_out", RMS_NORM) for part in ("Encoder", "Decoder")),
    *(norm_row(f"{_DC}{part}", name, RMS_NORM) for part, name in (("ResBlock", "norm"), ("Decoder", "norm_out"))),
    norm_row(_LINEAR_ATTENTION, "norm_out", RMS_NORM),
    norm_row("diffusers.models.transformers.sana_transformer:GLUMBConv", "norm", RMS_NORM),
    GATED_CONVOLUTION,
    ATTENTION,
    *ANYWHERE,
)


def noise(*size: int) -> Callable[[Any], dict[str, Any]]:
    """Inputs: encode and decode one small picture, (H, W), or clip, (T, H, W), and say where in the noise it is."""

    def example(model: Any) -> dict[str, Any]:
        inputs = {"sample": torch.randn(1, 3, *size, **unets.like(model))}
        if getattr(model.config, "timestep_conditioning", False):
            inputs["temb"] = torch.full((1,), 0.05, **unets.like(model))
        return inputs

    return example


_PARTS = ("encoder", "decoder")
#: Class -> inputs, and the modules that a pipeline calls. Encoders and decoders that keep caches, or change those that
#: they get, cannot be called twice with the same; of these VAEs only the whole can be.
_CLASSES = {
    f"{_FILES}kl_wan:AutoencoderKLWan": (noise(5, 16, 16), ("",)),
    f"{_FILES}kl_qwenimage:AutoencoderKLQwenImage": (noise(1, 16, 16), ("",)),
    f"{_FILES}kl_hunyuan_video:AutoencoderKLHunyuanVideo": (noise(5, 32, 32), _PARTS),
    f"{_FILES}kl_hunyuanvideo15:AutoencoderKLHunyuanVideo15": (noise(5, 16, 16), _PARTS),
    f"{_FILES}kl_hunyuanimage:AutoencoderKLHunyuanImage": (noise(64, 64), _PARTS),
    f"{_FILES}kl_hunyuanimage_refiner:AutoencoderKLHunyuanImageRefiner": (noise(5, 16, 16), _PARTS),
    f"{_FILES}kl_cogvideox:AutoencoderKLCogVideoX": (noise(9, 16, 16), _PARTS),
    f"{_FILES}kl_mochi:AutoencoderKLMochi": (noise(7, 16, 16), _PARTS),
    f"{_FILES}kl_ltx:AutoencoderKLLTXVideo": (noise(9, 32, 32), _PARTS),
    f"{_FILES}kl_ltx2:AutoencoderKLLTX2Video": (noise(9, 64, 64), _PARTS),
    f"{_FILES}kl_magvit:AutoencoderKLMagvit": (noise(9, 16, 16), ("",)),
    f"{_FILES}dc:AutoencoderDC": (noise(64, 64), _PARTS),
}
FAMILIES = tuple(Family(cls, BLOCKS, example, forwards=parts) for cls, (example, parts) in _CLASSES.items())

"""The transformer blocks of U-Nets: LayerNorms, each but the first together with the residual before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks import Block, forward
from fastdiff.patching.blocks.token_norms import (
    NORM_SOURCES,
    gated_then_modulated,
    modulated,
    why_not_kinds,
    why_not_norms,
)

_FILE = "diffusers.models.attention"


def basic_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Replaces ``BasicTransformerBlock.forward`` where ``norm_type="layer_norm"``."""
    site, parts = self._fastdiff_site, self._modules
    norm1, norm2, norm3 = _norms(self, "norm1", "norm2", "norm3")
    attn2, positions = parts.get("attn2"), self.pos_embed
    kwargs = cross_attention_kwargs or {}
    reason = why_not_norms(hidden_states, norm1, norm2, norm3) or _why_not(self)
    if self._chunk_size is not None:
        reason = "its feed-forward runs in chunks"
    elif "gligen" in kwargs or "scale" in kwargs:
        reason = "called with cross_attention_kwargs for GLIGEN or a scale"
    elif hidden_states.dim() != 3:
        reason = "its input is not (B, S, D)"
    if reason is not None:
        return site.stock(
            reason, self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    hidden_states = hidden_states.contiguous()  # from a convolution it is a transposed view, copied by every norm
    h = modulated(site, "norm1", norm1, hidden_states)
    h = parts["attn1"](
        h if positions is None else positions(h),
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
        **kwargs,
    )
    if attn2 is not None:
        hidden_states, h = gated_then_modulated(site, "norm2", h, None, hidden_states, norm2)
        h = attn2(
            h if positions is None else positions(h),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            **kwargs,
        )
    hidden_states, h = gated_then_modulated(site, "norm3", h, None, hidden_states, norm3)
    h = parts["ff"](h)
    return h + hidden_states


def temporal_block(
    self: Any, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
) -> Tensor:
    """Replaces ``TemporalBasicTransformerBlock.forward`` (Stable Video Diffusion)."""
    site, parts = self._fastdiff_site, self._modules
    norm_in, norm1, norm2, norm3 = _norms(self, "norm_in", "norm1", "norm2", "norm3")
    reason = why_not_norms(hidden_states, norm_in, norm1, norm2, norm3)
    if self._chunk_size is not None:
        reason = "its feed-forward runs in chunks"
    if reason is not None:
        return site.stock(reason, self, hidden_states, num_frames, encoder_hidden_states)
    tokens, channels = hidden_states.shape[1:]
    x = hidden_states.unflatten(0, (-1, num_frames)).transpose(1, 2).reshape(-1, num_frames, channels)
    h = parts["ff_in"](modulated(site, "norm_in", norm_in, x))
    x, h = gated_then_modulated(site, "norm1", h, None, x, norm1)
    h = parts["attn1"](h, encoder_hidden_states=None)
    if (attn2 := parts.get("attn2")) is not None:
        x, h = gated_then_modulated(site, "norm2", h, None, x, norm2)
        h = attn2(h, encoder_hidden_states=encoder_hidden_states)
    x, h = gated_then_modulated(site, "norm3", h, None, x, norm3)
    x = parts["ff"](h) + x
    return x.unflatten(0, (-1, tokens)).transpose(1, 2).reshape(-1, tokens, channels)


def _norms(block: Any, *names: str) -> list[Any]:
    """What a block lacks is ``None``, and then no submodule."""
    return [block._modules.get(name) for name in names]


def _why_not(module: Any) -> str | None:
    return "it has a fuser" if "fuser" in module._modules else None


BASIC_BLOCK = Block(
    cls=f"{_FILE}:BasicTransformerBlock",
    what="LayerNorm; residual + LayerNorm",
    sources=("forward", *NORM_SOURCES),
    methods=forward(basic_block),
    refuse=lambda module: _why_not(module) or why_not_kinds(*_norms(module, "norm1", "norm2", "norm3")),
    applies=lambda module: module.norm_type == "layer_norm",
)

TEMPORAL_BLOCK = Block(
    cls=f"{_FILE}:TemporalBasicTransformerBlock",
    what="LayerNorm; residual + LayerNorm",
    sources=("forward", *NORM_SOURCES),
    methods=forward(temporal_block),
    refuse=lambda module: (
        why_not_kinds(*_norms(module, "norm_in", "norm1", "norm2", "norm3"))
        if module.is_res
        else "its width inside is another, without residuals"
    ),
)

"""``CosmosTransformer3DModel``: Cosmos (Predict 1 and 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import activated_once
from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded, left_row
from fastdiff.patching.blocks.dispatched import chosen_backend
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_cosmos"


def _modulation(norm: Any, embedded_timestep: Tensor, temb: Tensor | None, parts: int) -> tuple[Tensor, ...]:
    """Of one time per sample, or of one per token."""
    found = norm.linear_2(norm.linear_1(activated_once(norm.activation, embedded_timestep)))
    if temb is not None:
        found = found + temb[..., : found.shape[-1]]
    return (found.unsqueeze(1) if found.ndim == 2 else found).chunk(parts, dim=-1)


@guarded("norm")
def zero(
    self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces ``CosmosAdaLayerNormZero.forward``."""
    shift, scale, gate = _modulation(self, embedded_timestep, temb, 3)
    return modulated(self._fastdiff_site, "norm", self.norm, hidden_states, scale, shift), gate


@guarded("norm")
def ada_layer_norm(
    self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None
) -> Tensor:
    """Replaces ``CosmosAdaLayerNorm.forward``."""
    shift, scale = _modulation(self, embedded_timestep, temb, 2)
    return modulated(self._fastdiff_site, "norm", self.norm, hidden_states, scale, shift)


@guarded()
def cosmos_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Any = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Any:
    """Replaces ``CosmosTransformerBlock.forward``."""
    site, x = self._fastdiff_site, hidden_states
    if self.before_proj is not None:
        x = self.before_proj(x) + latents
    if extra_pos_emb is not None:
        x = x + extra_pos_emb
    h, gate = self.norm1(x, embedded_timestep, temb)
    x = gated(site, "gate", self.attn1(h, image_rotary_emb=image_rotary_emb), gate, x)
    h, gate = self.norm2(x, embedded_timestep, temb)
    out = self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    x = gated(site, "cross-attention gate", out, gate, x)
    h, gate = self.norm3(x, embedded_timestep, temb)
    x = gated(site, "feed-forward gate", self.ff(h), gate, x)
    if controlnet_residual is not None:
        x = (x + controlnet_residual).to(x.dtype)
    return x if self.after_proj is None else (x, self.after_proj(x))


def example(model: Any) -> dict[str, Any]:
    """2 small frames, 9 text tokens of which 6 count."""
    config, inputs = model.config, Inputs(model)
    frames, height, width = 2 * config.patch_size[0], 4 * config.patch_size[1], 6 * config.patch_size[2]
    found = {
        "hidden_states": inputs.noise(1, config.in_channels, frames, height, width),
        "timestep": inputs.timestep(500),
        "encoder_hidden_states": inputs.noise(1, 9, config.text_embed_dim),
        "attention_mask": torch.arange(9, device=inputs.device)[None] < 6,
        "fps": 16,
    }
    if config.concat_padding_mask:
        found["padding_mask"] = inputs.noise(1, 1, height, width) * 0
    return found


def _why_another_backend() -> str | None:
    return None if chosen_backend() is None else "another attention backend is active"


COSMOS = Family(
    model=f"{_FILE}:CosmosTransformer3DModel",
    blocks=(
        block_row(f"{_FILE}:CosmosTransformerBlock", "gate + residual", cosmos_block),
        block_row(f"{_FILE}:CosmosAdaLayerNormZero", MODULATED, zero),
        block_row(f"{_FILE}:CosmosAdaLayerNorm", MODULATED, ada_layer_norm),
        attention_block(
            LEGACY,
            AttentionRow(
                processor=f"{_FILE}:CosmosAttnProcessor2_0", rope="image_rotary_emb", interleaved=False,
                not_now=_why_another_backend,
            ),
        ),
        left_row(f"{_FILE}:CosmosAttention", "attention", "it also attends to a picture's context"),
        GELU_TANH,
    ),
    example=example,
)  # fmt: skip

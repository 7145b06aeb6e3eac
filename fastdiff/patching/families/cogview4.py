"""``CogView4Transformer2DModel``: CogView 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks.adaln import GATES, MODULATED, block_row, gated_feed_forward, guarded
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, tables_after_text
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_cogview4"


@guarded("norm", "norm_context")
def zero(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """Replaces ``CogView4AdaLayerNormZero.forward``."""
    site = self._fastdiff_site
    shift, text_shift, scale, text_scale, gate, text_gate, *mlp = self.linear(temb).chunk(12, dim=1)
    h = modulated(site, "image norm", self.norm, hidden_states, scale, shift)
    text = modulated(site, "text norm", self.norm_context, encoder_hidden_states, text_scale, text_shift)
    return h, gate, mlp[0], mlp[2], mlp[4], text, text_gate, mlp[1], mlp[3], mlp[5]


@guarded("norm")
def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Replaces ``CogView4AdaLayerNormContinuous.forward``."""
    scale, shift = self.linear(conditioning_embedding.to(x.dtype)).chunk(2, dim=1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift)


@guarded("norm2", "norm2_context")
def cogview4_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    attention_mask: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``CogView4TransformerBlock.forward``; one feed-forward serves both streams."""
    site = self._fastdiff_site
    h, gate, shift, scale, gate_mlp, text, *text_modulation = self.norm1(hidden_states, encoder_hidden_states, temb)
    out, text_out = self.attn1(
        hidden_states=h, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb,
        attention_mask=attention_mask, **attention_kwargs or {},
    )  # fmt: skip
    h = gated_feed_forward(site, "image", hidden_states, out, gate, self.norm2, scale, shift, self.ff, gate_mlp)
    gate, shift, scale, gate_mlp = text_modulation
    return h, gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, gate, self.norm2_context, scale, shift, self.ff, gate_mlp
    )


def pair_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor) -> Tensor | None:
    """1 is added where both tokens count, 0 elsewhere: what the processor computes of the text's mask."""
    if mask is None:
        return None
    counts = torch.cat([mask > 0, mask.new_ones(image.shape[:2], dtype=torch.bool)], dim=1)
    return (counts[:, None, :, None] & counts[:, None, None]).to(image.dtype)


def example(model: Any) -> dict[str, Any]:
    """2 small latents and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    size = inputs.noise(2, 2) * 0 + 64
    return {
        "hidden_states": inputs.noise(2, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        "encoder_hidden_states": inputs.noise(2, 7, config.text_embed_dim),
        "timestep": inputs.timestep(500, batch=2),
        "original_size": size,
        "target_size": size,
        "crop_coords": size * 0,
    }


COGVIEW4 = Family(
    model=f"{_FILE}:CogView4Transformer2DModel",
    blocks=(
        block_row(f"{_FILE}:CogView4TransformerBlock", GATES, cogview4_block),
        block_row(f"{_FILE}:CogView4AdaLayerNormZero", MODULATED, zero),
        block_row(f"{_FILE}:CogView4AdaLayerNormContinuous", MODULATED, continuous),
        attention_block(
            LEGACY,
            AttentionRow(
                processor=f"{_FILE}:CogView4AttnProcessor", rope="image_rotary_emb", tables=tables_after_text,
                interleaved=False, joined=True, pair=True, mask=pair_mask,
            ),
        ),
        GELU_TANH,
    ),
    example=example,
)  # fmt: skip

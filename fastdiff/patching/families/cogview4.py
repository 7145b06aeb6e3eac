"""``CogView4Transformer2DModel``: CogView 4; and CogView 3 Plus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import activated_once
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    GATES,
    MODULATED,
    block_row,
    clip_half,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, tables_after_text
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families.cogvideox import COGVIDEOX_ATTENTION

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


@guarded("norm_x", "norm_c")
def zero_text_image(self: Any, x: Tensor, context: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
    """Replaces ``CogView3PlusAdaLayerNormZeroTextImage.forward``."""
    site = self._fastdiff_site
    modulation = self.linear(activated_once(self.silu, emb)).chunk(12, dim=1)
    shift, scale, *rest = modulation[:6]
    text_shift, text_scale, *text_rest = modulation[6:]
    h = modulated(site, "image norm", self.norm_x, x, scale, shift)
    return h, *rest, modulated(site, "text norm", self.norm_c, context, text_scale, text_shift), *text_rest


@guarded("norm2", "norm2_context")
def cogview3_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, emb: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces ``CogView3PlusTransformerBlock.forward``; here the feed-forward takes both streams at once."""
    site, tokens = self._fastdiff_site, encoder_hidden_states.shape[1]
    h, gate, shift, scale, gate_mlp, text, *modulation = self.norm1(hidden_states, encoder_hidden_states, emb)
    out, text_out = self.attn1(hidden_states=h, encoder_hidden_states=text)
    x, h = gated_then_modulated(site, "image norm", out, gate, hidden_states, self.norm2, scale, shift)
    gate, shift, scale, text_gate_mlp = modulation
    text, text_h = gated_then_modulated(
        site, "text norm", text_out, gate, encoder_hidden_states, self.norm2_context, scale, shift
    )
    h = self.ff(torch.cat([text_h, h], dim=1))
    x = gated(site, "image gate", h[:, tokens:], gate_mlp, x)
    return clip_half(x), clip_half(gated(site, "text gate", h[:, :tokens], text_gate_mlp, text))


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


_COGVIEW3 = "diffusers.models.transformers.transformer_cogview3plus"
FAMILIES = (
    Family(
        f"{_FILE}:CogView4Transformer2DModel",
        (
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
        example,
    ),
    Family(
        f"{_COGVIEW3}:CogView3PlusTransformer2DModel",
        (
            block_row(f"{_COGVIEW3}:CogView3PlusTransformerBlock", GATES, cogview3_block),
            block_row(
                "diffusers.models.normalization:CogView3PlusAdaLayerNormZeroTextImage", MODULATED, zero_text_image
            ),
            ADA_LAYER_NORM_CONTINUOUS,
            COGVIDEOX_ATTENTION,
            GELU_TANH,
        ),
        example,
    ),
)  # fmt: skip

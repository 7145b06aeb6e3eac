"""``StableAudioDiTModel``: Stable Audio Open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks.adaln import block_row, guarded
from fastdiff.patching.blocks.feed_forward import SWIGLU
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, head_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.stable_audio_transformer"


@guarded("norm1", "norm2", "norm3")
def stable_audio_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    rotary_embedding: Any = None,
) -> Tensor:
    """Replaces ``StableAudioDiTBlock.forward``."""
    site = self._fastdiff_site
    h = modulated(site, "norm1", self.norm1, hidden_states)
    h = self.attn1(h, attention_mask=attention_mask, rotary_emb=rotary_embedding)
    x, h = gated_then_modulated(site, "norm2", h, None, hidden_states, self.norm2)
    h = self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, h = gated_then_modulated(site, "norm3", h, None, x, self.norm3)
    result: Tensor = self.ff(h) + x
    return result


def example(model: Any) -> dict[str, Any]:
    """2 sequences of 16 latents, 5 text tokens, one global token."""
    config, inputs = model.config, Inputs(model)
    angle = torch.randn(17, config.attention_head_dim // 4, device=inputs.device).repeat(1, 2)
    return {
        "hidden_states": inputs.noise(2, config.in_channels, 16),
        "timestep": inputs.timestep(batch=1),
        "encoder_hidden_states": inputs.noise(2, 5, config.cross_attention_input_dim),
        "global_hidden_states": inputs.noise(2, 1, config.global_states_input_dim),
        "rotary_embedding": (angle.cos(), angle.sin()),
    }


STABLE_AUDIO = Family(
    model=f"{_FILE}:StableAudioDiTModel",
    blocks=(
        block_row(f"{_FILE}:StableAudioDiTBlock", "LayerNorm; residual + LayerNorm", stable_audio_block),
        attention_block(
            LEGACY,
            AttentionRow(
                processor="diffusers.models.attention_processor:StableAudioAttnProcessor2_0", rope="rotary_emb",
                interleaved=False, mask=head_mask,
            ),
        ),
        SWIGLU,
    ),
    example=example,
)  # fmt: skip

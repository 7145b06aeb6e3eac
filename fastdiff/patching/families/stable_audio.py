"""``StableAudioDiTModel``: Stable Audio Open. Its blocks' LayerNorms have no modulation and stay."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.feed_forward import SWIGLU
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, head_mask
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs


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
    model="diffusers.models.transformers.stable_audio_transformer:StableAudioDiTModel",
    blocks=(
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

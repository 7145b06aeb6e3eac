"""``LatteTransformer3DModel``: Latte. Its spatial and temporal blocks are PixArt's."""

from __future__ import annotations

from typing import Any

from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GEGLU, GELU_TANH
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families.pixart import ADA_NORM_SINGLE_BLOCK


def example(model: Any) -> dict[str, Any]:
    """One small video of the configured length and 9 text tokens."""
    config, inputs = model.config, Inputs(model)
    size = 4 * config.patch_size
    return {
        "hidden_states": inputs.noise(1, config.in_channels, config.video_length, size, size),
        "encoder_hidden_states": inputs.noise(1, 9, config.caption_channels),
        "timestep": inputs.timestep(500),
    }


LATTE = Family(
    model="diffusers.models.transformers.latte_transformer_3d:LatteTransformer3DModel",
    blocks=(ADA_NORM_SINGLE_BLOCK, ATTENTION, GELU_TANH, GEGLU),
    example=example,
)

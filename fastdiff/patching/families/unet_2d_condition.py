"""``UNet2DConditionModel``: Stable Diffusion, DeepFloyd IF, Kandinsky 2, unCLIP, AudioLDM and many others."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets


def example(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents.

    Raises:
        ValueError: if the model wants conditions whose shapes its configuration does not say.
    """
    size = unets.size_for(model)
    channels = model.config.in_channels
    if model.config.addition_embed_type == "image_hint":
        channels -= 4  # the model appends its embedding of the hint
    return {
        "sample": torch.randn(2, channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": unets.text(model),
        **unets.class_labels(model),
        **unets.added_conditions(model, size),
    }


UNET_2D_CONDITION = Family(unets.UNET_2D_CONDITION, unets.BLOCKS, example, unets.SWITCHES)

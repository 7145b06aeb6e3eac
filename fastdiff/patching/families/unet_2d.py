"""``UNet2DModel``: DDPM, improved DDPM, score SDE, consistency models, latent diffusion without text."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets


def example(model: Any) -> dict[str, Any]:
    """A forward on 2 small images."""
    size = unets.size_for(model)
    return {
        "sample": torch.randn(2, model.config.in_channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        **unets.class_labels(model),
    }


UNET_2D = Family(unets.UNET_2D, unets.BLOCKS, example, unets.SWITCHES)

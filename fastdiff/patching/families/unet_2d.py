"""``UNet2DModel``: DDPM and its relatives."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.layout import channels_last
from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.blocks.packed import prepack
from fastdiff.patching.blocks.resnet import RESNET_BLOCK
from fastdiff.patching.families import Family, Switch
from fastdiff.patching.families._time_embedding import note_silu_once

_CLASS = "diffusers.models.unets.unet_2d:UNet2DModel"


def example(model: Any) -> dict[str, Any]:
    """A forward on 2 small images."""
    config, weight = model.config, next(model.parameters())
    size = 2 ** (len(config.block_out_channels) + 1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels, size, size, device=weight.device, dtype=weight.dtype),
        "timestep": torch.tensor([500, 500], device=weight.device),
    }
    if model.class_embedding is not None:
        if config.class_embed_type == "identity":
            width = model.time_embedding.linear_2.out_features
            inputs["class_labels"] = torch.randn(2, width, device=weight.device, dtype=weight.dtype)
        else:
            inputs["class_labels"] = torch.zeros(2, dtype=torch.long, device=weight.device)
    return inputs


UNET_2D = Family(
    model=_CLASS,
    blocks=(RESNET_BLOCK, ATTENTION, norm_out(_CLASS)),
    switches=(
        Switch((), note_silu_once),
        Switch((), prepack),
        Switch((), channels_last(_CLASS)),
    ),
    example=example,
)

"""``AutoencoderKL``: the VAE of Stable Diffusion, SDXL and many others."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.layout import channels_last
from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.blocks.packed import prepack
from fastdiff.patching.blocks.resnet import RESNET_BLOCK
from fastdiff.patching.families import Family, Switch

_ENCODER = "diffusers.models.autoencoders.vae:Encoder"
_DECODER = "diffusers.models.autoencoders.vae:Decoder"


def example(model: Any) -> dict[str, Any]:
    """Encode and decode one small picture."""
    weight = next(model.parameters())
    size = 2 ** (len(model.config.block_out_channels) + 2)
    return {"sample": torch.randn(1, model.config.in_channels, size, size, device=weight.device, dtype=weight.dtype)}


AUTOENCODER_KL = Family(
    model="diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    blocks=(
        RESNET_BLOCK,
        ATTENTION,
        norm_out(_ENCODER),
        norm_out(_DECODER),
    ),
    switches=(Switch((), prepack), Switch((), channels_last(_ENCODER, _DECODER))),
    example=example,
    forwards=("encoder", "decoder"),
)

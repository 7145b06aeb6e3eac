"""VAEs of pictures, and Stable Video Diffusion's."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets

_VAES = "diffusers.models.autoencoders"
_MASK_DECODER = f"{_VAES}.vae:MaskConditionDecoder"
#: What ``block_out_channels`` is called in the configurations.
_PREFIXES = ("", "down_", "encoder_")
_TEMPORAL_DECODER = f"{_VAES}.autoencoder_kl_temporal_decoder:TemporalDecoder"


def picture(model: Any) -> dict[str, Any]:
    """Encode and decode one small picture."""
    config = model.config
    channels = next(config[f"{name}block_out_channels"] for name in _PREFIXES if f"{name}block_out_channels" in config)
    size = 2 ** (len(channels) + 2)
    return {"sample": torch.randn(1, config.get("in_channels", 3), size, size, **unets.like(model))}


def clip(model: Any) -> dict[str, Any]:
    """Encode 3 frames, and decode them together."""
    inputs = picture(model)
    return {"sample": inputs["sample"].repeat(3, 1, 1, 1), "num_frames": 3}


def masked(model: Any) -> dict[str, Any]:
    """Encode and decode one small picture, of which a part is kept."""
    inputs = picture(model)
    mask = torch.zeros_like(inputs["sample"][:, :1])
    mask[..., : mask.shape[-1] // 2] = 1
    return inputs | {"mask": mask}


_PARTS = ("encoder", "decoder")
#: Class -> its own row if it has one, its inputs, the modules that a pipeline calls.
_CLASSES = {
    "autoencoder_kl:AutoencoderKL": ((), picture, _PARTS),
    "autoencoder_kl_flux2:AutoencoderKLFlux2": ((), picture, _PARTS),
    "autoencoder_kl_temporal_decoder:AutoencoderKLTemporalDecoder": ((norm_out(_TEMPORAL_DECODER),), clip, _PARTS),
    "autoencoder_asym_kl:AsymmetricAutoencoderKL": ((norm_out(_MASK_DECODER),), masked, _PARTS),
    "vq_model:VQModel": ((), picture, _PARTS),
    "consistency_decoder_vae:ConsistencyDecoderVAE": ((), picture, ("encoder", "decoder_unet")),
}
FAMILIES = tuple(
    Family(f"{_VAES}.{cls}", (*unets.BLOCKS, *rows), example, unets.SWITCHES, parts)
    for cls, (rows, example, parts) in _CLASSES.items()
)

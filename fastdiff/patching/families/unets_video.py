"""U-Nets over frames: AnimateDiff, ModelScope and Zeroscope, I2VGen-XL, Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets

_MOTION = "diffusers.models.unets.unet_motion_model:UNetMotionModel"
_3D = "diffusers.models.unets.unet_3d_condition:UNet3DConditionModel"
_I2VGEN = "diffusers.models.unets.unet_i2vgen_xl:I2VGenXLUNet"
_SPATIO_TEMPORAL = "diffusers.models.unets.unet_spatio_temporal_condition:UNetSpatioTemporalConditionModel"


def animatediff(model: Any) -> dict[str, Any]:
    """A forward on 2 clips of 3 frames, each frame with its own text."""
    return text_to_video(model) | {"encoder_hidden_states": unets.text(model, batch=6)}


def text_to_video(model: Any) -> dict[str, Any]:
    """A forward on 2 clips of 3 frames."""
    size = unets.size_for(model)
    return {
        "sample": torch.randn(2, model.config.in_channels, 3, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": unets.text(model),
        **unets.added_conditions(model, size),
    }


def i2vgen(model: Any) -> dict[str, Any]:
    """A forward on 2 clips of 3 frames, with fps, the first frame and its embedding."""
    inputs = text_to_video(model)
    return inputs | {
        "fps": torch.tensor([8, 8], device=unets.like(model)["device"]),
        "image_latents": torch.randn_like(inputs["sample"]),
        "image_embeddings": torch.randn(2, model.config.cross_attention_dim, **unets.like(model)),
    }


def image_to_video(model: Any) -> dict[str, Any]:
    """A forward on 2 clips of 3 frames, with the embedding of an image and 3 numbers about the clip."""
    config, size = model.config, unets.size_for(model)
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    width = config.cross_attention_dim
    return {
        "sample": torch.randn(2, 3, config.in_channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": torch.randn(
            2, 1, width if isinstance(width, int) else width[0], **unets.like(model)
        ),
        "added_time_ids": torch.ones(2, ids, **unets.like(model)),
    }  # fmt: skip


FAMILIES = tuple(
    Family(cls, (*unets.BLOCKS, norm_out(cls)), example, unets.SWITCHES)
    for cls, example in (
        (_MOTION, animatediff),
        (_3D, text_to_video),
        (_I2VGEN, i2vgen),
        (_SPATIO_TEMPORAL, image_to_video),
    )
)

"""ControlNets of U-Nets: the plain one, Union, XS and SparseCtrl; also several in one."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets

_PLAIN = "diffusers.models.controlnets.controlnet:ControlNetModel"
_MULTI = "diffusers.models.controlnets.multicontrolnet:MultiControlNetModel"
_UNION = "diffusers.models.controlnets.controlnet_union:ControlNetUnionModel"
_SPARSE = "diffusers.models.controlnets.controlnet_sparsectrl:SparseControlNetModel"
_XS = "diffusers.models.controlnets.controlnet_xs:UNetControlNetXSModel"


def _denoiser(model: Any, size: int) -> dict[str, Any]:
    channels = model.config.get("in_channels", 4)
    return {
        "sample": torch.randn(2, channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": unets.text(model),
    }


def _picture(model: Any, size: int) -> torch.Tensor:
    """The condition, which the model's own embedding halves in size as often as it has levels."""
    prefix = "ctrl_" if "ctrl_conditioning_channels" in model.config else ""
    factor = 2 ** (len(model.config[f"{prefix}conditioning_embedding_out_channels"]) - 1)
    channels = model.config[f"{prefix}conditioning_channels"]
    return torch.randn(2, channels, factor * size, factor * size, **unets.like(model))


def plain(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents and a picture."""
    size = unets.size_for(model)
    return {
        **_denoiser(model, size),
        "controlnet_cond": _picture(model, size),
        **unets.class_labels(model),
        **unets.added_conditions(model, size),
    }


def several(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents and a picture for each ControlNet."""
    inputs = plain(model.nets[0])
    count = len(model.nets)
    return inputs | {
        "controlnet_cond": [inputs["controlnet_cond"]] * count,
        "conditioning_scale": [1.0 / (index + 1) for index in range(count)],
    }


def union(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents and pictures of 2 kinds."""
    size = unets.size_for(model)
    kinds = torch.zeros(2, model.config.num_control_type, **unets.like(model))
    kinds[:, :2] = 1
    return {
        **_denoiser(model, size),
        "controlnet_cond": [_picture(model, size), _picture(model, size)],
        "control_type": kinds,
        "control_type_idx": [0, 1],
        "conditioning_scale": [1.0, 0.5],
        **unets.added_conditions(model, size),
    }


def sparse(model: Any) -> dict[str, Any]:
    """A forward on 2 clips of 3 frames, of which the first is given."""
    size = unets.size_for(model)
    inputs = _denoiser(model, size) | {"encoder_hidden_states": unets.text(model, batch=6)}
    inputs["sample"] = torch.randn(2, model.config.in_channels, 3, size, size, **unets.like(model))
    channels = model.config.conditioning_channels
    factor = 1 if model.use_simplified_condition_embedding else 8
    inputs["controlnet_cond"] = torch.randn(2, channels, 3, factor * size, factor * size, **unets.like(model))
    mask = torch.zeros(2, 1, 3, factor * size, factor * size, **unets.like(model))
    mask[:, :, 0] = 1
    return inputs | {"conditioning_mask": mask}


FAMILIES = (
    Family(_PLAIN, unets.BLOCKS, plain, unets.SWITCHES),
    Family(_MULTI, unets.BLOCKS, several, unets.SWITCHES),
    Family(_UNION, unets.BLOCKS, union, unets.SWITCHES),
    Family(_SPARSE, unets.BLOCKS, sparse, unets.SWITCHES),
    Family(_XS, (*unets.BLOCKS, norm_out(_XS, "base_conv_norm_out", "base_conv_act")), plain, unets.SWITCHES),
)

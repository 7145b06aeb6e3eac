"""U-Nets in image space of their own class: AudioLDM 2 and Kandinsky 3."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.blocks.norms import KANDINSKY3_NORM
from fastdiff.patching.families import Family
from fastdiff.patching.families import _unets as unets

_AUDIOLDM2 = "diffusers.pipelines.audioldm2.modeling_audioldm2:AudioLDM2UNet2DConditionModel"
_KANDINSKY3 = "diffusers.models.unets.unet_kandinsky3:Kandinsky3UNet"


def audioldm2(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents, with the hidden states of GPT2 and T5.

    Raises:
        ValueError: unless every layer has a transformer without text, one for GPT2 and one for T5.
    """
    widths = model.config.cross_attention_dim
    if not isinstance(widths, (list, tuple)) or not isinstance(widths[0], (list, tuple)) or len(widths[0]) != 3:
        raise ValueError(f"no synthetic inputs for cross_attention_dim={widths!r}: pass the arguments of a forward")
    _, first, second = widths[0]
    size = unets.size_for(model)
    return {
        "sample": torch.randn(2, model.config.in_channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": torch.randn(2, 8, first, **unets.like(model)),
        "encoder_hidden_states_1": torch.randn(2, 7, second, **unets.like(model)),
    }


def kandinsky3(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents, of whose texts one is shorter."""
    size = unets.size_for(model)
    mask = torch.ones(2, 77, **unets.like(model))
    mask[1, 50:] = 0
    return {
        "sample": torch.randn(2, model.config.in_channels, size, size, **unets.like(model)),
        "timestep": unets.timesteps(model),
        "encoder_hidden_states": unets.text(model),
        "encoder_attention_mask": mask,
    }


FAMILIES = (
    Family(_AUDIOLDM2, (*unets.BLOCKS, norm_out(_AUDIOLDM2)), audioldm2, unets.SWITCHES),
    Family(
        _KANDINSKY3,
        (*unets.BLOCKS, KANDINSKY3_NORM, norm_out(_KANDINSKY3, activation="conv_act_out")),
        kandinsky3,
        unets.SWITCHES,
    ),
)

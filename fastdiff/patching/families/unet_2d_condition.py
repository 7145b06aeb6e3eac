"""``UNet2DConditionModel``: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GEGLU
from fastdiff.patching.blocks.layout import channels_last
from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.blocks.packed import prepack
from fastdiff.patching.blocks.resnet import RESNET_BLOCK
from fastdiff.patching.blocks.transformer import TRANSFORMER_ENTRANCE
from fastdiff.patching.families import Family, Switch
from fastdiff.patching.families._time_embedding import note_silu_once

_CLASS = "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel"


#: The kinds of conditioning that :func:`example` has inputs for.
_KNOWN = {"encoder_hid_dim_type": (None, "text_proj"), "addition_embed_type": (None, "text", "text_time")}


def example(model: Any) -> dict[str, Any]:
    """A forward on 2 small latents.

    Raises:
        ValueError: if the model wants conditions whose shapes its configuration does not say.
    """
    config, weight = model.config, next(model.parameters())
    like = {"device": weight.device, "dtype": weight.dtype}
    size = 2 ** (len(config.block_out_channels) + 1)
    for name, known in _KNOWN.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"no synthetic inputs for {name}={getattr(config, name)!r}: pass the arguments of a forward"
            )
    width = config.cross_attention_dim if config.encoder_hid_dim_type is None else config.encoder_hid_dim
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels, size, size, **like),
        "timestep": torch.tensor([500, 500], device=weight.device),
        "encoder_hidden_states": torch.randn(2, 77, width if isinstance(width, int) else width[0], **like),
    }
    if model.class_embedding is not None:
        kind = config.class_embed_type
        if kind == "identity":
            labels = torch.randn(2, model.time_embedding.linear_2.out_features, **like)
        elif kind in ("projection", "simple_projection"):
            labels = torch.randn(2, config.projection_class_embeddings_input_dim, **like)
        else:
            labels = torch.zeros(2, dtype=torch.long, device=weight.device)
        inputs["class_labels"] = labels
    if config.addition_embed_type == "text_time":
        ids = config.addition_time_embed_dim * 6
        pooled = config.projection_class_embeddings_input_dim - ids
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, pooled, **like),
            "time_ids": torch.ones(2, 6, **like),
        }
    return inputs


UNET_2D_CONDITION = Family(
    model=_CLASS,
    blocks=(RESNET_BLOCK, TRANSFORMER_ENTRANCE, ATTENTION, GEGLU, norm_out(_CLASS)),
    switches=(
        Switch((), note_silu_once),
        Switch((), prepack),
        Switch((), channels_last(_CLASS)),
    ),
    example=example,
)

"""What U-Nets and their VAEs have in common: their blocks, what these save together, and synthetic inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching._patch import Patch
from fastdiff.patching.blocks.attention import ADDED_KV_ATTENTION, ATTENTION
from fastdiff.patching.blocks.basic_transformer import BASIC_BLOCK, TEMPORAL_BLOCK
from fastdiff.patching.blocks.feed_forward import GEGLU
from fastdiff.patching.blocks.layout import channels_last
from fastdiff.patching.blocks.norm_out import norm_out
from fastdiff.patching.blocks.norms import ADA_GROUP_NORM, SPATIAL_NORM, TOKEN_NORMS
from fastdiff.patching.blocks.packed import prepack
from fastdiff.patching.blocks.resnet import RESNET_BLOCK
from fastdiff.patching.blocks.temporal import BLENDER, TEMPORAL_CONV_LAYER, TEMPORAL_RESNET_BLOCK, blend
from fastdiff.patching.blocks.transformer import TRANSFORMER_ENTRANCE
from fastdiff.patching.families import Switch
from fastdiff.patching.families._savings import replacing

UNET_2D_CONDITION = "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel"
UNET_2D = "diffusers.models.unets.unet_2d:UNet2DModel"
ENCODER = "diffusers.models.autoencoders.vae:Encoder"
DECODER = "diffusers.models.autoencoders.vae:Decoder"

_SKIP_BLOCKS = ("AttnSkipUpBlock2D", "SkipUpBlock2D")

#: All of them in every family: a model is patched wherever their classes occur in it.
BLOCKS = (
    RESNET_BLOCK,
    TRANSFORMER_ENTRANCE,
    BASIC_BLOCK,
    TEMPORAL_BLOCK,
    ATTENTION,
    ADDED_KV_ATTENTION,
    GEGLU,
    ADA_GROUP_NORM,
    SPATIAL_NORM,
    TEMPORAL_RESNET_BLOCK,
    TEMPORAL_CONV_LAYER,
    *TOKEN_NORMS,
    *(norm_out(cls) for cls in (UNET_2D_CONDITION, UNET_2D, ENCODER, DECODER)),
    *(norm_out(f"diffusers.models.unets.unet_2d_blocks:{name}", "skip_norm", "act") for name in _SKIP_BLOCKS),
)


def _note_activated_once(patch: Patch, model: Any) -> None:
    """Note how many blocks share the activation of the time embedding."""
    owners = [site.owner for site in patch.sites if getattr(site.owner, "time_emb_proj", None) is not None]
    if len(owners) > 1 and not any(getattr(owner, "skip_time_act", False) for owner in owners):
        name = type(owners[0].nonlinearity).__name__
        patch.savings.append(f"{name} of the time embedding once instead of {len(owners)} times")


SWITCHES = (
    Switch((), _note_activated_once),
    replacing(
        BLENDER, blend, "{count} blends of spatial and temporal features in one operation each", f"{BLENDER}.get_alpha"
    ),
    Switch((), prepack),
    Switch((), channels_last(UNET_2D_CONDITION, UNET_2D, ENCODER, DECODER)),
)


def like(model: Any) -> dict[str, Any]:
    """Device and dtype of the model's parameters."""
    weight = next(model.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


def size_for(model: Any) -> int:
    """A height and width that every level of the model halves without rest."""
    return int(2 ** (len(model.config.block_out_channels) + 1))


def timesteps(model: Any) -> Tensor:
    """For a batch of 2."""
    return torch.tensor([500, 500], device=next(model.parameters()).device)


def text(model: Any, batch: int = 2) -> Tensor | None:
    """Hidden states (batch, 77, D) of a text encoder; ``None`` where every level wants another width (AudioLDM)."""
    width = getattr(model.config, "encoder_hid_dim", None) or model.config.cross_attention_dim
    if not isinstance(width, int):
        if len(set(width)) > 1:
            return None
        width = width[0]
    return torch.randn(batch, 77, width, **like(model))


def class_labels(model: Any) -> dict[str, Tensor]:
    """The argument ``class_labels``, where the model has such an embedding."""
    if getattr(model, "class_embedding", None) is None:
        return {}
    kind = model.config.class_embed_type
    if kind == "identity":
        return {"class_labels": torch.randn(2, model.time_embedding.linear_2.out_features, **like(model))}
    if kind in ("projection", "simple_projection"):
        width = model.config.projection_class_embeddings_input_dim
        return {"class_labels": torch.randn(2, width, **like(model))}
    return {"class_labels": torch.zeros(2, dtype=torch.long, device=like(model)["device"])}


def added_conditions(model: Any, size: int) -> dict[str, Any]:
    """The argument ``added_cond_kwargs``, where the configuration asks for some.

    Raises:
        ValueError: if the configuration does not say their shapes.
    """
    config = model.config
    added: dict[str, Tensor] = {}
    kind, hidden = (getattr(config, name, None) for name in ("addition_embed_type", "encoder_hid_dim_type"))
    if kind == "text_time":
        ids = config.addition_time_embed_dim * 6  # 5 in the refiner, where the sum is as right
        pooled = config.projection_class_embeddings_input_dim - ids
        added = {"text_embeds": torch.randn(2, pooled, **like(model)), "time_ids": torch.ones(2, 6, **like(model))}
    elif kind in ("text_image", "image", "image_hint") or hidden in ("text_image_proj", "image_proj"):
        width = config.cross_attention_dim if hidden == "text_image_proj" else config.encoder_hid_dim
        added = {"image_embeds": torch.randn(2, width, **like(model))}
        if kind == "text_image":
            added["text_embeds"] = torch.randn(2, model.add_embedding.text_proj.in_features, **like(model))
        if kind == "image_hint":
            added["hint"] = torch.randn(2, 3, 8 * size, 8 * size, **like(model))
    elif kind not in (None, "text") or hidden not in (None, "text_proj"):
        wanted = f"addition_embed_type={kind!r}, encoder_hid_dim_type={hidden!r}"
        raise ValueError(f"no synthetic inputs for {wanted}: pass the arguments of a forward")
    return {"added_cond_kwargs": added} if added else {}

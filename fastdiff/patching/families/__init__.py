"""Model families: which blocks are replaced in each, one file per family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastdiff.patching._fingerprint import base
from fastdiff.patching._patch import Patch
from fastdiff.patching.blocks import Block


@dataclass(frozen=True)
class Switch:
    """A saving outside of the blocks: an attribute that Diffusers has for it, or repeated work done once.

    Attributes:
        sources: ``module:qualname`` of the functions it relies on, fingerprinted.
        apply: applied to a patch and its model after the blocks; does nothing where it does not fit.
    """

    sources: tuple[str, ...]
    apply: Callable[[Patch, Any], None]


@dataclass(frozen=True)
class Family:
    """A Diffusers model class.

    Attributes:
        model: ``module:name`` of the class.
        blocks: what is replaced in it.
        example: model -> keyword arguments of a small synthetic forward; ``None`` where nothing is known of it.
        switches: savings outside of the blocks.
        forwards: paths of the modules that a pipeline calls; empty for the model itself.
    """

    model: str
    blocks: tuple[Block, ...]
    example: Callable[[Any], dict[str, Any]] | None = None
    switches: tuple[Switch, ...] = ()
    forwards: tuple[str, ...] = ("",)


def families() -> tuple[Family, ...]:
    """All families of one model class each, imported here so that a family file can use this module."""
    from fastdiff.patching.families import (
        allegro,
        auraflow,
        autoencoders,
        chroma,
        cogvideox,
        cogview4,
        controlnets,
        cosmos,
        dit,
        flux,
        flux2,
        flux_kin,
        hidream,
        hunyuan_dit,
        hunyuan_video,
        latte,
        ltx,
        ltx2,
        lumina2,
        mochi,
        omnigen,
        pixart,
        qwenimage,
        sana,
        sd3,
        stable_audio,
        unet_2d,
        unet_2d_condition,
        unets_other,
        unets_video,
        video_autoencoders,
        wan,
        z_image,
    )

    return (
        unet_2d_condition.UNET_2D_CONDITION,
        unet_2d.UNET_2D,
        *unets_video.FAMILIES,
        *unets_other.FAMILIES,
        *controlnets.FAMILIES,
        *autoencoders.FAMILIES,
        *video_autoencoders.FAMILIES,
        dit.DIT,
        flux.FLUX,
        flux.FLUX_CONTROLNET,
        sd3.SD3,
        sd3.SD3_CONTROLNET,
        pixart.PIXART,
        *wan.FAMILIES,
        flux2.FLUX2,
        *flux_kin.FAMILIES,
        *qwenimage.FAMILIES,
        z_image.Z_IMAGE,
        ltx.LTX,
        ltx2.LTX2,
        *hunyuan_video.FAMILIES,
        cosmos.COSMOS,
        *cogvideox.FAMILIES,
        chroma.CHROMA,
        auraflow.AURA_FLOW,
        lumina2.LUMINA2,
        *sana.FAMILIES,
        latte.LATTE,
        stable_audio.STABLE_AUDIO,
        *cogview4.FAMILIES,
        hunyuan_dit.HUNYUAN_DIT,
        hunyuan_dit.HUNYUAN_DIT_CONTROLNET,
        mochi.MOCHI,
        hidream.HIDREAM,
        omnigen.OMNIGEN,
        allegro.ALLEGRO,
    )  # fmt: skip


@functools.cache
def any_model() -> Family:
    """Every other Diffusers model: whatever known blocks it is made of are replaced, the rest is left alone.

    A block's replacement relies on the classes and functions in its row, which the guard checks, and on nothing in
    the model around it. So a model without a family is patched as safely; only nothing is known of its inputs.
    """
    blocks = dict.fromkeys(block for family in families() for block in family.blocks)
    switches = dict.fromkeys(switch for family in families() for switch in family.switches)
    return Family("diffusers.models.modeling_utils:ModelMixin", tuple(blocks), switches=tuple(switches))


#: Model, as ``module:name`` -> blocks that users registered for it, by class, and an example.
_ADDED: dict[str, tuple[dict[str, Block], Callable[[Any], dict[str, Any]] | None]] = {}


def add_block(model: str, block: Block, example: Callable[[Any], dict[str, Any]] | None) -> None:
    """See :func:`fastdiff.patching.extending.register_block`."""
    blocks, earlier = _ADDED.setdefault(model, ({}, None))
    _ADDED[model] = ({**blocks, block.cls: block}, example or earlier)


def family_of(model: Any) -> Family | None:
    """The family of a model; ``None`` if it is neither a Diffusers model nor one with registered blocks."""
    if not isinstance(model, nn.Module):
        return None
    family = next((f for f in (*families(), any_model()) if base(type(model), f.model)), None)
    for name, (blocks, example) in _ADDED.items():
        if base(type(model), name):
            known = family or Family(model=name, blocks=())
            kept = tuple(block for block in known.blocks if block.cls not in blocks)
            family = replace(known, blocks=(*blocks.values(), *kept), example=example or known.example)
    return family


def example_of(model: Any) -> dict[str, Any]:
    """Keyword arguments of a small synthetic forward.

    Raises:
        ValueError: if nothing is known of the model's inputs, or not enough.
    """
    family = family_of(model)
    if family is None or family.example is None:
        raise ValueError(f"no synthetic inputs for {type(model).__name__}: pass the arguments of a forward")
    return family.example(model)


def all_sources() -> set[str]:
    """The names of all functions whose source the guard compares."""
    from fastdiff.schedulers.guidance import SOURCES

    return set(SOURCES) | {
        source
        for family in families()
        for names in ([b.all_sources() for b in family.blocks], [s.sources for s in family.switches])
        for group in names
        for source in group
    }

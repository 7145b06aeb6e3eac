"""Model families: which blocks are replaced in each, one file per family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdiff.patching._fingerprint import resolve
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
        example: model -> keyword arguments of a small synthetic forward.
        switches: savings outside of the blocks.
        forwards: paths of the modules that a pipeline calls; empty for the model itself.
    """

    model: str
    blocks: tuple[Block, ...]
    example: Callable[[Any], dict[str, Any]]
    switches: tuple[Switch, ...] = ()
    forwards: tuple[str, ...] = ("",)


def families() -> tuple[Family, ...]:
    """All families, imported here so that a family file can use this module."""
    from fastdiff.patching.families import autoencoder_kl, dit, unet_2d, unet_2d_condition

    return (
        unet_2d_condition.UNET_2D_CONDITION,
        unet_2d.UNET_2D,
        autoencoder_kl.AUTOENCODER_KL,
        dit.DIT,
    )  # fmt: skip


def family_of(model: Any) -> Family | None:
    """The family of a model, or ``None``."""
    if not isinstance(model, nn.Module):
        return None
    return next((f for f in families() if isinstance(model, resolve(f.model))), None)


def all_sources() -> set[str]:
    """The names of all functions whose source the guard compares."""
    return {
        source
        for family in families()
        for names in ([b.all_sources() for b in family.blocks], [s.sources for s in family.switches])
        for group in names
        for source in group
    }

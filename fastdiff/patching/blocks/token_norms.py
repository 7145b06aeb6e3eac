"""The norms over a token's features that transformers have, and what the fused ops need to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from torch import Tensor, nn

from fastdiff.ops import adaln_modulate, adaln_modulate_dual, gate_residual_adaln
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import is_unwatched, why_stock

#: Class -> whether it is an RMSNorm. A family's file may add a class of its own, with :func:`also_rms`.
_IS_RMS: dict[type[nn.Module], bool] = {
    nn.LayerNorm: False,
    FP32LayerNorm: False,
    nn.RMSNorm: True,
    RMSNorm: True,
    MochiRMSNorm: True,
}

#: Sources of the classes that are Diffusers' own, for the guard.
NORM_SOURCES = tuple(
    f"diffusers.models.normalization:{name}.forward" for name in ("FP32LayerNorm", "MochiRMSNorm", "RMSNorm")
)


def also_rms(*classes: type[nn.Module]) -> None:
    """Take modules of these classes for RMSNorms: with ``eps``, maybe ``weight``, and their input's dtype."""
    _IS_RMS.update(dict.fromkeys(classes, True))


def why_not_norms(x: Tensor, *norms: Any) -> str | None:
    """Why this call cannot do the work of ``norms``, those that are not ``None``, in a fused op, or ``None``."""
    reason = why_stock(x)
    if reason is not None:
        return reason
    for norm in norms:
        if norm is None:
            continue
        if type(norm) not in _IS_RMS:
            return f"a norm is a {type(norm).__name__}"
        if not is_unwatched(norm):
            return "a norm has hooks"
        weight = _own(norm, "weight")
        if weight is None:
            continue
        if weight.device != x.device:
            return f"a norm's weight is on {weight.device.type}"
        # Stock code then computes on in the wider type; these two norms give back their input's.
        if weight.dtype != x.dtype and type(norm) not in (FP32LayerNorm, MochiRMSNorm):
            return f"a norm's weight is {str(weight.dtype)[6:]}, its input {str(x.dtype)[6:]}"
    return None


def why_not_kinds(*norms: Any) -> str | None:
    """Why the structure is not covered: asked once, when patching."""
    for norm in norms:
        if norm is not None and type(norm) not in _IS_RMS:
            return f"a norm is a {type(norm).__name__}"
    return None


def is_rms(norm: Any) -> bool:
    """Whether it is an RMSNorm."""
    return _IS_RMS[type(norm)]


def parameters_of(norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias and epsilon."""
    eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
    return _own(norm, "weight"), _own(norm, "bias"), eps


def _own(norm: Any, name: str) -> Tensor | None:
    parameters = norm._parameters  # a tenth of the time of a module's getattr
    return parameters[name] if name in parameters else getattr(norm, name, None)


def modulated(
    site: Site, slot: str, norm: Any, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``."""
    return site.serve(slot, adaln_modulate, x, scale, shift, *parameters_of(norm, x), rms=is_rms(norm))


def modulated_twice(
    site: Site, slot: str, norm: Any, x: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``norm(x) * (1 + scale) + shift`` of two pairs of scale and shift."""
    return site.serve(slot, adaln_modulate_dual, x, *first, *second, *parameters_of(norm, x), rms=is_rms(norm))


def gated_then_modulated(
    site: Site,
    slot: str,
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    norm: Any,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = residual + gate * x`` (or ``residual + x``), and ``norm(y) * (1 + scale) + shift``."""
    if gate is None and (x.shape != residual.shape or x.dtype != residual.dtype):  # of somebody's own processor
        y = residual + x
        return y, norm(y) if scale is None and shift is None else modulated(site, slot, norm, y, scale, shift)
    return site.serve(
        slot, gate_residual_adaln, x, gate, residual, scale, shift, *parameters_of(norm, residual), rms=is_rms(norm)
    )  # fmt: skip

"""Tensors in the nested arguments and results of calls: found, widened to fp64, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: How far from fp64 a result may be, as a multiple of eager's distance.
FACTOR_HALF, FACTOR_FP32 = 1.05, 2.0


def relative(value: Tensor, target: Tensor) -> float:
    """Relative RMS difference; absolute where the target is zero."""
    distance, size = (value.double() - target).norm().item(), target.norm().item()
    return distance / size if size else distance


def limit_of(eager: float, rounded: float, count: int, dtype: torch.dtype) -> float:
    """The largest acceptable error.

    Args:
        eager: eager's relative RMS error.
        rounded: the error of the fp64 result, correctly rounded to ``dtype``.
        count: elements compared.
        dtype: of the result.

    Half precision: 1.05 times eager's error or 1.02 times that of one rounding, whichever is larger; fp32: twice
    either, or one unit in the last place, which is a matter of the order of additions. The RMS of a finite sample
    of errors is itself uncertain, by about 1 / sqrt(2 count) of its value; of the ratio of two, three standard
    deviations are added.
    """
    if dtype in (torch.float32, torch.float64):
        limit = max(FACTOR_FP32 * max(eager, rounded), torch.finfo(dtype).eps)
    else:
        limit = max(FACTOR_HALF * eager, 1.02 * rounded)
    return limit * (1 + 3 / max(count, 1) ** 0.5)


def tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {k: map_leaves(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([map_leaves(function, v) for v in value])
    return function(value)


def to_fp64(value: Any) -> Any:
    """Floating-point tensors and dtypes, in any nesting, as fp64."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.double() if leaf.is_floating_point() else leaf
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    return map_leaves(convert, value)


def clone_generators(value: Any) -> Any:
    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Generator):
            return leaf
        twin = torch.Generator(leaf.device)
        twin.set_state(leaf.get_state())
        return twin

    return map_leaves(clone, value)

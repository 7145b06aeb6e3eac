"""Tensors in the nested arguments and results of calls: found, widened to fp64, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def relative(value: Tensor, target: Tensor) -> float:
    """Relative RMS difference; absolute where the target is zero."""
    distance, size = (value.double() - target).norm().item(), target.norm().item()
    return distance / size if size else distance


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

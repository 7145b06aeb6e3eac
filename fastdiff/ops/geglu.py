"""The GEGLU activation in one pass."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op("(Tensor x) -> Tensor")
def geglu(x: Tensor) -> Tensor:
    """``hidden * gelu(gate)`` with ``hidden, gate = x.chunk(2, dim=-1)`` and the exact, erf GELU (Shazeer,
    "GLU Variants Improve Transformer", 2020; the activation of :class:`diffusers.models.activations.GEGLU`).

    Args:
        x: (..., 2 D).

    Returns:
        A contiguous tensor (..., D) of x's dtype.

    Raises:
        ValueError: if the last size is odd or x is not a floating-point tensor.
    """
    hidden, gate = x.chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).contiguous()


@geglu.check
def _check(x: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected floating point (..., 2 D)")


@geglu.fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

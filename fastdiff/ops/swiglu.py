"""The SwiGLU activation in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op("(Tensor gate, Tensor x) -> Tensor")
def swiglu(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) * x`` (Shazeer, "GLU Variants Improve Transformer", 2020).

    Args:
        gate, x: of one shape and dtype; the results of two projections, or the halves that ``chunk`` cuts from one.

    Returns:
        A contiguous tensor of that shape and dtype.

    Raises:
        ValueError: if the shapes or dtypes differ or are not floating point.
    """
    return (F.silu(gate) * x).contiguous()


@swiglu.check
def _check(gate: Tensor, x: Tensor) -> None:
    if gate.shape != x.shape or gate.dtype != x.dtype or not gate.is_floating_point():
        raise ValueError(
            f"gate is {gate.dtype} of shape {tuple(gate.shape)} and x {x.dtype} of shape {tuple(x.shape)}, expected "
            "one shape and one floating-point dtype"
        )


@swiglu.fake
def _fake(gate: Tensor, x: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

"""The backward of :mod:`fastdiff.ops.gate_residual`, as an op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op("(Tensor grad, Tensor x, Tensor gate) -> (Tensor, Tensor)")
def gate_residual_backward(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate * x``.

    Args:
        grad: of the result; x's shape and dtype.
        x: (B, S, D).
        gate: (B, D) or (1, D), contiguous, fp32 (fp64 for an fp64 x).

    Returns:
        The gradient of x, contiguous, and that of gate, (B, D) in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = (grad.to(wide) * gate[:, None]).to(x.dtype).contiguous()
    return dx, (grad.to(wide) * x).sum(1)


@gate_residual_backward.fake
def _fake(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2]), dtype=wide)

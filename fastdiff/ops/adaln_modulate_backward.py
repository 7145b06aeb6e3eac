"""The backward of :mod:`fastdiff.ops.adaln_modulate`, as an op."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op(
    "(Tensor grad, Tensor x, Tensor? factor, float eps, bool rms, Tensor? grad_x) -> (Tensor, Tensor, Tensor)"
)
def adaln_modulate_backward(
    grad: Tensor, x: Tensor, factor: Tensor | None, eps: float, rms: bool, grad_x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``norm(x) * factor + offset``, the norm being over the last axis.

    Args:
        grad: of the result; x's shape and dtype.
        x: (B, S, D).
        factor: (B, D) or (1, D), contiguous, fp32 (fp64 for an fp64 x); 1 if absent.
        eps, rms: as in the forward.
        grad_x: added to the gradient of x; x's shape and dtype.

    Returns:
        The gradient of x, contiguous, and those of factor and offset, (B, D) in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    result, grad, x = x.dtype, grad.to(wide), x.to(wide)
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = x * rstd
    dn = grad if factor is None else grad * factor[:, None]
    dx = dn - n * (dn * n).mean(-1, keepdim=True)
    if not rms:
        dx = dx - dn.mean(-1, keepdim=True)
    dx = dx * rstd
    if grad_x is not None:
        dx = dx + grad_x
    return dx.to(result).contiguous(), (grad * n).sum(1), grad.sum(1)


@adaln_modulate_backward.fake
def _fake(grad: Tensor, x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dfactor = x.new_empty((x.shape[0], x.shape[2]), dtype=wide)
    return x.new_empty(x.shape), dfactor, torch.empty_like(dfactor)

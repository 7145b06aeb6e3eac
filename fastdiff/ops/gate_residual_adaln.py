"""A gated residual followed by the next norm with modulation, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.adaln_modulate import adaln_gradients, adaln_modulate, check_norm
from fastdiff.ops.gate_residual import check_gated, gate_gradients, gate_residual


@fused_op(
    "(Tensor x, Tensor? gate, Tensor residual, Tensor? scale=None, Tensor? shift=None, Tensor? weight=None, "
    "Tensor? bias=None, float eps=1e-6, *, bool rms=False) -> (Tensor, Tensor)"
)
def gate_residual_adaln(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = residual + gate * x`` and ``norm(y) * (1 + scale) + shift``, the norm being of y as rounded.

    Args:
        x, gate, residual: as in :func:`gate_residual`; without a gate, ``y = residual + x``.
        scale, shift, weight, bias, eps, rms: as in :func:`adaln_modulate`.

    Returns:
        y and the modulated tensor, both contiguous, of x's shape and the residual's dtype.

    Raises:
        ValueError: if a shape or dtype is none of those.
    """
    if gate is None:
        y = (residual + x).to(residual.dtype).contiguous()
    else:
        y = gate_residual.eager(x, gate, residual)
    return y, adaln_modulate.eager(y, scale, shift, weight, bias, eps, rms=rms)


@gate_residual_adaln.check
def _check(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> None:
    check_gated(x, gate, residual)
    check_norm(x, scale, shift, weight, bias)


@gate_residual_adaln.fake
def _fake(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    return y, torch.empty_like(y)


@gate_residual_adaln.backward("gate", "scale", "weight", "bias", "output0", x="gate")
def _backward(
    needed: frozenset[str],
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor | None,
    gate: Tensor | None,
    residual: None,
    scale: Tensor | None,
    shift: None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    output0: Tensor,
) -> dict[str, Tensor]:
    grad_y, grad = grads
    if grad is None:
        assert grad_y is not None
        grad = torch.zeros_like(grad_y)
    found = adaln_gradients(grad, output0, scale, weight, bias, eps, rms, grad_y)
    return found | gate_gradients(needed, found["x"].reshape(output0.shape), x, gate)

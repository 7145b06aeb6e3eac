"""A gated branch added to its residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.adaln_modulate import align_modulation, as_row, as_samples, check_modulation
from fastdiff.ops.gate_residual_backward import gate_residual_backward


def check_gated(x: Tensor, gate: Tensor | None, residual: Tensor) -> None:
    """Raise ``ValueError`` for arguments that :func:`gate_residual` does not take."""
    full = x.shape
    if not full or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(full)}, expected floating point (..., D)")
    if residual.shape != full:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected x's {tuple(full)}")
    if not residual.is_floating_point():
        raise ValueError(f"residual is {residual.dtype}, expected floating point")
    if gate is not None:
        check_modulation("gate", gate.shape, full)


@fused_op("(Tensor x, Tensor gate, Tensor residual) -> Tensor")
def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """``residual + gate * x`` (the branches of DiT blocks).

    Args:
        x: (..., D), usually (B, S, D): the branch.
        gate: (B, D), (B, 1, D), (B, S, D) or (D,), as ``scale`` in :func:`adaln_modulate`.
        residual: of x's shape.

    Returns:
        A contiguous tensor of x's shape and the residual's dtype.

    Raises:
        ValueError: if a shape or dtype is none of the above.
    """
    y = residual + align_modulation(gate, x) * x
    return y.to(residual.dtype).contiguous()


gate_residual.check(check_gated)


@gate_residual.fake
def _fake(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=residual.dtype, device=x.device)


def gate_gradients(
    needed: frozenset[str], grad: Tensor, x: Tensor | None, gate: Tensor | None
) -> dict[str, Tensor]:
    """The gradients of :func:`gate_residual`; without a gate, of ``residual + x``, whose values it does not need."""
    found = {"residual": grad}
    if gate is None or x is None:
        found["x"] = grad
    elif needed & {"x", "gate"}:
        found["x"], found["gate"] = gate_residual_backward(as_samples(grad), as_samples(x), as_row(gate))
    return found


@gate_residual.backward("x", "gate")
def _backward(
    needed: frozenset[str], grads: tuple[Tensor], x: Tensor, gate: Tensor, residual: None
) -> dict[str, Tensor]:
    return gate_gradients(needed, grads[0], x, gate)

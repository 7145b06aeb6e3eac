"""A gated branch added to its residual."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends.triton._rows import NO_NORM, run_rows


def run(x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    y, _ = run_rows(x, gate, residual, (), None, None, 0.0, NO_NORM, residual.dtype)
    assert y is not None
    return y

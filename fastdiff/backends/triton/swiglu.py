"""SwiGLU: a product with a SiLU."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends.triton._gated import run_gated


def run(gate: Tensor, x: Tensor) -> Tensor:
    return run_gated(gate, x, swiglu=True)

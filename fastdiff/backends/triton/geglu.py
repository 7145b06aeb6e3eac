"""GEGLU: a product with an exact GELU."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends.triton._gated import run_gated


def run(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return run_gated(hidden, gate, swiglu=False)

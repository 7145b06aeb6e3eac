"""GEGLU: a product with an exact GELU."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends.triton._gated import run_gated


def run(x: Tensor) -> Tensor:
    return run_gated(x, silu=False)

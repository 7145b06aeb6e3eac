"""Inputs and judgements shared by the tests of the ops that work on rows (..., D)."""

from __future__ import annotations

from typing import Any

import torch
from numerics import run_kernel
from torch import Tensor

from fastdiff.ops._library import FusedOp

#: How a modulation tensor may come; see :func:`modulations`.
LAYOUTS = ("sample", "sample 3d", "token", "vector", "batch of one")


def rows(generator: torch.Generator, *shape: int, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) + offset).to(dtype)


def modulations(
    generator: torch.Generator, layout: str, count: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """``count`` slices of one projection, as ``chunk`` gives them (rows strided), for x of ``shape``."""
    batch, tokens, columns = shape
    sizes = {
        "sample": (batch,),
        "sample 3d": (batch, 1),
        "token": (batch, tokens),
        "vector": (),
        "batch of one": (1, 1),
    }
    projection = torch.randn(*sizes[layout], count * columns, generator=generator).to(dtype)
    return projection.chunk(count, dim=-1)


def assert_close_to_exact(op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> None:
    """Every element within its rounding and a few fp32 ulp of the tensor's largest, of the fp64 result."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    results = op.eager(*wide, **kwargs), run_kernel(op, *args, **kwargs)
    for exact, ours in zip(*((r if isinstance(r, tuple) else (r,)) for r in results), strict=True):
        assert ours.shape == exact.shape
        if not ours.numel():
            continue
        info = torch.finfo(ours.dtype)
        bound = 0.51 * info.eps * exact.abs() + 4e-6 * exact.abs().max() + info.smallest_normal * info.eps
        error = (ours.double() - exact).abs()
        assert (error <= bound).all(), f"error {(error / bound).max().item():.3g} times the bound"

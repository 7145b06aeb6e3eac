"""Outputs of 12 MiB, which CPU kernels may write past the caches (csrc/cpu/simd.h), and of rows where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modulation import assert_close_to_exact
from numerics import run_kernel
from torch import Tensor

from fastdiff.ops import (
    adaln_modulate,
    adaln_modulate_dual,
    gate_residual,
    gate_residual_adaln,
    geglu,
    gelu_tanh,
    group_norm_silu,
)

pytestmark = pytest.mark.kernel

SIZE = 12 << 20  # bytes
Make = Callable[..., Tensor]

CASES: dict[str, Callable[[Make, int, int], tuple[Any, ...]]] = {
    "adaln_modulate": lambda new, n, d: (adaln_modulate, new(1, n, d), new(1, d), new(1, d)),
    "adaln_modulate_dual": lambda new, n, d: (adaln_modulate_dual, new(1, n, d), *(new(1, d) for _ in range(4))),
    "gate_residual": lambda new, n, d: (gate_residual, new(1, n, d), new(1, d), new(1, n, d)),
    "geglu": lambda new, n, d: (geglu, new(n, 2 * d)),
    "gelu_tanh": lambda new, n, d: (gelu_tanh, new(n, d)),
    "group_norm_silu, NCHW": lambda new, n, d: (group_norm_silu, new(2, 32, n // 64, d), 4, new(32), new(32)),
    "group_norm_silu, NHWC": lambda new, n, d: (
        group_norm_silu, new(1, d, 32, n // 32).to(memory_format=torch.channels_last), 1, new(d), new(d),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1024, 1031])
@pytest.mark.parametrize("case", CASES)
def test_close_to_exact(case: str, columns: int, dtype: torch.dtype) -> None:
    op, *arguments = CASES[case](lambda *shape: torch.randn(shape).to(dtype), SIZE // 1024 // dtype.itemsize, columns)
    assert_close_to_exact(op, *arguments)


def test_of_two_results_one_is_read_again() -> None:
    x, residual = torch.randn(1, SIZE // 4096, 1024), torch.randn(1, SIZE // 4096, 1024)
    gate, scale, shift = torch.randn(3, 1, 1024).bfloat16().float()
    y, out = run_kernel(gate_residual_adaln, x, gate, residual, scale, shift)
    expected = gate_residual_adaln.eager(*(t.double() for t in (x, gate, residual, scale, shift)))
    for ours, exact in zip((y, out), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-5)

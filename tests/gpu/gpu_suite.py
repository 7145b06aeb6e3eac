"""What the tests on a GPU share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops._library import OPS

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "ops"))

from numerics import PRODUCT_ULPS  # noqa: E402

__all__ = ["NUMBERS", "TESTS", "assert_numerics_rule", "host_microseconds", "run_numbers", "tensors_of"]
#: The files of tests/ops about ops that have a GPU kernel.
NUMBERS = (
    "adaln_modulate",
    "adaln_modulate_dual",
    "attention",
    "cfg_combine",
    "gate_residual",
    "gelu",
    "group_norm_silu",
    "qk_norm_rope",
    "rms_norm_silu",
    "scheduler_step",
    "swiglu",
)


def run_numbers(name: str, backend: str, *selection: str) -> None:
    """The tests of an op's numbers, the same bodies as for the CPU kernels, on this GPU in a process of their own."""
    file = TESTS / "ops" / f"test_{name}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numerics", *selection, str(file)],
        env=os.environ | {"FASTDIFF_TEST_BACKEND": backend, "FASTDIFF_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


def tensors_of(result: Any) -> list[Tensor]:
    """An op's results, without those it was not asked for."""
    return [result] if isinstance(result, Tensor) else [t for t in result if t.numel()]


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_wide(v) for v in value)
    return {k: _wide(v) for k, v in value.items()} if isinstance(value, dict) else value


def assert_numerics_rule(
    name: str, ours: list[Tensor], eager: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Hold one call's results to the rule of tests/ops/numerics.py, against fp64 and against eager's error.

    One draw, where the rule pools ten: the tensors are large. What compares with eager, whose error is as random, gets
    three standard deviations of what chance does to a ratio of RMS errors. So does attention 2 %: torch's on a GPU
    rounds as often as ours. RMS errors of fp32 results may be one unit in the last place, too: the GPU's own exp2 and
    division are good to 2. For attention's see PRODUCT_ULPS.
    """
    exact = tensors_of(OPS[name].eager(*_wide(args), **_wide(kwargs)))
    if name == "gate_residual_adaln":  # its norm is of y as rounded
        exact[1] = ops.adaln_modulate.eager(ours[0].double(), *_wide(args[3:]), **_wide(kwargs))
    for i, (got, stock, want) in enumerate(zip(ours, eager, exact, strict=True)):
        assert got.dtype == stock.dtype and got.shape == stock.shape and got.stride() == stock.stride()
        assert want.norm() > 0, f"output {i} of {name} is all zero: nothing is tested"
        ours_, eager_, rounded = (
            ((t.double() - want).norm() / want.norm()).item() for t in (got, stock, want.to(got.dtype))
        )
        chance = 1 + 3 / got.numel() ** 0.5
        if got.dtype == torch.float32:
            ulps = PRODUCT_ULPS if name == "attention" else 1
            limit = max(2 * chance * eager_, 2 * rounded, ulps * torch.finfo(torch.float32).eps)
        else:
            limit = 1.02 * (max(chance * eager_, rounded) if name == "attention" else rounded)
        assert ours_ <= limit, (
            f"{name}, output {i}: relative RMS error {ours_:.4g} exceeds {limit:.4g} "
            f"(eager {eager_:.4g}, correctly rounded {rounded:.4g})"
        )


def host_microseconds(call: Callable[[], Any], batches: int = 10, count: int = 100) -> float:
    """Host time of one call, after a first: the best of some batches, as other processes come in between."""
    call()
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) * 1e6 / count)
    return min(times)

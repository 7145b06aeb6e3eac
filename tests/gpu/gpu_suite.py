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

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS / "ops"))

from numerics import PRODUCT_ULPS  # noqa: E402

__all__ = ["NUMBERS", "PRODUCT_ULPS", "TESTS", "host_microseconds", "run_numbers"]
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

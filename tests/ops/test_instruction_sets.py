"""The tests of numbers again where the kernels use the instruction sets below this CPU's, in a process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import _extension

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")
BEST = _extension.cpu_isa()
OPS = Path(__file__).parent
RERUNS = dict.fromkeys(ISAS[: ISAS.index(BEST)] if BEST in ISAS else (), OPS)
if BEST == "amx":  # the others' kernels with avx512_bf16 are those with amx
    RERUNS["avx512_bf16"] = OPS / "test_attention.py"


@pytest.mark.parametrize("isa", RERUNS)
def test_numbers(isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numerics", str(RERUNS[isa])],
        env=os.environ | {"FASTDIFF_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"on {isa}:\n{result.stdout[-6000:]}{result.stderr[-2000:]}"
    summary = result.stdout.splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary, result.stdout[-2000:]

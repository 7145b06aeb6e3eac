"""The CUDA kernels, emulated, through the tests of the ops: numerics, odd sizes, layouts, and any call at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from emulated import HERE

from fastdiff.backends import cuda

#: The test files of tests/ops that cover each op.
FILES = {
    "adaln_modulate": "adaln_modulate",
    "attention": "attention",
    "cfg_combine": "cfg_combine",
    "gate_residual": "gate_residual",
    "gate_residual_adaln": "gate_residual",
    "geglu": "gelu",
    "gelu_tanh": "gelu",
    "group_norm_silu": "group_norm_silu",
    "scheduler_step": "scheduler_step",
    "swiglu": "swiglu",
}
#: The tests of any call, and of sizes and layouts, that are not marked as numerics.
SHAPES = (
    "any_ or shapes or row_lengths or ranks or strided or memory_format or constant_group or tokens_are or fully_masked "
    "or lowest_float"
)
#: Attention takes half precision only, and many keys take long: one type of it must do.
NUMERICS = {"attention": "not float32 and not (float16 and (700 or 1000 or 2500))"}


def pytest_of(*arguments: str, **environment: str) -> str:
    """What pytest says in a process of its own, where the ``cuda`` backend is the emulation."""
    tests = HERE.parent
    path = [str(HERE.parents[1]), str(HERE), str(tests / "build"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "plugin", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "FASTDIFF_TEST_BACKEND": "cuda", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(set(FILES.values())))
def test_numbers(name: str) -> None:
    file = str(HERE.parent / "ops" / f"test_{name}.py")
    assert " passed" in pytest_of("-m", "numerics", "-k", NUMERICS.get(name, "test"), file)
    assert " passed" in pytest_of("-m", "not numerics", "-k", f"({SHAPES}) and ({NUMERICS.get(name, 'test')})", file)


def test_every_op_is_tested() -> None:
    assert set(FILES) == set(cuda.OPS)

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
    "adaln_modulate_dual": "adaln_modulate_dual",
    "attention": "attention",
    "cfg_combine": "cfg_combine",
    "gate_residual": "gate_residual",
    "gate_residual_adaln": "gate_residual",
    "geglu": "gelu",
    "gelu_tanh": "gelu",
    "group_norm_silu": "group_norm_silu",
    "qk_norm_rope": "qk_norm_rope",
    "rms_norm_silu": "rms_norm_silu",
    "scheduler_step": "scheduler_step",
    "swiglu": "swiglu",
}


#: What runs in one process: attention takes as long as all else.
PARTS = {"attention": {"attention"}, "others": set(FILES.values()) - {"attention"}}


@pytest.mark.parametrize("part", PARTS)
def test_numbers(part: str) -> None:
    """In a process of its own, where the ``cuda`` backend is the emulation; see plugin.py for which tests."""
    folders = [HERE.parents[1], HERE.parent, HERE, HERE.parent / "build"]
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    names = sorted(f"test_{name}.py" for name in PARTS[part])
    files = [str(HERE.parent / "ops" / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "FASTDIFF_TEST_BACKEND": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert all(f"ops/{name} ." in done.stdout for name in names), done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


def test_calls_for_the_sanitizers() -> None:
    """What tests/gpu runs under compute-sanitizer, with numbers, bounds, alignment and barriers checked here."""
    folders = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "build"), str(HERE.parent / "gpu")]
    code = "import emulated; emulated.load_ops(); import test_cuda_kernels; test_cuda_kernels.small_calls('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_op_is_tested() -> None:
    assert set(FILES) == set(cuda.OPS)

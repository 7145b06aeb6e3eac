"""Which GPUs an extension serves, what demands a backend for a whole process, and what info says about CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from source_tree import clean_environment, python

import fastdiff
from fastdiff import _extension
from fastdiff.backends import cuda

PACKAGE_IN = Path(fastdiff.__file__).parents[1]


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),  # a later minor runs the code of an earlier one
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_90a", "sm_120"], True),
        ((10, 0), ["sm_90a", "compute_90"], True),
        ((10, 3), ["sm_100"], True),
        ((8, 0), ["sm_90a", "compute_90"], False),
        ((10, 0), ["sm_90a", "compute_90a"], False),  # not even PTX of an "a" one serves another
        ((7, 5), ["sm_80", "sm_120", "compute_120"], False),
    ],
)
def test_architectures(capability: tuple[int, int], architectures: list[str], served: bool) -> None:
    reason = cuda.architecture_reason(capability, architectures)
    assert (reason is None) == served
    assert served or f"this GPU is sm_{capability[0]}{capability[1]}" in str(reason)


def test_refusals() -> None:
    """What only these kernels refuse; and what they take that is not usual: tests/cuda_emulation has its numbers."""
    refuse = cuda.refuse_table("cpu")
    x, q, keys = torch.zeros(2, 3, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 5, 1, 8)
    wide = torch.zeros(2, 2**23 + 8, dtype=torch.bool)[:, :5]
    assert refuse["adaln_modulate"](x[None, None, None]) == "x has 6 axes, more than 5"
    assert "8388616 elements apart" in str(refuse["attention"](q, keys, keys, wide))
    assert refuse["adaln_modulate"](torch.zeros(1, 20000)) is None
    assert refuse["gate_residual_adaln"](*[torch.zeros(1, 20000)] * 4) is None
    assert refuse["group_norm_silu"](torch.zeros(1, 32768, 3), 1) is None
    assert "32769 channels, more than 32768" in str(refuse["group_norm_silu"](torch.zeros(1, 32769, 3), 1))
    many = q[:, :1].expand(1, 2**30 + 1, 1, 8)
    for arguments in ((many, keys, keys), (q, many, many)):
        assert "1073741825 queries or keys, more than 2^30" in str(refuse["attention"](*arguments))
    deep = torch.zeros(1, 2, 1, 16400)
    for across in (False, True):
        assert "over 16400 elements, more than 16384" in str(refuse["qk_norm_rope"](deep, deep, across_heads=across))
    heads = torch.zeros(1, 2, 130, 128)
    assert "over 16640 elements" in str(refuse["qk_norm_rope"](heads, heads, across_heads=True))
    assert refuse["qk_norm_rope"](heads, heads) is None
    for mask in (torch.zeros(2, 1), torch.zeros(5, 2, dtype=torch.bool).mT):
        assert refuse["attention"](q, keys, keys, mask) is None
    for dtype in (torch.float64, torch.bfloat16):
        assert refuse["qk_norm_rope"](q, q, cos=torch.zeros(2, 4, 2, dtype=dtype)) is None


@pytest.mark.skipif(_extension.module is None, reason=_extension.error)
def test_reason_without_cuda() -> None:
    backend = next(b for b in fastdiff.info().backends if b.name == "cuda")
    if backend.available:
        assert cuda.why_not() is None
        assert "sm_" in backend.detail
    else:
        assert backend.reason
        built = _extension.build_info()["cuda"]["built"]
        assert built or "pip install" in backend.command


def test_backend_of_the_environment() -> None:
    code = (
        "import torch, fastdiff; c = fastdiff.ops.gelu_tanh.choose(torch.ones(4)); print(c.backend, c.reason, sep='|')"
    )
    assert python(code, PACKAGE_IN, FASTDIFF_BACKEND="eager").strip() == "eager|FASTDIFF_BACKEND is 'eager'"
    demanded = python(f"{code}\nwith fastdiff.use_backend('eager'): pass\n{code}", PACKAGE_IN, FASTDIFF_BACKEND="cuda")
    first, second = demanded.split("\n")[:2]
    assert first == second
    assert first.startswith("eager|cuda: ")


def test_unknown_backend_of_the_environment() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fastdiff"],
        env=clean_environment(PYTHONPATH=str(PACKAGE_IN), FASTDIFF_BACKEND="cudo"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FASTDIFF_BACKEND is 'cudo'; expected one of cuda, triton, cpu, eager" in done.stderr

"""Shared by all tests: markers, seeding, and the skip of kernel tests where no kernel can run."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from fastdiff import _extension
from fastdiff.backends import triton

# torch.compile's cache does not know what CPU or ATEN_CPU_CAPABILITY an entry was made for: one left by another
# run can give wrong numbers or crash.
_inductor_cache = tempfile.TemporaryDirectory(prefix="fastdiff-inductor-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor_cache.name)
# What was tuned and measured on this machine is not under test.
_measurements = tempfile.TemporaryDirectory(prefix="fastdiff-cache-")
os.environ["FASTDIFF_CACHE"] = _measurements.name

#: Folders whose tests assert what the kernels serve.
_ABOUT_KERNELS = ("demo", "patching")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: needs the compiled CPU kernels")
    config.addinivalue_line(
        "markers", "numerics: judges a kernel's numbers; rerun for every instruction set and backend"
    )
    config.addinivalue_line("markers", "smoke: asked of every model also with another Diffusers than the newest")
    config.addinivalue_line("markers", "interpreted: needs Triton's interpreter; see make test-triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_cpu = _extension.why_not_cpu()
    no_triton = triton.why_not() if triton.INTERPRETED else "runs under TRITON_INTERPRET=1 (make test-triton)"
    of_triton = os.environ.get("FASTDIFF_TEST_BACKEND") == "triton"
    reasons = {"kernel": no_cpu, "numerics": triton.why_not() if of_triton else no_cpu, "interpreted": no_triton}
    for item in items:
        marked = [reason for marker, reason in reasons.items() if item.get_closest_marker(marker)]
        if item.path.parent.name in _ABOUT_KERNELS:
            marked.append(no_cpu)
        for reason in filter(None, marked):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Shared by all tests: markers, seeding, and the skip of kernel tests where no kernel can run."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from fastdiff import _extension

# torch.compile's cache does not know what CPU or ATEN_CPU_CAPABILITY an entry was made for: one left by another
# run can give wrong numbers or crash.
_inductor_cache = tempfile.TemporaryDirectory(prefix="fastdiff-inductor-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor_cache.name)

#: Folders whose tests assert what the kernels serve.
_ABOUT_KERNELS = ("demo", "patching")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: needs the compiled CPU kernels")
    config.addinivalue_line("markers", "numerics: judges a kernel's numbers; rerun for every instruction set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _extension.why_not_cpu()
    if reason is None:
        return
    for item in items:
        whole = item.path.parent.name in _ABOUT_KERNELS
        if whole or item.get_closest_marker("kernel") or item.get_closest_marker("numerics"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""The emulation needs a C++ compiler; what finds one lies with the tests of the build."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "build"))

from source_tree import ROOT, load_build  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (ROOT / "setup.py").is_file():
        reason = "needs the source tree"
    elif sys.platform != "linux":
        reason = "the emulation is for Linux"
    else:
        _, toolchain = load_build(ROOT)
        try:
            toolchain.find_cxx()
            toolchain.find_torch()
            return
        except toolchain.Skip as skip:
            reason = skip.reason
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))

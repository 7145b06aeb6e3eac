"""What ``make`` takes for a reason to install again."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from source_tree import ROOT, needs_sources

pytestmark = [needs_sources, pytest.mark.skipif(not shutil.which("make"), reason="there is no make")]


def test_sources_are_what_the_extension_is_built_from() -> None:
    """All of it, headers too, and nothing that using it writes, or each run of the tests would build it again."""
    command = ["make", "-s", "-f", "-", "list"]
    text = "include Makefile\nlist:\n\t@echo $(SOURCES)\n"
    found = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout.split()
    endings = {".py", ".cpp", ".h", ".cu", ".cuh"}
    assert {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in endings} == set(found) - {
        "setup.py",
        "pyproject.toml",
    }

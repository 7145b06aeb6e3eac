"""A copy of the source tree to build from, and commands run in clean processes."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without the build's switches, plus ``changes``."""
    switches = ("FASTDIFF_", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "CXXFLAGS", "LDFLAGS", "MAX_JOBS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    return {**kept, **changes}


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command and capture both streams in ``stdout``."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )


def python(code: str, package_in: Path, **changes: str) -> str:
    """What ``code`` prints in a fresh interpreter that finds ``fastdiff`` in the folder ``package_in``."""
    path = os.pathsep.join(filter(None, (str(package_in), os.environ.get("PYTHONPATH", ""))))
    done = run(sys.executable, "-c", code, cwd=package_in, **{"PYTHONPATH": path, **changes})
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_tree(target: Path) -> Path:
    """Copy what the distribution consists of, without anything built."""
    target.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, target / name)
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__", "model")
    for name in ("csrc", "fastdiff"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    return target


def load_build(tree: Path) -> tuple[ModuleType, ModuleType]:
    """The modules ``csrc.build`` and ``csrc.toolchain`` of a tree."""
    for name in ("csrc", "csrc.build", "csrc.toolchain"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(tree))
    try:
        return importlib.import_module("csrc.build"), importlib.import_module("csrc.toolchain")
    finally:
        sys.path.remove(str(tree))

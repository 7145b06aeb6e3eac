"""Measurements that need a process of their own: start-up and peak memory. A child prints one line of JSON last.

Imports nothing that costs: the child's own imports are part of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class ChildFailed(RuntimeError):
    """A child process ended without a result."""


def run_child(script: str, arguments: Sequence[str], timeout_s: float = 900.0) -> dict[str, Any]:
    """Run ``benchmarks/<script> --child ...`` in a new process with empty compilers' caches; returns its result.

    Raises:
        ChildFailed: with the last lines of its errors.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--child", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"not done after {timeout_s:.0f} s") from None
    if done.returncode != 0 or not done.stdout.strip():
        lines = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ChildFailed(lines[0])
    return json.loads(done.stdout.strip().splitlines()[-1])


def patch_options(side: str) -> dict[str, Any]:
    """The options of ``patch`` that a side stands for."""
    backend, _, extra = side.removeprefix("fastdiff").partition(", ")
    named = {"packed weights": {"prepack_weights": True}, "CUDA graphs": {"cuda_graphs": True}}
    return ({"backend": backend.strip()} if backend else {}) | named.get(extra, {})

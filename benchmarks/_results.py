"""Result files: what a row is, where it was measured, and how files are read and written.

A file holds sections (``kernels``, ``models``, ...); a section holds its rows, and the environments they were measured
in, so that rows of different runs keep their own::

    {"kernels": {"environments": [{...}, ...], "rows": [{"environment": 0, "name": ..., "timings": [...]}, ...]}}
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: What a measurement depends on; an edit of anything else leaves rows valid.
SOURCES = ("fastdiff/**/*.py", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.h", "csrc/**/*.cuh", "benchmarks/*.py")

RowKey = tuple[str, str, str]


@dataclass
class Timing:
    """One provider's times for one case.

    Attributes:
        ratio: baseline time / this time, the median over rounds, with its 95 % interval.
        low_ms, high_ms: the interval of the median time.
    """

    provider: str
    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    low_ms: float = 0.0
    high_ms: float = 0.0


@dataclass
class Row:
    """One benchmarked case.

    Attributes:
        floor_ms: the time that bytes at the measured copy bandwidth, or FLOPs at the measured matmul rate, take.
        target: the ratio that this project set itself.
        extra: what else the section's table shows; ``extra["left_out"]`` says of providers why they have no timing.
    """

    name: str
    dtype: str
    allocator: str
    timings: list[Timing]
    bytes_moved: int = 0
    flops: int = 0
    floor_ms: float = 0.0
    target: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def key_of(row: dict[str, Any]) -> RowKey:
    """What identifies a row within its section."""
    return row["name"], row["dtype"], row["allocator"]


@functools.cache
def source_digest(root: Path = HERE.parent, patterns: tuple[str, ...] = SOURCES) -> str:
    """A digest of the code that a measurement depends on: it changes with it, committed or not."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _commit() -> str:
    """The commit, marked if the code differs from it; results may differ, they do when rows are saved."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=HERE.parent)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "fastdiff/*.py", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import fastdiff
    from fastdiff import _extension
    from fastdiff.backends import losses

    cpu = platform.processor()
    flags: list[str] = []
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text()
        cpu = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        words = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in words]
    return {
        "kind": losses.kind(torch.device(device)),
        "cpu": cpu,
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "fastdiff_isa": _extension.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "source": source_digest(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def load(path: Path) -> dict[str, Any]:
    """The sections of a result file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the file at once, so that an interrupted run leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(data, indent=1) + "\n")
    scratch.replace(path)


def rows_of(section: dict[str, Any]) -> list[dict[str, Any]]:
    """A section's rows, each with its environment in place of the number."""
    return [row | {"environment": section["environments"][row["environment"]]} for row in section["rows"]]


def save(section: str, rows: list[Row], path: Path, where: dict[str, Any] | None = None) -> None:
    """Put rows into a section of a result file, in place of those of the same key; the others stay.

    Args:
        where: the environment of these rows; this process's on a CPU by default.
    """
    data = load(path)
    fresh = [json.loads(json.dumps(asdict(row))) | {"environment": where or environment()} for row in rows]
    of_key = {key_of(row): row for row in (*rows_of(data.get(section, {"environments": [], "rows": []})), *fresh)}
    data[section] = _numbered(list(of_key.values()))
    write(path, data)


def _numbered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A section of rows with their environments: each environment once, those without rows dropped."""
    environments: list[dict[str, Any]] = []
    numbered = []
    for row in rows:
        if row["environment"] not in environments:
            environments.append(row["environment"])
        numbered.append(row | {"environment": environments.index(row["environment"])})
    return {"environments": environments, "rows": numbered}


def rows_here(path: Path, where: dict[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """By section, the rows that this code has measured, on this device and with this torch; and how many others are."""
    same = ("source", "kind", "cpu", "gpu", "threads", "torch")
    found: dict[str, list[dict[str, Any]]] = {}
    others = 0
    for section, body in load(path).items():
        rows = rows_of(body)
        found[section] = [row for row in rows if all(row["environment"].get(k) == where[k] for k in same)]
        others += len(rows) - len(found[section])
    return found, others


def measured_keys(path: Path, section: str, where: dict[str, Any], providers: Iterable[str] = ()) -> set[RowKey]:
    """The rows of a section that need no measuring: see :func:`rows_here`.

    Args:
        providers: a row without one of these, or the reason why it is left out, is not done.
    """

    def has(row: dict[str, Any]) -> set[str]:
        extra = row["extra"]
        return {t["provider"] for t in row["timings"]}.union(extra.get("bytes", ()), extra.get("left_out", ()))

    return {key_of(row) for row in rows_here(path, where)[0].get(section, ()) if has(row) >= set(providers)}


def result_file(name: str | None, device: str = "cpu") -> Path:
    """``results/<name>.json``; made from the GPU's name, or the CPU's features, unless given."""
    if name is None and device == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    elif name is None:
        env = environment()
        best = "amx" if "amx_bf16" in env["cpu_flags"] else (env["cpu_flags"] or ["generic"])[-1]
        name = f"cpu-{best}-{env['threads']}threads"
    return RESULTS / f"{name}.json"

"""Timing that a sceptic can repeat: interleaved rounds, medians with an interval, ratios within one run.

Providers of one case (eager, ours, torch.compile, ...) are timed in turns, in a random order each round, so that
a slow moment of the machine hits all of them. A ratio is the median over rounds of eager / provider, with the
95 % interval of that median from order statistics.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass
class Timing:
    """One provider's times for one case. ``ratio`` is baseline time / this time."""

    provider: str
    median_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


@dataclass
class Row:
    """One benchmarked case."""

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


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % confidence interval by order statistics (binomial, normal approximation)."""
    ordered = sorted(values)
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half) - 1)
    return statistics.median(ordered), ordered[low], ordered[high]


def compare(
    providers: dict[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    min_sample_s: float = 0.004,
    warmup: int = 2,
    before: dict[str, Callable[[], Any]] | None = None,
) -> list[Timing]:
    """Time the providers in turns. The first one is the baseline of the ratios.

    Args:
        providers: name -> function of no arguments; its result is dropped at once.
        rounds: how many times each provider is sampled.
        min_sample_s: a sample repeats a short function until it lasts this long.
        warmup: calls before timing.
        before: name -> untimed preparation run before each sample of that provider.
    """
    before = before or {}
    nothing = lambda: None  # noqa: E731
    repeats: dict[str, int] = {}
    for name, function in providers.items():
        before.get(name, nothing)()
        for _ in range(warmup):
            function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(min_sample_s / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            before.get(name, nothing)()
            function = providers[name]
            count = repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            samples[name].append((time.perf_counter() - start) / count * 1e3)
    baseline = samples[next(iter(providers))]
    timings = []
    for name, times in samples.items():
        ratio, low, high = median_interval([b / t for b, t in zip(baseline, times, strict=True)])
        timings.append(Timing(name, statistics.median(times), ratio, low, high, rounds))
    return timings


def copy_bandwidth(size_bytes: int) -> float:
    """Bytes per second of ``copy_`` between two resident buffers of ``size_bytes`` (read plus write)."""
    source = torch.ones(max(size_bytes // 4, 1024))
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, rounds=9)[0]
    return 2 * source.numel() * 4 / (timing.median_ms / 1e3)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 1024 x 1024 matrix product, the machine's practical ceiling for attention."""
    a = torch.randn(1024, 1024).to(dtype)
    timing = compare({"matmul": lambda: a @ a}, rounds=9)[0]
    return 2 * 1024**3 / (timing.median_ms / 1e3)


def environment() -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import fastdiff
    from fastdiff import _extension

    cpu = platform.processor()
    flags: list[str] = []
    if os.path.exists("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text()
        cpu = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        words = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
        flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in words]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=RESULTS.parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "cpu": cpu,
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "fastdiff_isa": _extension.cpu_isa(),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(section: str, rows: list[Row], path: Path) -> None:
    """Replace ``section`` of the device's result file; rows of other runs of the section stay if not re-measured."""
    path.parent.mkdir(exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {}
    kept = data.get(section, {}).get("rows", [])
    fresh = [asdict(row) for row in rows]
    done = {(r["name"], r["dtype"], r["allocator"]) for r in fresh}
    kept = [r for r in kept if (r["name"], r["dtype"], r["allocator"]) not in done]
    data[section] = {"environment": environment(), "rows": kept + fresh}
    path.write_text(json.dumps(data, indent=1) + "\n")


def result_file(device: str | None) -> Path:
    """``results/<device>.json``; the device's name is made from the CPU's features unless given."""
    if device is None:
        env = environment()
        best = "amx" if "amx_bf16" in env["cpu_flags"] else (env["cpu_flags"] or ["generic"])[-1]
        device = f"cpu-{best}-{env['threads']}threads"
    return RESULTS / f"{device}.json"

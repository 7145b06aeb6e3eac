"""Timing that a sceptic can repeat: interleaved rounds, medians with an interval, ratios within one run.

Providers of one case (eager, ours, torch.compile, ...) are timed in turns, in a random order each round, so that
a slow moment of the machine hits all of them. A ratio is the median over rounds of eager / provider, with the
95 % interval of that median from order statistics.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import random
import re
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
    sample: Callable[[Callable[[], Any], int], float] | None = None,
) -> list[Timing]:
    """Time the providers in turns. The first one is the baseline of the ratios.

    Args:
        providers: name -> function of no arguments; its result is dropped at once.
        rounds: how many times each provider is sampled.
        min_sample_s: a sample repeats a short function until it lasts this long.
        warmup: calls before timing.
        before: name -> untimed preparation run before each sample of that provider.
        sample: (function, count) -> seconds per call; the host's clock by default, :func:`gpu_sample` for a GPU.
    """
    sample = sample or host_sample
    before = before or {}
    nothing = lambda: None  # noqa: E731
    repeats: dict[str, int] = {}
    for name, function in providers.items():
        before.get(name, nothing)()
        for _ in range(warmup):
            function()
        repeats[name] = max(1, round(min_sample_s / max(sample(function, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            before.get(name, nothing)()
            samples[name].append(sample(providers[name], repeats[name]) * 1e3)
    baseline = samples[next(iter(providers))]
    timings = []
    for name, times in samples.items():
        ratio, low, high = median_interval([b / t for b, t in zip(baseline, times, strict=True)])
        timings.append(Timing(name, statistics.median(times), ratio, low, high, rounds))
    return timings


def host_sample(function: Callable[[], Any], count: int) -> float:
    """Seconds per call by the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def gpu_sample(function: Callable[[], Any], count: int) -> float:
    """Seconds per call by the GPU's own clock, its cache flushed before each, as another layer's data would.

    The flush also keeps the GPU busy while the host prepares the call, so that host time is not measured.
    """
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    count = min(count, 50)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


SAMPLES = {"cpu": host_sample, "cuda": gpu_sample}


def copy_bandwidth(size_bytes: int, device: str = "cpu") -> float:
    """Bytes per second of ``copy_`` between two resident buffers of ``size_bytes`` (read plus write)."""
    source = torch.ones(max(size_bytes // 4, 1024), device=device)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, rounds=9, sample=SAMPLES[device])[0]
    return 2 * source.numel() * 4 / (timing.median_ms / 1e3)


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of a square matrix product, the machine's practical ceiling for attention."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    timing = compare({"matmul": lambda: a @ a}, rounds=9, sample=SAMPLES[device])[0]
    return 2 * size**3 / (timing.median_ms / 1e3)


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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


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


def result_file(name: str | None, device: str = "cpu") -> Path:
    """``results/<name>.json``; made from the GPU's name, or the CPU's features, unless given."""
    if name is None and device == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    elif name is None:
        env = environment()
        best = "amx" if "amx_bf16" in env["cpu_flags"] else (env["cpu_flags"] or ["generic"])[-1]
        name = f"cpu-{best}-{env['threads']}threads"
    return RESULTS / f"{name}.json"

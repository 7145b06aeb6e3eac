"""Timing that a sceptic can repeat: interleaved rounds, medians with an interval, ratios within one run.

Providers of one case (eager, ours, torch.compile, ...) are timed in turns, in a random order each round, so that
a slow moment of the machine hits all of them. A ratio is the median over rounds of eager / provider, with the
interval of that median from order statistics. Inputs come from a ring of copies larger than the caches, as another
layer's data would drive them out. Clocks are left alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import Timing
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Sample = Callable[[Callable[[], Any], int], float]
#: With fewer rounds a median says little.
LEAST_ROUNDS = 3


def interval_ranks(n: int) -> tuple[int, int]:
    """The ranks, from 0, between which the median of a population lies with 95 % confidence, given n ordered samples.

    The number of samples below the median is binomial with p = 1/2, whatever the distribution (e.g. David and Nagaraja,
    "Order Statistics", 2003, 7.1). Fewer than 6 samples cannot give 95 %: then all of them, 94 % for 5, 75 % for 3.
    """
    low, below = 0, 1 / 2**n  # P(at most `low` samples are below the median)
    while low + 1 < n / 2:
        following = below + math.comb(n, low + 1) / 2**n
        if following > 0.025:
            break
        low, below = low + 1, following
    return low, n - 1 - low


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the 95 % confidence interval of it (:func:`interval_ranks`)."""
    ordered = sorted(values)
    low, high = interval_ranks(len(ordered))
    return statistics.median(ordered), ordered[low], ordered[high]


def compare(
    providers: dict[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    min_sample_s: float = 0.004,
    warmup: int = 2,
    before: dict[str, Callable[[], Any]] | None = None,
    sample: Sample | None = None,
    limit_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time the providers in turns. The first one is the baseline of the ratios.

    Args:
        providers: name -> function of no arguments; its result is dropped at once.
        rounds: how many times each provider is sampled.
        min_sample_s: a sample repeats a short function until it lasts this long.
        warmup: calls before timing.
        before: name -> untimed preparation run before each sample of that provider.
        sample: (function, count) -> seconds per call; the host's clock by default.
        limit_s: fewer rounds, but at least :data:`LEAST_ROUNDS`, where they would take longer than this, going by the
            first sample of each provider and what prepares it.
        clock: seconds, for the limit.
    """
    sample = sample or host_sample
    before = before or {}
    nothing = lambda: None  # noqa: E731
    repeats: dict[str, int] = {}
    round_s = 0.0
    for name, function in providers.items():
        start = clock()
        before.get(name, nothing)()
        prepared = clock() - start
        for _ in range(warmup):
            function()
        once = max(sample(function, 1), 1e-7)
        repeats[name] = max(1, round(min_sample_s / once))
        round_s += prepared + once * repeats[name]
    if limit_s is not None:
        rounds = min(rounds, max(LEAST_ROUNDS, int(limit_s / round_s)))
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
        median, fastest, slowest = median_interval(times)
        timings.append(Timing(name, median, ratio, low, high, rounds, fastest, slowest))
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


def gpu_wall_sample(function: Callable[[], Any], count: int) -> float:
    """Seconds per call by the host's clock until the GPU is done: host time counts, as in a generation."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


#: How a single kernel is timed, and how a whole model.
KERNEL_SAMPLES: dict[str, Sample] = {"cpu": host_sample, "cuda": gpu_sample}
MODEL_SAMPLES: dict[str, Sample] = {"cpu": host_sample, "cuda": gpu_wall_sample}


@functools.cache
def cache_bytes(device: str) -> int:
    """The size of the last cache before memory; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


def size_bytes(values: Any) -> int:
    """Bytes of the tensors among the values, their broadcast axes counted once."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return sum(
        math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s or n == 1) * t.element_size()
        for t in tensors
    )


def to_device(value: Any, device: str) -> Any:
    """A copy of an argument on the device, with its strides and offset, as chunks have them."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    memory = torch.empty_like(memory, device=device).copy_(memory)
    return torch.as_strided(memory, value.shape, value.stride(), value.storage_offset())


def ring(arguments: tuple[Any, ...], device: str, cache: int) -> list[tuple[Any, ...]]:
    """Copies of the arguments on the device: at least two, and twice the cache together, but 256 at most."""
    count = min(256, max(2, math.ceil(2 * cache / max(size_bytes(arguments), 1))))
    return [tuple(to_device(a, device) for a in arguments) for _ in range(count)]


def rotating(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """The function of no arguments that calls ``function`` with each of the arguments in turn."""
    following = itertools.cycle(arguments).__next__
    return lambda: function(*following())


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second of ``copy_`` between buffers larger than the caches (read plus write)."""
    source = torch.ones(max(16 << 20, min(4 * cache_bytes(device), 1 << 30)) // 4, device=device)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, rounds=9, sample=KERNEL_SAMPLES[device])[0]
    return 2 * source.numel() * 4 / (timing.median_ms / 1e3)


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of a square matrix product, the machine's practical ceiling for what is bound by arithmetic."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    timing = compare({"matmul": lambda: a @ a}, rounds=9, sample=KERNEL_SAMPLES[device])[0]
    return 2 * size**3 / (timing.median_ms / 1e3)


class Rates:
    """What this machine reached in this run: copy bandwidth, and FLOP/s by dtype; each measured when first asked."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._rates: dict[str, float] = {}

    def bandwidth(self) -> float:
        """Bytes per second."""
        if "copy" not in self._rates:
            self._rates["copy"] = copy_bandwidth(self.device)
        return self._rates["copy"]

    def flops(self, dtype_name: str) -> float:
        """FLOP/s."""
        if dtype_name not in self._rates:
            self._rates[dtype_name] = matmul_rate(DTYPES[dtype_name], self.device)
        return self._rates[dtype_name]

    def floor_ms(self, moved: int, flops: int, dtype_name: str) -> float:
        """The roofline: the longer of what the bytes and what the FLOPs take."""
        arithmetic = flops / self.flops(dtype_name) if flops else 0.0
        return 1e3 * max(moved / self.bandwidth(), arithmetic)

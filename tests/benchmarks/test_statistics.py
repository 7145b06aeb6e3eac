"""The statistics behind the benchmarks: intervals, interleaving, rotation of inputs."""

from __future__ import annotations

import itertools
import math
import random

import _harness
import pytest
import torch
from _harness import compare, interval_ranks, median_interval, ring, rotating, size_bytes, to_device


def _coverage(n: int, low: int, high: int) -> float:
    """P(x_low <= median <= x_high) of n samples: the number below the median is binomial."""
    return sum(math.comb(n, k) for k in range(low + 1, high + 1)) / 2**n


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 9, 15, 16, 31, 100])
def test_interval_is_the_narrowest_with_its_confidence(n: int) -> None:
    low, high = interval_ranks(n)
    assert low + high == n - 1 and 0 <= low <= high
    if n >= 6:
        assert _coverage(n, low, high) >= 0.95
        assert _coverage(n, low + 1, high - 1) < 0.95
    else:
        assert low == 0


def test_interval_covers_a_skewed_median() -> None:
    """Drawn from an exponential distribution, whose median is log 2."""
    draw, hits = random.Random(0), 0
    for _ in range(2000):
        _, low, high = median_interval([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= math.log(2) <= high
    assert 0.95 < hits / 2000 < 0.985  # 0.965 by the formula


def test_compare_takes_turns_and_measures_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every provider once per round, prepared before each sample; a drift common to both leaves the ratio alone."""
    calls: list[str] = []
    speed = {"eager": 4.0, "fast": 1.0}
    drift = itertools.count(1)

    def sample(function: object, count: int) -> float:
        name = function.__name__  # type: ignore[attr-defined]
        calls.append(name)
        return speed[name] * (1.0 if len(calls) <= 2 else 1 + ((next(drift) - 1) // 2) % 5)

    def eager() -> None: ...
    def fast() -> None: ...

    prepared: list[str] = []
    first, second = compare(
        {"eager": eager, "fast": fast}, rounds=9, sample=sample, before={"fast": lambda: prepared.append("fast")}
    )
    assert (first.provider, first.ratio, second.ratio) == ("eager", 1.0, 4.0)
    assert second.ratio_low == second.ratio_high == 4.0
    assert second.low_ms < second.median_ms < second.high_ms
    rounds = [calls[2 + 2 * i : 4 + 2 * i] for i in range(9)]
    assert all(sorted(pair) == ["eager", "fast"] for pair in rounds)
    assert len({tuple(pair) for pair in rounds}) == 2  # in changing order
    assert len(prepared) == 1 + 9


def test_inputs_rotate_past_the_cache() -> None:
    base = torch.randn(4, 6, 8)
    arguments = (base[:, 2], base.transpose(0, 1), 3, None)
    copies = ring(arguments, "cpu", cache=8 * size_bytes(arguments))
    assert len(copies) == 16
    for copy in copies:
        assert copy[0].stride() == arguments[0].stride() and copy[1].stride() == arguments[1].stride()
        assert torch.equal(copy[0], arguments[0]) and torch.equal(copy[1], arguments[1]) and copy[2:] == (3, None)
    assert len({copy[0].data_ptr() for copy in copies}) == 16
    assert len(ring(arguments, "cpu", cache=0)) == 2 and len(ring((3,), "cpu", cache=1 << 30)) == 256
    seen = []
    call = rotating(lambda x, *_: seen.append(x.data_ptr()), copies)
    for _ in range(32):
        call()
    assert len(set(seen)) == 16 and seen[:16] == seen[16:]


def test_sizes_count_broadcast_axes_once() -> None:
    assert size_bytes((torch.zeros(3, 1).expand(3, 5), torch.zeros(2, 2).bfloat16(), None, 1.0)) == 3 * 4 + 4 * 2
    wide = to_device(torch.arange(24.0).view(2, 3, 4)[:, 1:, ::2], "cpu")
    assert wide.stride() == (12, 4, 2) and wide.storage_offset() == 4


def test_floor_is_the_longer_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(_harness, "matmul_rate", lambda dtype, device: 1e12)
    rates = _harness.Rates("cpu")
    assert rates.floor_ms(2_000_000, 0, "fp32") == pytest.approx(2.0)
    assert rates.floor_ms(2_000_000, 5 * 10**9, "fp32") == pytest.approx(5.0)


def test_long_rounds_are_fewer() -> None:
    """But three at least; what prepares a sample counts."""
    now = [0.0]

    def sample(function: object, count: int) -> float:
        now[0] += 2.0
        return 2.0

    def wait() -> None:
        now[0] += 8.0

    def rounds(limit_s: float | None) -> int:
        timing = compare({"a": wait}, rounds=9, warmup=0, before={"a": wait}, sample=sample, limit_s=limit_s,
                         clock=lambda: now[0])[0]  # fmt: skip
        return timing.rounds

    assert [rounds(limit) for limit in (None, 1000.0, 55.0, 1.0)] == [9, 9, 5, 3]

"""Copies, pickles, threads, restore: a patched scheduler as an object."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import compare, count_bound, every_sampler
from trajectory import SHAPE, Walk, error, fields, make, run, served, set_timesteps

from fastdiff.patching import patch, patch_of, unpatch
from fastdiff.patching._site import site_of
from fastdiff.schedulers import SAMPLERS
from fastdiff.schedulers.schedule import REPLACED


@every_sampler
def test_signatures(name: str) -> None:
    stock, patched = make(name), make(name, True)
    for method in vars(patched).keys() & set(REPLACED):
        assert inspect.signature(getattr(patched, method)) == inspect.signature(getattr(stock, method))


@every_sampler
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)
def test_copies(name: str, how: Callable[[Any], Any]) -> None:
    """A copy is patched, steps by itself, and leaves the original alone."""
    if name == "SASolverScheduler" and how is not copy.deepcopy:
        pytest.skip("its tau_func, a lambda, does not pickle")
    patched = make(name, True)
    run(patched, torch.float64, steps=4)
    twin = how(patched)
    assert twin is not patched
    assert vars(twin)[SAMPLERS[name].method].__self__ is twin
    assert site_of(twin) is not site_of(patched)
    compare(make(name), twin)
    assert patched.timesteps is not twin.timesteps
    unpatch(twin)
    assert not vars(twin).keys() & set(REPLACED)
    compare(make(name), patched)


@every_sampler
def test_restore(name: str) -> None:
    scheduler = make(name)
    before = dict(vars(scheduler))
    patch(scheduler)
    assert type(scheduler).__name__ == name
    unpatch(scheduler)
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[k] is v for k, v in before.items())
    method = SAMPLERS[name].method
    assert getattr(scheduler, method).__func__ is getattr(type(scheduler), method)


@every_sampler
def test_unpatch_in_the_middle(name: str) -> None:
    """The stock step carries on from the state that the fused one left."""
    results = []
    for switch in (False, True):
        scheduler = make(name, switch)
        set_timesteps(scheduler, 6)
        torch.manual_seed(1)
        sample = torch.randn(SHAPE, dtype=torch.float64)
        walk = Walk(scheduler)
        for i in range(len(walk.timesteps)):
            if switch and i == len(walk.timesteps) // 2:
                unpatch(scheduler)
            sample = fields(walk.step(i, torch.randn_like(sample), sample))["prev_sample"]
        results.append(sample)
    assert error(results[1], results[0]) < 1e-6


@every_sampler
def test_from_config_is_stock(name: str) -> None:
    scheduler = make(name, True)
    fresh = type(scheduler).from_config(scheduler.config)
    assert patch_of(fresh) is None
    assert not vars(fresh).keys() & set(REPLACED)
    assert fresh.config == make(name).config


@every_sampler
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)
def test_copies_in_the_middle(name: str, how: Callable[[Any], Any]) -> None:
    """A copy carries on from where the original is, and so does the original, whichever steps first."""
    if name == "SASolverScheduler" and how is not copy.deepcopy:
        pytest.skip("its tau_func, a lambda, does not pickle")

    def rest(walk: Walk, sample: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        for i in range(start, stop):
            torch.manual_seed(i)
            sample = fields(walk.step(i, torch.randn_like(sample), sample))["prev_sample"]
            assert served(walk.scheduler) in ("", "eager")
        return sample

    torch.manual_seed(9)
    first = torch.randn(SHAPE, dtype=torch.float64)
    stock, patched = make(name), make(name, True)
    for scheduler in (stock, patched):
        set_timesteps(scheduler, 6)
    walks = Walk(stock), Walk(patched)
    middle, end = len(walks[0].timesteps) // 2, len(walks[0].timesteps)
    expected = rest(walks[0], rest(walks[0], first, 0, middle), middle, end)
    sample = rest(walks[1], first, 0, middle)
    twin = Walk(how(patched))
    assert vars(twin.scheduler)[SAMPLERS[name].method].__self__ is twin.scheduler
    twin.clean = walks[1].clean
    for walk in (twin, walks[1]):
        assert error(rest(walk, sample, middle, end), expected) < 1e-6


THREADED = ("DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "SASolverScheduler", "LCMScheduler")


def _sample(scheduler: Any, seed: int) -> torch.Tensor:
    """The end of a trajectory in fp32, under no mode: on a CPU its steps are bound."""
    set_timesteps(scheduler, 6)
    inputs = torch.Generator().manual_seed(seed)
    walk = Walk(scheduler)
    if "generator" in inspect.signature(type(scheduler).step).parameters:
        walk.arguments["generator"] = inputs
    sample = torch.randn(SHAPE, generator=inputs)
    for i in range(len(walk.timesteps)):
        sample = fields(walk.step(i, torch.randn(SHAPE, generator=inputs), sample))["prev_sample"]
    return sample


@pytest.mark.kernel
def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread steps its own schedulers, known ones and new ones, and gets what one thread alone gets."""
    def trajectories(schedulers: list[Any], seed: int) -> list[torch.Tensor]:
        return [_sample(s, seed) for s in schedulers]

    calls = count_bound(monkeypatch)
    expected = [trajectories([make(name, True) for name in THREADED], seed) for seed in range(4)]
    alone_count = len(calls)
    sets = [[make(name, True) for name in THREADED] for _ in range(4)]
    results: list[list[list[torch.Tensor]]] = [[] for _ in sets]
    start = threading.Barrier(len(sets))

    def work(thread: int) -> None:
        start.wait(timeout=600)
        for _ in range(2):
            results[thread].append(trajectories(sets[thread], thread))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 3 * alone_count > 0
    for ours, alone in zip(results, expected, strict=True):
        assert len(ours) == 2
        assert all(torch.equal(a, b) for again in ours for a, b in zip(again, alone, strict=True))

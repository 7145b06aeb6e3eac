"""What a step launches, and what serves it."""

from __future__ import annotations

import gc
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from checks import DPM, count_bound, every_sampler
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import SHAPE, Walk, fields, make, run, scale, set_timesteps, x32

from fastdiff.patching._site import site_of
from fastdiff.schedulers import SAMPLERS, stepper
from fastdiff.schedulers.plan import Step
from fastdiff.schedulers.schedule import MAX_CONFIGURATIONS, MAX_PLACES


@pytest.mark.kernel
@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_serves(name: str, dtype: torch.dtype) -> None:
    assert {record["site"] for record in run(make(name, True), dtype)} == {"cpu"}


@pytest.mark.kernel
@every_sampler
def test_steps_are_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, every step calls the kernel by address, new or known."""
    calls = count_bound(monkeypatch)
    scheduler = make(name, True)
    for _ in range(3):
        set_timesteps(scheduler, 4)
        walk = Walk(scheduler)
        sample = torch.randn(SHAPE)
        calls.clear()
        for index in range(len(walk.timesteps)):
            sample = fields(walk.step(index, sample.flip(0), sample))["prev_sample"]
        assert len(calls) == len(walk.timesteps)


#: Operations that launch nothing: a timestep picked from the schedule, and expanded.
VIEWS = ("aten.select.int", "aten.expand.default", "aten.slice.Tensor")


class Operations(TorchDispatchMode):
    """Names of the operations dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.kernel
@every_sampler
def test_one_launch_and_no_read(name: str) -> None:
    """The steps of a known configuration dispatch the one operation, and their noise.

    Not the second time yet: what the first has left behind is part of a first step's state.
    """
    scheduler = make(name, True)
    reads = ("aten._local_scalar_dense.default", "aten.nonzero.default")
    for again in (False, False, True):
        set_timesteps(scheduler, 5)
        walk = Walk(scheduler)
        sample = torch.randn(SHAPE)
        for index, t in enumerate(walk.timesteps):
            with Operations() as scaling:
                scale(scheduler, sample, t)
            model_output = torch.randn(SHAPE)
            with Operations() as operations:
                sample = fields(walk.step(index, model_output, sample))["prev_sample"]
            if again:
                seen = [n for n in operations.names if n not in VIEWS]
                if walk.scaled:  # by the walk
                    del seen[: sum(n not in VIEWS for n in scaling.names)]
                draws = [n for n in seen if n.startswith("aten.randn")]
                blend = ["aten.lerp.Tensor"] if SAMPLERS[name].mask else []
                assert seen == [*draws, "fastdiff.scheduler_step.default", *blend]
                assert len(draws) <= (2 if name == "CogVideoXDPMScheduler" else 1)
                if "scale_model_input" in vars(scheduler):
                    assert not set(reads) & set(scaling.names)


def test_coefficients_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = []
    probe = stepper.probe
    monkeypatch.setattr(stepper, "probe", lambda *args: probes.append(1) or probe(*args))
    scheduler = make(DPM, True)
    for begin in (None, None, 2):  # it counts on the first step only
        for steps in (6, 7):
            set_timesteps(scheduler, steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            walk = Walk(scheduler)
            for index in range(begin or 0, steps):
                walk.step(index, x32, x32)
    assert len(probes) == 6 + 7 + 2 * 2
    for steps in range(5, 6 + MAX_CONFIGURATIONS):
        scheduler.set_timesteps(steps)
    state: Any = site_of(scheduler).state  # type: ignore[union-attr]
    assert len(state.schedule.configurations) == MAX_CONFIGURATIONS


class _Counted(Step):
    """A step that is counted as long as it is alive."""

    __slots__ = ("__weakref__",)
    alive: ClassVar[WeakSet[Step]] = WeakSet()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.alive.add(self)


@pytest.mark.parametrize("name", ["DDIMScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_memory_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step leads to the next; those of a trajectory longer than what is kept go all the same."""
    monkeypatch.setattr(stepper, "MAX_STEPS", 20)
    monkeypatch.setattr(stepper, "Step", _Counted)
    _Counted.alive.clear()
    scheduler = make(name, True)
    scheduler.set_timesteps(70)
    for t in scheduler.timesteps:
        scheduler.step(x32, t, x32)
    gc.collect()
    assert 0 < len(_Counted.alive) <= 20
    configuration = site_of(scheduler).state.schedule.configuration()  # type: ignore[union-attr]
    assert len(configuration._numbers) <= 20
    for t in scheduler.timesteps:
        if name != "DDIMScheduler":  # which counts no steps
            scheduler._step_index = None
            scheduler.scale_model_input(x32, t)
    assert len(configuration._starts) <= MAX_PLACES
    assert len(configuration._places) <= MAX_PLACES

"""``set_timesteps`` of a patched scheduler: what it did before is done again, and is what the stock one does."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import DPM, every_sampler, one_step
from torch import Tensor
from trajectory import attributes, make, served, set_timesteps

from fastdiff.schedulers.setting import changes_by


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        mine = ours[name]
        assert type(mine) is type(value), name
        if isinstance(value, Tensor):
            assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride()), name
            assert torch.allclose(mine, value, rtol=0, atol=0, equal_nan=True), name
        elif isinstance(value, np.ndarray):
            assert np.array_equal(mine, value), name
        elif not callable(value):
            assert repr(mine) == repr(value), name


def _count_calls(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedulers whose stock ``set_timesteps`` runs from now on."""
    cls, calls = type(scheduler), []
    stock = cls.set_timesteps
    monkeypatch.setattr(cls, "set_timesteps", lambda self, *a, **k: calls.append(self) or stock(self, *a, **k))
    return calls


@every_sampler
def test_known_schedules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schedules in turns, each after a step in the other: the stock attributes, and no stock call in the end."""
    stock, patched = make(name), make(name, True)
    calls = _count_calls(stock, monkeypatch)
    for turn, steps in enumerate([2, 2, 2, 2] if name == "ConsistencyDecoderScheduler" else [5, 6] * 3):
        before = getattr(patched, "timesteps", None)
        calls.clear()
        for scheduler in (stock, patched):
            set_timesteps(scheduler, steps)
        assert patched.timesteps is not before  # a loop over the earlier ones may still run
        theirs, ours = attributes(stock), attributes(patched)
        if turn:  # what steps keep is compared by other tests
            for held in (theirs, ours):
                for key, value in list(held.items()):
                    if isinstance(value, Tensor) and value.dim() == 4:
                        del held[key]
        _assert_same(ours, theirs)
        for scheduler in (stock, patched):
            torch.manual_seed(0)
            one_step(scheduler)
    assert calls == [stock]


def _schedules() -> list[tuple[str, dict[str, Any]]]:
    flow = "FlowMatchEulerDiscreteScheduler"
    return [
        (DPM, {"num_inference_steps": 5, "device": "cpu"}),
        (DPM, {"num_inference_steps": 5, "device": torch.device("cpu")}),
        (DPM, {"timesteps": [999, 500, 20]}),
        (flow, {"sigmas": [1.0, 0.6, 0.2]}),
        (flow, {"sigmas": np.linspace(1.0, 0.2, 4)}),
    ]


@pytest.mark.parametrize(("name", "arguments"), _schedules(), ids=str)
def test_arguments(name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, arrays and devices are told apart by value."""
    patched = make(name, True)
    calls = _count_calls(patched, monkeypatch)
    for _ in range(3):
        calls.clear()
        patched.set_timesteps(**arguments)
    assert not calls
    changed = {k: [*v[:-1], v[-1] / 2] if isinstance(v, (list, np.ndarray)) else v for k, v in arguments.items()}
    stock = make(name)
    for scheduler in (stock, patched):
        scheduler.set_timesteps(**changed)
    _assert_same(attributes(patched), attributes(stock))


@pytest.mark.parametrize("table", ["timesteps", "sigmas", "alphas_cumprod"])
def test_writes_between_generations(table: str) -> None:
    """What somebody writes into a schedule is gone with it; what into a table of the scheduler's own is not."""
    stock, patched = make(DPM), make(DPM, True)
    for turn in range(5):
        for scheduler in (stock, patched):
            scheduler.set_timesteps(4)
        _assert_same(attributes(patched), attributes(stock))
        if turn == 2:
            for scheduler in (stock, patched):
                getattr(scheduler, table).div_(2, rounding_mode="floor" if table == "timesteps" else None)


def test_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``device="cuda"`` is another device after ``torch.cuda.set_device``."""
    patched = make(DPM, True)
    calls = _count_calls(patched, monkeypatch)
    known = []
    for gpu in (None, 0, 1, 0, 1):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda gpu=gpu: gpu is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda gpu=gpu: gpu)
        for _ in range(2):
            calls.clear()
            patched.set_timesteps(4)
            known.append(not calls)
    assert known == [False, False, False, True, False, True, True, True, True, True]


@pytest.mark.parametrize("value", [np.ones(1), [1.0], {}], ids=str)
@pytest.mark.parametrize("name", ["dt", "_begin_index"])
def test_state_that_does_not_hash(name: str, value: Any) -> None:
    """Such a thing among the counters is none that a call is looked up by."""
    stock, patched = make("HeunDiscreteScheduler"), make("HeunDiscreteScheduler", True)
    for turn in range(4):
        for scheduler in (stock, patched):
            if turn == 2:
                setattr(scheduler, name, value)
            scheduler.set_timesteps(4)
        _assert_same(attributes(patched), attributes(stock))
        ours, theirs = (one_step(scheduler).prev_sample for scheduler in (patched, stock))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert served(patched) in ("cpu", "eager")
    for scheduler in (stock, patched):
        setattr(scheduler, name, value)
    outcomes = []
    for scheduler in (stock, patched):
        try:
            outcomes.append(one_step(scheduler, index=1).prev_sample)
        except Exception as error:
            outcomes.append(type(error))
    ours, theirs = outcomes
    assert ours is theirs if isinstance(theirs, type) else torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert served(patched).startswith("stock: ") is (name == "dt")  # the other counts on the first step only


def test_list_written_in_place() -> None:
    """An element that is replaced counts, even where the new one has the address of the old one."""
    thing: Any = SimpleNamespace(items=[object()])

    def replace() -> None:
        thing.items[0] = None  # frees its memory, which the next object takes
        thing.items[0] = object()

    assert changes_by(thing, lambda: None) == {}
    assert changes_by(thing, replace) is None


def test_default_dtype() -> None:
    stock, patched = make("EulerDiscreteScheduler"), make("EulerDiscreteScheduler", True)
    for _ in range(3):
        patched.set_timesteps(4)
    torch.set_default_dtype(torch.float64)
    try:
        for scheduler in (stock, patched):
            scheduler.set_timesteps(4)
    finally:
        torch.set_default_dtype(torch.float32)
    _assert_same(attributes(patched), attributes(stock))


def test_warnings_stay() -> None:
    """A schedule of which Diffusers warns is set by Diffusers each time."""
    patched = make("LCMScheduler", True)
    heard: list[str] = []
    logger = logging.getLogger(type(patched).__module__)
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        for _ in range(4):
            patched.set_timesteps(timesteps=[500, 250])
    finally:
        logger.removeHandler(handler)
    assert len(heard) >= 4
    assert heard[: len(heard) // 4] * 4 == heard


def test_errors_stay() -> None:
    patched = make(DPM, True)
    for _ in range(3):
        patched.set_timesteps(4)
        with pytest.raises(ValueError, match="num_inference_steps"):
            patched.set_timesteps()
    stock = make(DPM)
    for scheduler in (stock, patched):
        scheduler.set_timesteps(4)
    _assert_same(attributes(patched), attributes(stock))

"""Known steps in the compiled extension: the same as in Python, for what it knows only, and nothing is leaked."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import DPM
from configurations import CONFIGURATIONS, Configuration, label
from extent import ALL
from torch import Tensor
from torch.autograd import forward_ad
from trajectory import SHAPE, Walk, attributes, error, fields, make, set_timesteps

from fastdiff import use_backend
from fastdiff._launches import LaunchCounter
from fastdiff.patching._site import site_of
from fastdiff.schedulers import stepper
from fastdiff.schedulers.stepper import Stepper

pytestmark = pytest.mark.kernel

_firsts = {configuration[0]: configuration for configuration in reversed(CONFIGURATIONS)}
_BIG = (1, 3, 160, 160)  # by the dispatcher, on a CPU


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each step that Python serves."""
    calls: list[str] = []
    fused = Stepper._fused

    def counted(self: Stepper, *args: Any) -> Any:
        result = fused(self, *args)
        calls.append(result if isinstance(result, str) else "")
        return result

    monkeypatch.setattr(Stepper, "_fused", counted)
    return calls


def _same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return (type(a), a.dtype, a.shape, a.stride()) == (type(b), b.dtype, b.shape, b.stride()) and torch.equal(
            a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def _generation(scheduler: Any, configuration: Configuration, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """Of every step the result and what the scheduler holds then; and the state of the noise."""
    _, _, schedule, step = configuration
    if schedule.keys().isdisjoint(("timesteps", "sigmas")):
        set_timesteps(scheduler, **{"steps": 8, **schedule})
    else:
        scheduler.set_timesteps(**schedule)
    torch.manual_seed(1)
    inputs = torch.Generator().manual_seed(0)
    sample = torch.randn(shape, generator=inputs).to(dtype)
    walk, records = Walk(scheduler, **step), []
    for index in range(len(walk.timesteps)):
        more = {"variance_noise": torch.randn(shape, generator=inputs).to(dtype)} if "variance_noise" in step else {}
        output = walk.step(index, torch.randn(shape, generator=inputs).to(dtype), sample, **more)
        sample = fields(output)["prev_sample"]
        records.append((type(output), fields(output), attributes(scheduler)))
    return records, torch.get_rng_state()


@pytest.mark.parametrize("configuration", CONFIGURATIONS if ALL else _firsts.values(), ids=label)
def test_is_the_step(configuration: Configuration, in_python: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, their types, attributes and the noise are bit for bit those of Python's way."""
    name, config, *_ = configuration
    for dtype, shape in ((torch.float32, SHAPE), (torch.float64, SHAPE), (torch.bfloat16, _BIG)):
        with monkeypatch.context() as context:
            context.setattr(stepper, "known_step", lambda *args: None)
            by_python, compiled = make(name, True, **config), make(name, True, **config)
            for _ in range(3):
                expected = _generation(by_python, configuration, dtype, shape)
        assert all(reason == "" for reason in in_python)
        for _ in range(3):
            in_python.clear()
            found = _generation(compiled, configuration, dtype, shape)
        # Where RePaint jumps back, a step is followed by one or the other, and only the latest is at hand.
        assert not in_python or "jump_length" in configuration[2]
        assert _same(found, expected)


def _prepared(name: str = DPM, **step: Any) -> tuple[Any, Walk, Tensor]:
    """A scheduler whose steps are all known, before the third one of a trajectory; and the sample there."""
    scheduler = make(name, True)
    for steps in (5, 5, 5, 2):
        set_timesteps(scheduler, 5)
        walk, sample = Walk(scheduler, **step), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        for index in range(steps):
            sample = fields(walk.step(index, sample.flip(0), sample))["prev_sample"]
    return scheduler, walk, sample


def test_interrupted_after_the_books_were_kept() -> None:
    """The next step is the next one, not the same again."""
    (scheduler, walk, x), (whole, other, _) = _prepared(), _prepared()
    place = site_of(scheduler).state._place
    assert place.next is not None and place.next.known is not None
    known = place.next.known

    def interrupted(*args: Any) -> Any:
        known(*args)
        raise KeyboardInterrupt

    place.next.known = interrupted
    with pytest.raises(KeyboardInterrupt):
        walk.step(2, x.flip(0), x)
    other.step(2, x.flip(0), x)
    assert _same(attributes(scheduler), attributes(whole))
    for index in (3, 4):
        assert _same(fields(walk.step(index, x.flip(0), x)), fields(other.step(index, x.flip(0), x)))
    assert _same(attributes(scheduler), attributes(whole))


def test_forward_mode_does_not_stay() -> None:
    """Steps that ran eager within a dual level are fused again outside of it."""
    scheduler = make(DPM, True)
    for inside in (True, True, False, False):
        set_timesteps(scheduler, 5)
        walk, x = Walk(scheduler), torch.randn(SHAPE)
        for index in range(5):
            with forward_ad.dual_level() if inside else contextlib.nullcontext():
                walk.step(index, x.flip(0), x)
            served = {choice.backend for choice in site_of(scheduler).served.values()}
            assert ("eager" in served) is inside


class _Tensor(Tensor):
    """A subclass."""


@contextlib.contextmanager
def _written(table: Tensor) -> Any:
    table.mul_(1.01)
    yield


#: What a known step leaves to Python: (model output, sample) as they are changed, or what is around the call.
_OTHER_TENSORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "another dtype": lambda m, x: (m.bfloat16(), x),
    "another shape": lambda m, x: (m[:1], x[:1]),
    "a transposed sample": lambda m, x: (m, x.mT.contiguous().mT),
    "a subclass": lambda m, x: (m.as_subclass(_Tensor), x),
    "a needed gradient": lambda m, x: (m.clone().requires_grad_(), x),
    "sparse": lambda m, x: (m.to_sparse(), x),
    "no tensor": lambda m, x: (m, 3.0),  # type: ignore[return-value, arg-type]
}
_AROUND: dict[str, Callable[[Any], Any]] = {
    "autocast": lambda s: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda s: LaunchCounter(),
    "a function mode": lambda s: torch.device("cpu"),
    "a profiler": lambda s: torch.autograd.profiler.profile(),
    "forward mode": lambda s: forward_ad.dual_level(),
    "a backend": lambda s: use_backend("eager"),
    "a written table": lambda s: _written(s.sigmas),
}
_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another list": lambda s: setattr(s, "model_outputs", list(s.model_outputs)),
    "another entry": lambda s: s.model_outputs.__setitem__(-1, s.model_outputs[-1].clone()),
    "a shorter list": lambda s: s.model_outputs.pop(0),
    "an option": lambda s: setattr(s.config, "lower_order_final", False),
    "a counter": lambda s: setattr(s, "_step_index", 3),
    "a new attribute": lambda s: setattr(s, "something", 1),
    "no attribute": lambda s: delattr(s, "lower_order_nums"),
    "a table": lambda s: setattr(s, "sigmas", s.sigmas * 1.01),
    "the site's backend": lambda s: setattr(site_of(s), "backend", "eager"),
}


@pytest.mark.parametrize("what", [*_OTHER_TENSORS, *_AROUND, *_CHANGES])
def test_what_is_left_to_python(what: str, in_python: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else than what is known; the outcome, a result or an error, is that of Python's way alone."""
    outcomes = []
    for only_python in (False, True):
        with monkeypatch.context() as context:
            if only_python:
                context.setattr(stepper, "known_step", lambda *args: None)
            scheduler, walk, x = _prepared()
            m, x = _OTHER_TENSORS.get(what, lambda *tensors: tensors)(x.flip(0), x)
            _CHANGES.get(what, lambda s: None)(scheduler)
            before = dict(vars(scheduler))
            in_python.clear()
            outcome: Any
            with _AROUND.get(what, lambda s: contextlib.nullcontext())(scheduler):
                try:
                    outcome = fields(walk.step(2, m, x))
                except Exception as exc:
                    outcome = repr(exc)
                    assert vars(scheduler) == before
            assert len(in_python) == 1
            outcomes.append((outcome, attributes(scheduler)))
    assert _same(*outcomes)


@pytest.mark.parametrize("what", ["a transposed model output", "a lazy negative", "positions", "a new generation"])
def test_what_is_known_too(what: str, in_python: list[str]) -> None:
    """Layouts that only the kernel's dispatcher takes, and arguments by position after the first time."""
    results = []
    for changed in (True, False):
        scheduler, walk, x = _prepared()
        m, t = x.flip(0), scheduler.timesteps[2]
        in_python.clear()
        if changed and what == "a transposed model output":
            m = m.mT.contiguous().mT
        elif changed and what == "a lazy negative":
            m = torch._neg_view(-m)
        if changed and what == "positions":
            output = scheduler.step(m, t, x)
            assert len(in_python) == 1  # which knows the step by this form now
            set_timesteps(scheduler, 5)
            walk = Walk(scheduler)
            first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            for index in range(2):
                first = walk.step(index, first.flip(0), first).prev_sample
            assert torch.equal(first, x)
            again = scheduler.step(m, t, x)
            assert len(in_python) == 1
            assert torch.equal(again.prev_sample, output.prev_sample)
        else:
            output = walk.step(2, m, x)
            assert not in_python
        results.append(output.prev_sample)
    assert torch.equal(*results)


def test_errors_leave_no_trace() -> None:
    """A generator that the noise cannot be drawn from: stock's error, and the step can be taken all the same."""
    scheduler, walk, x = _prepared("EulerAncestralDiscreteScheduler")
    before, counts = dict(vars(scheduler)), sys.getrefcount(x)
    for _ in range(3):
        with pytest.raises(AttributeError, match="has no attribute 'device'"):
            walk.step(2, x, x, generator="none")
        stock = make("EulerAncestralDiscreteScheduler")
        set_timesteps(stock, 5)
        with pytest.raises(AttributeError, match="has no attribute 'device'"):
            Walk(stock).step(2, x, x, generator="none")
        assert vars(scheduler) == before
    gc.collect()
    assert sys.getrefcount(x) == counts
    assert fields(walk.step(2, x, x))["prev_sample"].isfinite().all()


def _references(scheduler: Any, x: Tensor, generations: int) -> tuple[int, list[int]]:
    """After so many generations from ``x``: how many of their samples are alive; how often some objects are held."""
    outputs = []
    for _ in range(generations):
        set_timesteps(scheduler, 4)
        walk, sample = Walk(scheduler), x
        for index in range(4):
            sample = fields(walk.step(index, x, sample))["prev_sample"]
            outputs.append(weakref.ref(sample))
    del sample, walk
    gc.collect()
    alive = sum(ref() is not None for ref in outputs)
    return alive, [sys.getrefcount(o) for o in (None, x, x.dtype, Tensor, scheduler, scheduler.timesteps)]


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "SASolverScheduler", "RePaintScheduler", "DDIMScheduler"])
def test_nothing_is_leaked(name: str) -> None:
    """Objects, references and tensors after many generations are those after a few; a scheduler that goes takes all."""
    scheduler = make(name, True)
    x = torch.randn(SHAPE)
    _references(scheduler, x, 10)
    before, objects = _references(scheduler, x, 10), len(gc.get_objects())
    after = _references(scheduler, x, 40)
    assert after[0] == before[0] == 0  # samples alive
    # Whatever a generation left behind would be there 40 times.
    assert all(abs(now - then) < 40 for now, then in zip(after[1], before[1], strict=True))
    assert abs(len(gc.get_objects()) - objects) < 40
    gone = weakref.ref(site_of(scheduler).state)  # type: ignore[union-attr]
    del scheduler
    gc.collect()
    assert gone() is None


def test_by_stock(in_python: list[str]) -> None:
    """Whole generations, all in the extension, against the stock scheduler."""
    for name in ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LMSDiscreteScheduler"):
        configuration: Configuration = (name, {}, {"steps": 8}, {})
        expected, _ = _generation(make(name), configuration, torch.float32, SHAPE)
        scheduler = make(name, True)
        for _ in range(3):
            in_python.clear()
            found, _ = _generation(scheduler, configuration, torch.float32, SHAPE)
        assert not in_python
        for (kind, ours, _), (stock_kind, theirs, _) in zip(found, expected, strict=True):
            assert kind is stock_kind
            assert error(ours["prev_sample"], theirs["prev_sample"]) < 1e-5

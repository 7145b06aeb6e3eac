"""scheduler_step: the next sample, the new history entry and one more combination in one pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff import _extension
from fastdiff._launches import LaunchCounter
from fastdiff.backends import _cpu_step
from fastdiff.ops import scheduler_step

pytestmark = pytest.mark.kernel

SHAPE = (2, 4, 9, 13)
PREV = [0.9, -0.2, 0.35, 0.1]
ENTRY = [1.3, -0.8]


def _call(
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    history: int = 1,
    noise: bool = True,
    entry: bool = True,
    clip: float | None = None,
    kept: bool = True,
    shape: tuple[int, ...] = SHAPE,
) -> tuple[Any, ...]:
    """The op's arguments in their order."""
    generator = generator or torch.Generator().manual_seed(0)
    sample, output, drawn, *past = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3 + history))
    coefficients = PREV + [0.3 / (i + 1) for i in range(history)]
    third = [0.7 - 0.4 * i for i in range(4 + history)] if kept else []
    return (sample, output, past, drawn if noise else None, coefficients, ENTRY if entry else [], clip, None, None,
            third)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "options",
    [
        {"history": 0, "noise": False},
        {"history": 1, "noise": False},
        {"history": 0, "clip": 1.0},
        {"history": 3},
        {"history": 8, "clip": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_numerics(scheduler_step, lambda generator: (_call(generator, dtype, **options), {}))


@pytest.mark.numerics
def test_next_sample_alone() -> None:
    for seed in range(3):
        args = _call(torch.Generator().manual_seed(seed), history=2, entry=False, kept=False)
        dtypes = {"entry_dtype": torch.bfloat16, "kept_dtype": torch.float16}
        following, entry, third = run_kernel(scheduler_step, *args[:7], **dtypes)
        assert entry.shape == third.shape == (0,)
        assert entry.dtype == torch.bfloat16
        assert third.dtype == torch.float16
        torch.testing.assert_close(following, scheduler_step.eager(*args)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.numerics
def test_terms_that_cancel() -> None:
    """Large terms with a small sum: fp32 results are rounded once, whatever the terms."""
    x, *_ = _call()
    prev, third = [1e4, -1e4 + 0.5, 0.0, 0.0, 3e3, -3e3], [0.0, 7e3, 0.0, 0.0, -7e3, 0.1]
    got = run_kernel(scheduler_step, x, x * 1.0001, [x, x * 0.9999], None, prev, [], None, None, None, third)
    exact = scheduler_step.eager(*_wide((x, x * 1.0001, [x, x * 0.9999], None, prev, [], None, None, None, third)))
    for ours, want in zip((got[0], got[2]), (exact[0], exact[2]), strict=True):
        assert ((ours.double() - want).abs() <= 0.51 * torch.finfo(torch.float32).eps * want.abs()).all()


@pytest.mark.numerics
@pytest.mark.parametrize("prev_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("entry_dtype", [None, *DTYPES], ids=str)
def test_mixed_dtypes(prev_dtype: torch.dtype | None, entry_dtype: torch.dtype | None) -> None:
    sample, output, history, noise, prev, entry, clip, _, _, kept = _call(history=3)
    tensors = sample, output.half(), [history[0].bfloat16(), history[1], history[2].half()], noise.bfloat16()
    args = (*tensors, prev, entry, clip)
    dtypes = prev_dtype or torch.float32, entry_dtype or torch.float16, entry_dtype or torch.float32
    ours = run_kernel(scheduler_step, *args, prev_dtype, entry_dtype, kept, entry_dtype)
    exact = scheduler_step.eager(*_wide(args), torch.float64, torch.float64, kept, torch.float64)
    for got, want, dtype in zip(ours, exact, dtypes, strict=True):
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        rounding = (want.to(dtype).double() - want).norm() / want.norm()
        assert error <= (4 if dtype == torch.float32 else 1.02) * rounding


def _wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def widen(value: Any) -> Any:
        if isinstance(value, list):
            return [widen(v) for v in value]
        return value.double() if isinstance(value, Tensor) else value

    return tuple(widen(a) for a in args)


@pytest.mark.parametrize("shape", [(), (1,), (15,), (2, 17), (1, 4, 4, 5, 6), (0, 4), (3, 4, 128, 128)])
def test_shapes(shape: tuple[int, ...]) -> None:
    args = _call(shape=shape, history=2, clip=1.5)
    for got, want in zip(run_kernel(scheduler_step, *args), scheduler_step.eager(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    numel=st.integers(1, 3000),
    history=st.integers(0, 8),
    noise=st.booleans(),
    entry=st.booleans(),
    kept=st.booleans(),
    clip=st.none() | st.floats(0, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_any_call(
    numel: int, history: int, noise: bool, entry: bool, kept: bool, clip: float | None, dtype: torch.dtype
) -> None:
    args = _call(None, dtype, history=history, noise=noise, entry=entry, kept=kept, clip=clip, shape=(numel,))
    exact = scheduler_step.eager(*_wide(args))
    for got, want in zip(run_kernel(scheduler_step, *args), exact, strict=True):
        bound = 0.51 * torch.finfo(dtype).eps * want.abs() + 4e-6
        assert ((got.double() - want).abs() <= bound).all()


def test_memory_formats() -> None:
    args = _call(clip=1.0)
    expected = run_kernel(scheduler_step, *args)
    nhwc = [a.to(memory_format=torch.channels_last) if isinstance(a, Tensor) else a for a in args]
    nhwc[2] = [t.to(memory_format=torch.channels_last) for t in args[2]]
    for got, want in zip(run_kernel(scheduler_step, *nhwc), expected, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, want)
    # An NHWC model behind contiguous latents.
    for got, want in zip(run_kernel(scheduler_step, args[0], *nhwc[1:]), expected, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, want)
    reversed_ = scheduler_step.eager(nhwc[0], *args[1:])
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in reversed_)
    assert "not laid out like sample" in scheduler_step.choose(nhwc[0], *args[1:]).reason


@pytest.mark.numerics
def test_nonfinite() -> None:
    sample, output, *rest = _call(history=1)
    sample[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0])
    output[0, 0, 0, 1:5] = torch.tensor([float("inf"), 1, float("nan"), float("inf")])
    assert_same_nonfinite(scheduler_step, sample, output, *rest)
    assert_same_nonfinite(scheduler_step, sample, output, *rest[:4], 1.0, *rest[5:])


@pytest.mark.numerics
def test_coefficient_0_is_no_term() -> None:
    """A step that clips its new entry takes an infinite model output in, and is finite as stock's."""
    sample, output = torch.randn(2, 1, 2, 3, 8).unbind()
    output[0, 0, 0, 2], output[0, 0, 1, 1] = float("inf"), -float("inf")
    old = torch.full_like(sample, float("inf"))
    call = (sample, output, [old], None, [0.7, 0.0, 0.3, 0.0, 0.0], [0.5, 2.0], 1.0)
    following, new, third = run_kernel(scheduler_step, *call, kept=[0.0, 0.0, 2.0, 0.0, 0.0])
    clipped = (0.5 * sample + 2.0 * output).clamp(-1, 1)
    torch.testing.assert_close(new, clipped)
    torch.testing.assert_close(following, 0.7 * sample + 0.3 * clipped)
    torch.testing.assert_close(third, 2 * clipped)
    eager = scheduler_step.eager(*call, kept=[0.0, 0.0, 2.0, 0.0, 0.0])
    for ours, theirs in zip((following, new, third), eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    zeros = run_kernel(scheduler_step, sample, output, [], None, [0.0] * 4, [])[0]
    assert torch.equal(zeros, torch.zeros_like(sample))
    assert torch.equal(scheduler_step.eager(sample, output, [], None, [0.0] * 4, [])[0], zeros)


def test_results_are_new_tensors() -> None:
    sample, output, *_ = _call(history=0)
    first, second = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    results = run_kernel(scheduler_step, sample, output, [], None, first, [0.0, 1.0], kept=second)
    assert all(torch.equal(a, b) for a, b in zip(results, (sample, output, output), strict=True))
    assert len({t.data_ptr() for t in (sample, output, *results)}) == 5


def test_falls_back_with_a_reason() -> None:
    args = _call()
    cases = {
        "float64": _wide(args),
        "9 history tensors": _call(history=9),
        "neither contiguous nor channels_last": (args[0].mT, args[1].mT, [args[2][0].mT], None, *args[4:]),
        "result's dtype": (*args[:7], torch.float64),
    }
    for reason, call in cases.items():
        choice = scheduler_step.choose(*call)
        assert choice.backend == "eager"
        assert reason in choice.reason
        torch.testing.assert_close(scheduler_step(*call), scheduler_step.eager(*call))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in scheduler_step.choose(*args).reason


def test_bad_arguments() -> None:
    sample, output, history, noise, prev, entry, *_ = _call()
    other = sample[:, 1:]
    for arguments, message in (
        ((sample, other, history, noise, prev, entry), r"model_output has shape \(2, 3, 9, 13\)"),
        ((sample, output, [other], noise, prev, entry), "a history tensor has shape"),
        ((sample, output, history, other, prev, entry), "noise has shape"),
        ((sample, output, history, noise, prev[:4], entry), "prev has 4 coefficients, expected 4 and 1"),
        ((sample, output, history, noise, prev, [1.0]), "entry has 1 coefficients"),
        ((sample, output, history, noise, prev, entry, -1.0), "clip is -1.0"),
        ((sample, output, history, noise, prev, entry, float("nan")), "clip is nan"),
        ((sample, output, history, noise, prev, entry, None, None, None, [1.0]), "kept has 1 coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler_step(*arguments)


def test_gradients() -> None:
    assert_gradients(scheduler_step, *_call(history=2, clip=1.0))


def test_opcheck() -> None:
    torch.library.opcheck(scheduler_step.overload, _call(history=2))
    torch.library.opcheck(scheduler_step.overload, _call(entry=False, kept=False))


def test_compile() -> None:
    assert_compiles(scheduler_step, *_call(history=2, clip=1.0))


def _never(*args: Any) -> Any:
    raise AssertionError("the dispatcher was called")


@settings(max_examples=50, deadline=None)
@given(
    history=st.integers(0, 8),
    noise=st.booleans(),
    entry=st.booleans(),
    kept=st.booleans(),
    clip=st.none() | st.floats(0, 2),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=11, max_size=11),
    results=st.lists(st.none() | st.sampled_from(DTYPES), min_size=3, max_size=3),
)
def test_prepared_is_the_op(
    history: int, noise: bool, entry: bool, kept: bool, clip: float | None, dtypes: list[torch.dtype],
    results: list[torch.dtype | None],
) -> None:  # fmt: skip
    """Bit for bit, whatever the types, of tensors other than those it was prepared with."""
    found = []
    for seed in (1, 2):
        sample, output, past, drawn, *rest = _call(torch.Generator().manual_seed(seed), history=history, noise=noise,
                                                   entry=entry, kept=kept, clip=clip)
        past = [t.to(d) for t, d in zip(past, dtypes, strict=False)]
        tensors = sample.to(dtypes[8]), output.to(dtypes[9]), past, None if drawn is None else drawn.to(dtypes[10])
        found.append((*tensors, *rest[:3], results[0], results[1], rest[5], results[2]))
    step = _cpu_step.prepare(_never, *found[0])
    assert step is not None
    wanted = scheduler_step.overload(*found[1])
    ours = step(*found[1][:4])
    for got, want, there in zip(ours, wanted, (True, entry, kept), strict=True):
        assert (got is not None) is there
        assert got is None or (got.dtype is want.dtype and torch.equal(got, want))


def _watched(context: Any) -> Any:
    def call(step: Any, tensors: tuple[Any, ...]) -> Any:
        with context():
            return step(*tensors)

    return call


DISPATCHED = {
    "a dispatch mode": _watched(LaunchCounter),
    "a function mode": _watched(lambda: torch.device("cpu")),
    "a profiler": _watched(torch.autograd.profiler.profile),
    "a transform": lambda step, tensors: torch.func.vmap(lambda x: step(*tensors)[:1])(torch.ones(1)),
    "a transposed history": lambda step, t: step(t[0], t[1], [t[2][0].mT.contiguous().mT], t[3]),
    "a transposed model output": lambda step, t: step(t[0], t[1].mT.contiguous().mT, *t[2:]),
    "a lazy negative": lambda step, t: step(t[0], torch._neg_view(-t[1]), *t[2:]),
}


@pytest.mark.parametrize("what", DISPATCHED)
def test_what_prepared_leaves_to_the_dispatcher(what: str) -> None:
    """Modes and profilers see the op; layouts that are not the kernel's are copied."""
    args = _call()
    calls = []
    run = scheduler_step.choose(*args).run
    step = _cpu_step.prepare(lambda *a: calls.append(1) or run(*a), *args)
    assert step is not None
    wanted = step(*args[:4])[0]
    assert not calls
    got = DISPATCHED[what](step, args[:4])
    assert calls == [1]
    assert torch.equal(got[0].view_as(wanted), wanted)  # but for the transform's axis


@pytest.mark.parametrize("what", DISPATCHED)
def test_what_the_direct_path_leaves_to_the_dispatcher(what: str) -> None:
    args = _call()
    calls = []
    run = scheduler_step.overload
    direct = _cpu_step.directly(lambda *a: calls.append(1) or run(*a))
    wanted = direct(*args)[0]
    assert not calls
    got = DISPATCHED[what](lambda *tensors: direct(*tensors, *args[4:]), args[:4])
    assert calls == [1]
    assert torch.equal(got[0].view_as(wanted), wanted)  # but for the transform's axis
    large = torch.zeros(_cpu_step.SMALL + 1)
    direct(large, large, [], None, [1.0, 0.5, 0.0, 0.0], [])
    assert calls == [1, 1]


def test_first_calls_of_several_threads() -> None:
    """What they need is there before: a thread that waited for another's would keep the interpreter from it."""
    code = """
import threading, torch
from fastdiff import _extension
meet, done = threading.Barrier(8), []
def first():
    tensors = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    meet.wait()
    done.append(_extension.module.scheduler_step(*tensors, [], None, [1.0, 0.5, 0.0, 0.0], [], *[None] * 3, [], None))
threads = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(done) == 8
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_what_torch_may_not_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the dispatcher."""
    args = _call()
    wanted = scheduler_step(*args)
    monkeypatch.setattr(_extension.module, "scheduler_step", lambda *args: NotImplemented)
    got = _cpu_step.directly(scheduler_step.overload)(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


WITHOUT_ADDRESS = {
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "a wrapper": torch._to_functional_tensor,
    "sparse": Tensor.to_sparse,
    "MKL-DNN": Tensor.to_mkldnn,
}


@pytest.mark.parametrize("what", WITHOUT_ADDRESS)
@pytest.mark.parametrize("position", range(4))
def test_prepared_for_other_tensors(what: str, position: int) -> None:
    """A tensor without an address of its own is for the dispatcher to take or to refuse."""
    args = _call()
    calls = []
    step = _cpu_step.prepare(lambda *a: calls.append(a) or (None,) * 3, *args)
    assert step is not None
    tensors = list(args[:4])
    other = WITHOUT_ADDRESS[what](tensors[position][0] if position == 2 else tensors[position])
    tensors[position] = [other] if position == 2 else other
    step(*tensors)
    assert len(calls) == 1
    assert all(a is b for a, b in zip(calls[0], tensors, strict=False))


def test_what_is_not_prepared() -> None:
    for shape in ((0, 4), (1, 4, 256, 128)):
        assert _cpu_step.prepare(_never, *_call(shape=shape)) is None


def test_prepared_addresses() -> None:
    """Of a tensor without memory, or too few, nothing is read."""
    assert _extension.module is not None
    call = _extension.module.bind_scheduler_step(4, [0, -1, -1, 0, 0, -1, 0], [1.0, 0.5, 0.0, 0.0, 2.0], [], None, [])
    sample, output, past, following = torch.arange(16.0).view(4, 4)
    addresses = [following.data_ptr(), 0, 0, sample.data_ptr(), output.data_ptr(), 0, past.data_ptr()]
    call(*addresses)
    assert torch.equal(following, sample + 0.5 * output + 2 * past)
    following.zero_()
    wrong = [[*addresses[:i], 0, *addresses[i + 1 :]] for i in (0, 3, 4, 6)]
    wrong += [addresses[:-1], [*addresses, 1], [*addresses[:1], 1, *addresses[2:]]]
    for arguments in wrong:
        with pytest.raises(ValueError, match="an address is missing"):
            call(*arguments)
    with pytest.raises(TypeError):
        call(*addresses[:-1], "x")
    assert not following.any()
    types = [0, 0, 0, 0, 0, 0, 0]
    for place, least in enumerate((0, -1, -1, 0, 0, -1, 0)):
        for wrong_type in (least - 1, 3, 7):
            # The coefficients fit the types as far as these are there.
            given = [*types[:place], wrong_type, *types[place + 1 :]]
            entry, kept = [1.0] * 2 * (given[1] >= 0), [1.0] * 5 * (given[2] >= 0)
            with pytest.raises(ValueError, match=rf"dtypes\[{place}\] is {wrong_type}, expected 0, 1 or 2"):
                _extension.module.bind_scheduler_step(4, given, [1.0] * 5, entry, None, kept)
    with pytest.raises(ValueError, match="numel is -1"):
        _extension.module.bind_scheduler_step(-1, types, [1.0] * 5, [1.0] * 2, None, [1.0] * 5)
    with pytest.raises(ValueError, match="do not fit"):
        _extension.module.bind_scheduler_step(4, [0, 0, -1, 0, 0, -1], [1.0, 0.5, 0.0, 0.0], [], None, [])


_PATHS: dict[str, dict[str, Any]] = {
    "plain": {"noise": False, "kept": False},
    "no entry": {"entry": False},
    "all": {"clip": 0.7},
    "eight": {"history": 8},
    "half": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", _PATHS.values(), ids=_PATHS)
def test_small_tensors_without_the_dispatcher(options: dict[str, Any]) -> None:
    """The extension serves them itself: the same bits, dtypes and strides as through the dispatcher."""
    arguments = (*_call(**options), torch.float32)
    found = _extension.module.scheduler_step(*arguments)  # type: ignore[union-attr]
    expected = torch.ops.fastdiff.scheduler_step(*arguments)
    served = scheduler_step(*arguments)
    for a, b, c in zip(found, expected, served, strict=True):
        assert type(a) is Tensor
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)
        assert torch.equal(a, c)


_Changed = Callable[[list[Any]], Any]
_LEFT: dict[str, _Changed] = {
    "a transposed sample": lambda a: a.__setitem__(0, a[0].mT.contiguous().mT),
    "a lazy negative": lambda a: a.__setitem__(1, torch._neg_view(a[1])),
    "history of fp64": lambda a: a[2].__setitem__(0, a[2][0].double()),
    "another shape": lambda a: a.__setitem__(3, a[3][:1]),
    "a parameter": lambda a: a.__setitem__(0, torch.nn.Parameter(a[0])),
    "no elements": lambda a: a.__setitem__(slice(0, 4), [a[0][:0], a[1][:0], [a[2][0][:0]], a[3][:0]]),
    "no memory": lambda a: a.__setitem__(0, a[0].to("meta")),
    "sparse": lambda a: a.__setitem__(0, a[0].to_sparse()),
    "too few coefficients": lambda a: a.__setitem__(4, a[4][:-1]),
    "integers": lambda a: a.__setitem__(4, [1] * len(a[4])),
    "a result of fp64": lambda a: a.__setitem__(7, torch.float64),
    "a tuple of history": lambda a: a.__setitem__(2, tuple(a[2])),
}


@pytest.mark.parametrize("change", _LEFT.values(), ids=_LEFT)
def test_what_is_left_to_the_dispatcher(change: _Changed) -> None:
    arguments = [*_call(), None]
    assert _extension.module.scheduler_step(*arguments) is not NotImplemented  # type: ignore[union-attr]
    change(arguments)
    assert _extension.module.scheduler_step(*arguments) is NotImplemented  # type: ignore[union-attr]

"""scheduler_step: the next sample and the new history entry in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    lower_isas,
    rerun_on,
    run_kernel,
)
from torch import Tensor

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
    shape: tuple[int, ...] = SHAPE,
) -> tuple[Any, ...]:
    """The op's arguments in their order."""
    generator = generator or torch.Generator().manual_seed(0)
    sample, output, drawn, *kept = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3 + history))
    coefficients = PREV + [0.3 / (i + 1) for i in range(history)]
    return sample, output, kept, drawn if noise else None, coefficients, ENTRY if entry else [], clip


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
def test_numerics_without_entry() -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        return (*_call(generator, history=2, entry=False)[:6], None, None, torch.bfloat16), {}

    for seed in range(3):
        args, _ = arguments(torch.Generator().manual_seed(seed))
        following, entry = run_kernel(scheduler_step, *args)
        assert entry.shape == (0,)
        assert entry.dtype == torch.bfloat16
        torch.testing.assert_close(following, scheduler_step.eager(*args)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.numerics
@pytest.mark.parametrize("prev_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("entry_dtype", [None, *DTYPES], ids=str)
def test_mixed_dtypes(prev_dtype: torch.dtype | None, entry_dtype: torch.dtype | None) -> None:
    sample, output, history, noise, *rest = _call(history=3)
    args = sample, output.half(), [history[0].bfloat16(), history[1], history[2].half()], noise.bfloat16(), *rest
    ours = run_kernel(scheduler_step, *args, prev_dtype, entry_dtype)
    exact = scheduler_step.eager(*_wide(args), torch.float64, torch.float64)
    for got, want, dtype in zip(ours, exact, (prev_dtype or torch.float32, entry_dtype or torch.float16), strict=True):
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


@pytest.mark.parametrize("isa", lower_isas())
def test_other_instruction_sets(isa: str) -> None:
    rerun_on(isa, __file__)


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
    clip=st.none() | st.floats(0, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_any_call(
    numel: int, history: int, noise: bool, entry: bool, clip: float | None, dtype: torch.dtype
) -> None:
    args = _call(None, dtype, history=history, noise=noise, entry=entry, clip=clip, shape=(numel,))
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
    assert_same_nonfinite(scheduler_step, sample, output, *rest[:-1], 1.0)


def test_results_are_new_tensors() -> None:
    sample, output, *_ = _call(history=0)
    following, entry = run_kernel(scheduler_step, sample, output, [], None, [1.0, 0.0, 0.0, 0.0], [0.0, 1.0])
    assert torch.equal(following, sample)
    assert torch.equal(entry, output)
    assert len({t.data_ptr() for t in (sample, output, following, entry)}) == 4


def test_falls_back_with_a_reason() -> None:
    args = _call()
    cases = {
        "float64": _wide(args),
        "9 history tensors": _call(history=9),
        "neither contiguous nor channels_last": (args[0].mT, args[1].mT, [args[2][0].mT], None, *args[4:]),
        "result's dtype": (*args, torch.float64),
    }
    for reason, call in cases.items():
        choice = scheduler_step.choose(*call)
        assert choice.backend == "eager"
        assert reason in choice.reason
        torch.testing.assert_close(scheduler_step(*call), scheduler_step.eager(*call))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in scheduler_step.choose(*args).reason


def test_bad_arguments() -> None:
    sample, output, history, noise, prev, entry, _ = _call()
    other = sample[:, 1:]
    for arguments, message in (
        ((sample, other, history, noise, prev, entry), r"model_output has shape \(2, 3, 9, 13\)"),
        ((sample, output, [other], noise, prev, entry), "a history tensor has shape"),
        ((sample, output, history, other, prev, entry), "noise has shape"),
        ((sample, output, history, noise, prev[:4], entry), "prev has 4 coefficients, expected 4 and 1"),
        ((sample, output, history, noise, prev, [1.0]), "entry has 1 coefficients"),
        ((sample, output, history, noise, prev, entry, -1.0), "clip is -1.0"),
        ((sample, output, history, noise, prev, entry, float("nan")), "clip is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler_step(*arguments)


def test_gradients() -> None:
    assert_gradients(scheduler_step, *_call(history=2, clip=1.0))


def test_opcheck() -> None:
    torch.library.opcheck(scheduler_step.overload, _call(history=2))
    torch.library.opcheck(scheduler_step.overload, (*_call(entry=False), None, torch.bfloat16))


def test_compile() -> None:
    assert_compiles(scheduler_step, *_call(history=2, clip=1.0))

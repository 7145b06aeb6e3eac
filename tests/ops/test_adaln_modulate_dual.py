"""adaln_modulate_dual: two adaptive modulations of one norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation import LAYOUTS, assert_close_to_exact, modulations, rows
from numerics import (
    DTYPES,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff.ops import adaln_modulate, adaln_modulate_dual

pytestmark = pytest.mark.kernel

SHAPE = (2, 9, 77)


def _inputs(
    dtype: torch.dtype = torch.float32,
    layout: str = "sample",
    other: torch.dtype | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[Tensor, ...]:
    """x, and two scales and shifts as SD3.5 has them: among the nine slices of one projection."""
    generator = torch.Generator().manual_seed(0)
    shift, scale, _, _, _, _, shift2, scale2, _ = modulations(generator, layout, 9, shape, other or dtype)
    return rows(generator, *shape, dtype=dtype), scale, shift, scale2, shift2


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("layout", "columns"), [*((layout, 77) for layout in LAYOUTS), ("sample", 8195), ("token", 8200)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_results_are_those_of_adaln_modulate(dtype: torch.dtype, layout: str, columns: int, rms: bool) -> None:
    """Bit for bit; so its numerics tests hold here too."""
    shape = SHAPE if columns == 77 else (2, 1, columns)
    x, scale, shift, scale2, shift2 = _inputs(dtype, layout, torch.float32, shape)
    norm: dict[str, Any] = {"weight": torch.randn(columns), "bias": torch.randn(columns).to(dtype), "rms": rms}
    found = run_kernel(adaln_modulate_dual, x, scale, shift, scale2, shift2, **norm)
    for ours, modulation in zip(found, ((scale, shift), (scale2, shift2)), strict=True):
        assert torch.equal(ours, run_kernel(adaln_modulate, x, *modulation, **norm))
    assert not torch.equal(*found)


@pytest.mark.numerics
@pytest.mark.parametrize(("first", "second"), [("sample", "token"), ("token", "vector")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulations_of_two_layouts(dtype: torch.dtype, first: str, second: str) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        both = (modulations(generator, layout, 2, SHAPE, dtype) for layout in (first, second))
        return (rows(generator, *SHAPE, dtype=dtype), *(t for pair in both for t in pair)), {}

    assert_numerics(adaln_modulate_dual, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_out_dtype(out_dtype: torch.dtype) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        modulation = modulations(generator, "sample", 4, SHAPE, torch.float16)
        return (rows(generator, *SHAPE, dtype=torch.float16), *modulation), {"out_dtype": out_dtype}

    assert_numerics(adaln_modulate_dual, arguments)
    args, kwargs = arguments(torch.Generator())
    assert {y.dtype for y in run_kernel(adaln_modulate_dual, *args, **kwargs)} == {out_dtype}


@pytest.mark.parametrize("missing", range(1, 5))
def test_absent_modulations(missing: int) -> None:
    arguments: list[Any] = list(_inputs())
    arguments[missing] = None
    assert_close_to_exact(adaln_modulate_dual, *arguments)


def test_eager_is_what_diffusers_computes() -> None:
    x, scale, shift, scale2, shift2 = _inputs(torch.bfloat16)
    y = F.layer_norm(x, (SHAPE[-1],), eps=1e-6)
    found = adaln_modulate_dual.eager(x, scale, shift, scale2, shift2)
    assert torch.equal(found[0], y * (1 + scale[:, None]) + shift[:, None])
    assert torch.equal(found[1], y * (1 + scale2[:, None]) + shift2[:, None])


def test_results_are_two_tensors() -> None:
    """Without modulations, too, where they are equal."""
    (x, *_) = _inputs()
    for first, second in (run_kernel(adaln_modulate_dual, x), adaln_modulate_dual.eager(x)):
        assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 200)))
    dtype, other = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = rows(generator, *shape, dtype=dtype, offset=data.draw(st.sampled_from([0.0, 8.0])))
    x = x[:, :: data.draw(st.integers(1, 3))]
    pairs = [
        modulations(generator, data.draw(st.sampled_from(LAYOUTS)), 2, tuple(x.shape), other) for _ in range(2)
    ]
    assert_close_to_exact(adaln_modulate_dual, x, *pairs[0], *pairs[1], rms=data.draw(st.booleans()), eps=1e-5)


@pytest.mark.parametrize("shape", [(7, 77), (77,), (2, 3, 4, 77), (2, 3, 2, 2, 77), (0, 5, 77), (2, 3, 0)])
def test_ranks_and_empty_tensors(shape: tuple[int, ...]) -> None:
    vector, full = torch.randn(shape[-1:]), torch.randn(shape)
    assert_close_to_exact(adaln_modulate_dual, torch.randn(shape), vector, full, full, vector)


@pytest.mark.numerics
def test_nonfinite() -> None:
    x, scale, shift, scale2, shift2 = _inputs()
    x[0, 1, 3], x[0, 2, 5], scale[1, 1], shift2[1, 0] = float("nan"), float("inf"), float("nan"), float("inf")
    assert_same_nonfinite(adaln_modulate_dual, x, scale, shift, scale2, shift2)


def test_falls_back_with_a_reason() -> None:
    x, *modulation = _inputs()
    every_second = torch.randn(2, 2 * SHAPE[-1])[:, ::2]
    cases = {
        "float64": (x.double(), *modulation),
        "last axis": (x, *modulation[:3], every_second),
        "more than 5": (x[None, None, None], None, modulation[1][0]),
        "a tensor is float64": (x, *modulation[:2], modulation[2].double()),
    }
    for reason, arguments in cases.items():
        choice = adaln_modulate_dual.choose(*arguments)
        assert choice.backend == "eager" and reason in choice.reason
        torch.testing.assert_close(adaln_modulate_dual(*arguments), adaln_modulate_dual.eager(*arguments))
    assert "out_dtype is float64" in adaln_modulate_dual.choose(x, out_dtype=torch.float64).reason


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scale": torch.zeros(3, 77)}, r"scale has shape \(3, 77\)"),
        ({"scale2": torch.zeros(3, 77)}, r"scale2 has shape \(3, 77\)"),
        ({"shift2": torch.zeros(2, 4, 77)}, r"shift2 has shape \(2, 4, 77\)"),
        ({"weight": torch.zeros(2, 77)}, r"weight has shape \(2, 77\), expected \(77,\)"),
        ({"out_dtype": torch.int32}, "out_dtype"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaln_modulate_dual(torch.zeros(SHAPE), **keywords)


def test_gradients() -> None:
    x, *modulation = _inputs()
    assert_gradients(adaln_modulate_dual, x, *modulation, torch.randn(SHAPE[-1]), torch.randn(SHAPE[-1]))


def test_opcheck() -> None:
    x, *modulation = _inputs()
    torch.library.opcheck(adaln_modulate_dual.overload, (x, *modulation))
    torch.library.opcheck(adaln_modulate_dual.overload, (x,), {"rms": True, "out_dtype": torch.bfloat16})


def test_compile() -> None:
    assert_compiles(adaln_modulate_dual, *_inputs(torch.bfloat16))

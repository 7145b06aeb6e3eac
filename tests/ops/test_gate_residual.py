"""gate_residual and gate_residual_adaln: a gated branch added to its residual, and the norm that follows."""

from __future__ import annotations

import pytest
import torch
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

from fastdiff.ops import adaln_modulate, gate_residual, gate_residual_adaln

pytestmark = pytest.mark.kernel

SHAPE = (2, 9, 77)


def _inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    layout: str = "sample",
    other: torch.dtype | None = None,
    shape: tuple[int, int, int] = SHAPE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate, scale, shift = modulations(generator, layout, 3, shape, other or dtype)
    x, residual = (rows(generator, *shape, dtype=dtype) for _ in range(2))
    return x, gate, residual, scale, shift


@pytest.mark.numerics
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype, layout: str) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        return _inputs(generator, dtype, layout)[:3], {}

    assert_numerics(gate_residual, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("layout", "columns"), [*((layout, 77) for layout in LAYOUTS), ("sample", 8195), ("token", 8200)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_results_are_those_of_the_two_ops(dtype: torch.dtype, layout: str, columns: int, rms: bool) -> None:
    """Bit for bit; so the numerics tests of the two ops hold here too."""
    shape = SHAPE if columns == 77 else (2, 1, columns)
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), dtype, layout, torch.float32, shape)
    weight, bias = torch.randn(columns), torch.randn(columns).to(dtype)
    y, normed = run_kernel(gate_residual_adaln, x, gate, residual, scale, shift, weight, bias, rms=rms)
    assert torch.equal(y, run_kernel(gate_residual, x, gate, residual))
    assert torch.equal(normed, run_kernel(adaln_modulate, y, scale, shift, weight, bias, rms=rms))


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("columns", [77, 320, 8195])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_gate(dtype: torch.dtype, columns: int, rms: bool) -> None:
    """The sum bit for bit torch's, its norm that of the other op."""
    x, _, residual, *_ = _inputs(torch.Generator().manual_seed(0), dtype, shape=(2, 3, columns))
    weight, bias = torch.randn(columns), torch.randn(columns).to(dtype)
    for strided in (x, x.transpose(0, 1)):
        other = residual if strided is x else residual.transpose(0, 1)
        y, normed = run_kernel(gate_residual_adaln, strided, None, other, None, None, weight, bias, rms=rms)
        assert torch.equal(y, strided + other) and y.is_contiguous()
        assert torch.equal(normed, run_kernel(adaln_modulate, y, None, None, weight, bias, rms=rms))
    for layout in LAYOUTS:
        modulation = modulations(torch.Generator().manual_seed(1), layout, 2, x.shape, dtype)
        _, normed = run_kernel(gate_residual_adaln, x, None, residual, *modulation, rms=rms)
        assert torch.equal(normed, run_kernel(adaln_modulate, x + residual, *modulation, rms=rms))


def test_eager_is_what_diffusers_computes() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.bfloat16)
    y = residual + gate[:, None] * x
    eager_y, eager_normed = gate_residual_adaln.eager(x, gate, residual, scale, shift)
    assert torch.equal(eager_y, y)
    assert torch.equal(eager_normed, adaln_modulate.eager(y, scale, shift))
    eager_y, eager_normed = gate_residual_adaln.eager(x, None, residual, scale, shift)
    assert torch.equal(eager_y, residual + x)
    assert torch.equal(eager_normed, adaln_modulate.eager(residual + x, scale, shift))


def test_strided_and_ranks() -> None:
    x = torch.randn(2, 77, 9, 40).permute(0, 2, 1, 3)[:, ::2, 1:]
    residual = torch.randn(5, 2, 76, 40).transpose(0, 1)
    assert_close_to_exact(gate_residual, x, torch.randn(2, 80).chunk(2, 1)[1], residual)
    assert_close_to_exact(gate_residual, x, torch.randn(2, 5, 1, 40), residual)
    assert_close_to_exact(gate_residual, torch.randn(7, 33), torch.randn(7, 33), torch.randn(7, 33))
    assert_close_to_exact(gate_residual, torch.randn(2, 0, 8), torch.randn(2, 8), torch.randn(2, 0, 8))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 200)))
    dtype, other = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    (gate,) = modulations(generator, data.draw(st.sampled_from(LAYOUTS)), 1, shape, other)
    x, residual = (rows(generator, *shape, dtype=dtype) for _ in range(2))
    assert_close_to_exact(gate_residual, x, gate, residual)


@pytest.mark.numerics
def test_nonfinite() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.float32)
    x[0, 1, 3], residual[0, 2, 5], gate[1, 7] = float("nan"), float("inf"), -float("inf")
    assert_same_nonfinite(gate_residual, x, gate, residual)
    assert_same_nonfinite(gate_residual_adaln, x, gate, residual, scale, shift)


def test_falls_back_with_a_reason() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.float32)
    for op, rest in ((gate_residual, ()), (gate_residual_adaln, (scale, shift))):
        assert "float64" in op.choose(x.double(), gate, residual.double(), *rest).reason
        assert "x is float32 and residual bfloat16" in op.choose(x, gate, residual.bfloat16(), *rest).reason
        assert "last axis" in op.choose(x, gate, residual.mT.contiguous().mT, *rest).reason
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in op.choose(x, gate, residual, *rest).reason
    mixed = gate_residual(x, gate, residual.bfloat16())
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, gate_residual.eager(x, gate, residual.bfloat16()))


def test_bad_arguments() -> None:
    x, gate, residual, *_ = _inputs(torch.Generator().manual_seed(0), torch.float32)
    with pytest.raises(ValueError, match=r"residual has shape \(2, 8, 77\)"):
        gate_residual(x, gate, residual[:, 1:])
    with pytest.raises(ValueError, match=r"gate has shape \(2, 76\)"):
        gate_residual_adaln(x, gate[:, 1:], residual)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 9, 76\)"):
        gate_residual_adaln(x, gate, residual, torch.zeros(1, 9, 76))
    with pytest.raises(ValueError, match=r"residual is torch\.int64"):
        gate_residual(x, gate, residual.long())


def test_gradients() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.float32)
    assert_gradients(gate_residual, x, gate, residual)
    assert_gradients(gate_residual_adaln, x, gate, residual, scale, shift)
    assert_gradients(gate_residual_adaln, x, None, residual, scale, shift)


def test_opcheck() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.float32)
    torch.library.opcheck(gate_residual.overload, (x, gate, residual))
    torch.library.opcheck(gate_residual_adaln.overload, (x, gate, residual, scale, shift))
    torch.library.opcheck(gate_residual_adaln.overload, (x, None, residual, scale))


def test_compile() -> None:
    x, gate, residual, scale, shift = _inputs(torch.Generator().manual_seed(0), torch.bfloat16)
    assert_compiles(gate_residual, x, gate, residual)
    assert_compiles(gate_residual_adaln, x, gate, residual, scale, shift)

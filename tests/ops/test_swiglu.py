"""swiglu: the gated activation of two projections."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation import assert_close_to_exact
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

from fastdiff.ops import swiglu

pytestmark = pytest.mark.kernel


def _halves(generator: torch.Generator, *shape: int, dtype: torch.dtype, dim: int = -1) -> tuple[Tensor, Tensor]:
    gate, x = torch.randn(shape, generator=generator).mul(3).to(dtype).chunk(2, dim)
    return gate, x


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [-1, 1])
def test_numerics(dtype: torch.dtype, dim: int) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        return _halves(generator, 2, 14, 3, 154, dtype=dtype, dim=dim), {}

    assert_numerics(swiglu, arguments)


def test_eager_is_what_diffusers_computes() -> None:
    gate, x = _halves(torch.Generator().manual_seed(0), 2, 5, 66, dtype=torch.bfloat16)
    assert torch.equal(swiglu.eager(gate, x), F.silu(gate) * x)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300))
    gate, x = _halves(generator, rows, 3, 2 * columns, dtype=dtype)
    if columns > 1:
        assert_close_to_exact(swiglu, gate, x)
        assert_close_to_exact(swiglu, gate, x.contiguous())
    assert_close_to_exact(swiglu, gate.contiguous(), x.contiguous())


@pytest.mark.parametrize("shape", [(7,), (0, 4), (2, 0), (2, 1, 5)])
def test_ranks_and_empty_tensors(shape: tuple[int, ...]) -> None:
    assert_close_to_exact(swiglu, torch.randn(shape), torch.randn(shape))


def test_nonfinite() -> None:
    gate, x = _halves(torch.Generator().manual_seed(0), 3, 70, dtype=torch.float32)
    gate[0, :4] = torch.tensor([float("nan"), float("inf"), -1e30, 1e30])
    x[1, 0] = float("nan")
    assert_same_nonfinite(swiglu, gate, x)


def test_falls_back_with_a_reason() -> None:
    x = torch.randn(4, 6, 8)
    for reason, arguments in {
        "float64": (x.double(), x.double()),
        "evenly strided": (x.mT, x.mT.contiguous()),
        "rows of one length": (x[:, :, :4], torch.randn(4, 6, 4)[:, :6].transpose(0, 1).contiguous().transpose(0, 1)),
    }.items():
        choice = swiglu.choose(*arguments)
        assert choice.backend == "eager"
        assert reason in choice.reason
        torch.testing.assert_close(swiglu(*arguments), swiglu.eager(*arguments))
    assert run_kernel(swiglu, x[:, :, :4], x[:, :, 4:]).is_contiguous()


def test_bad_arguments() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"gate is torch.float32 of shape \(2, 4\) and x .*\(2, 3\)"):
        swiglu(x, x[:, :3])
    with pytest.raises(ValueError, match="bfloat16"):
        swiglu(x, x.bfloat16())
    with pytest.raises(RuntimeError, match="fastdiff: swiglu"):
        swiglu.overload(x, x[:, :3])


def test_gradients_opcheck_and_compile() -> None:
    gate, x = _halves(torch.Generator().manual_seed(0), 2, 5, 66, dtype=torch.float32)
    assert_gradients(swiglu, gate, x)
    torch.library.opcheck(swiglu.overload, (gate, x))
    assert_compiles(swiglu, gate.bfloat16(), x.bfloat16())

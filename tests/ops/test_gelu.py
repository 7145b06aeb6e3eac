"""geglu and gelu_tanh: the feed-forward activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation import assert_close_to_exact
from numerics import (
    DTYPES,
    EXP_ULPS,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff.ops import geglu, gelu_tanh
from fastdiff.ops._library import FusedOp

pytestmark = pytest.mark.kernel

BOTH = pytest.mark.parametrize("op", [geglu, gelu_tanh], ids=lambda op: op.name)


@pytest.mark.numerics
@BOTH
# The largest gates reach where 1 + erf is 0 or 2 in fp32; the smallest are where gelu(x) is x / 2.
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(op: FusedOp[..., Any], dtype: torch.dtype, spread: float) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        return ((torch.randn(9, 154, generator=generator) * spread).to(dtype),), {}

    assert_numerics(op, arguments)


def _gelu(dtype: torch.dtype, which: str, x: Tensor) -> Tensor:
    if which == "tanh":
        return run_kernel(gelu_tanh, x)
    return run_kernel(geglu, torch.cat([torch.ones_like(x), x], -1))


@pytest.mark.numerics
@pytest.mark.parametrize("which", ["none", "tanh"])
def test_every_value_in_fp32(which: str) -> None:
    """Within a few ulp of the result, plus 1e-9 where gelu has all but vanished; monotone where gelu is."""
    x = torch.linspace(-13, 13, 400_001)
    ours = _gelu(torch.float32, which, x)
    exact = F.gelu(x.double(), approximate=which)
    if which == "none":  # torch's fp64 form cancels below -5
        exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error = (ours.double() - exact).abs()
    ulp = torch.finfo(torch.float32).eps * exact.abs()
    outer = x < -2  # the tail: t q(t) with an error of q that grows with t^2
    assert (error[~outer] <= EXP_ULPS * ulp[~outer] + 1e-9).all()
    assert (error[outer] <= 20 * ulp[outer] + 4e-9).all()
    assert torch.equal(ours[x > 6], x[x > 6])


@pytest.mark.numerics
@pytest.mark.parametrize("which", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_in_half_precision(dtype: torch.dtype, which: str) -> None:
    """All 65536 bit patterns: the correctly rounded result or its neighbour."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)]
    ours = _gelu(dtype, which, x)
    wide = x.double()
    exact = wide * torch.special.erfc(-wide / 2**0.5) / 2 if which == "none" else F.gelu(wide, approximate="tanh")
    info = torch.finfo(dtype)
    bound = 0.53 * info.eps * exact.abs() + max(info.smallest_normal * info.eps, 2e-8)
    assert ((ours.double() - exact).abs() <= bound).all()


@BOTH
@pytest.mark.parametrize("shape", [(2,), (3, 30), (3, 32), (2, 5, 34), (2, 3, 4, 66), (0, 8), (4, 0), (3, 9000)])
def test_shapes(op: FusedOp[..., Any], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert_close_to_exact(op, x)
    assert op(x).shape == (shape if op is gelu_tanh else (*shape[:-1], shape[-1] // 2))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), half=st.integers(1, 300), dtype=st.sampled_from(DTYPES), spread=st.floats(0.1, 4))
def test_any_shape(rows: int, half: int, dtype: torch.dtype, spread: float) -> None:
    x = (torch.randn(rows, 2 * half) * spread).to(dtype)
    x[:, half - 1] = x[:, -1] = 1  # the error is judged against the largest output, which must not be tiny
    assert_close_to_exact(geglu, x)
    assert_close_to_exact(gelu_tanh, x)


@pytest.mark.numerics
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite(op: FusedOp[..., Any], dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[0, 1], x[1, 2], x[2, 40], x[3, 41], x[3, 3] = (float(v) for v in ("nan", "inf", "nan", "inf", "-inf"))
    if op is gelu_tanh:
        # gelu(-Inf): its limit 0 here (to 1e-20), NaN (-Inf * 0) in eager.
        assert abs(run_kernel(op, x)[3, 3].item()) < 1e-20
        x[3, 3] = 0
    assert_same_nonfinite(op, x)


@BOTH
def test_falls_back_with_a_reason(op: FusedOp[..., Any]) -> None:
    x = torch.randn(8, 32)
    assert "float64" in op.choose(x.double()).reason
    assert "not contiguous" in op.choose(x.t()).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in op.choose(x).reason
    torch.testing.assert_close(op(x.t()), op.eager(x.t()))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 7\), expected floating point"):
        geglu(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="int64"):
        geglu(torch.zeros(4, 8, dtype=torch.int64))


@BOTH
def test_gradients(op: FusedOp[..., Any]) -> None:
    assert_gradients(op, torch.randn(3, 34))


@BOTH
def test_opcheck(op: FusedOp[..., Any]) -> None:
    torch.library.opcheck(op.overload, (torch.randn(3, 34),))


@BOTH
def test_compile(op: FusedOp[..., Any]) -> None:
    assert_compiles(op, torch.randn(3, 34))

"""Device functions that several kernels use. All take and give fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

_NAN = tl.constexpr(tl.PropagateNan.ALL)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a function that kernels call. The interpreter runs plain Python; its jit costs 1 ms a call."""
    return function if INTERPRETED.value else triton.jit(function)


@device
def store(pointer, value, inside):
    """Store fp32 values in the pointer's type, rounded to nearest."""
    tl.store(pointer, cast(value, pointer.dtype.element_ty), inside)


@device
def cast(value, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@device
def silu(x):
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@device
def gelu_tanh(x):
    """``x / (1 + 2^z)`` with ``z = -2 log2(e) sqrt(2/pi) (x + 0.044715 x^3)``: the same as
    ``0.5 x (1 + tanh(...))`` without its cancellation for negative x."""
    v = tl.maximum(x, -9.9, propagate_nan=_NAN)  # there the result is already below 1e-35
    w = tl.minimum(v, 9.9, propagate_nan=_NAN)
    slope = w * w * (-2.3022081983 * 0.044715) + -2.3022081983
    return v / (1.0 + tl.exp2(w * slope))


@device
def gelu_erf(x):
    """``max(x, 0) - t q(t)`` with ``t = |x|`` and ``q(t) = 1 - Phi(t) = 2^(t r(t)) / 2``; r is the minimax
    polynomial of ``csrc/cpu/gelu.h``. No cancellation for negative x, unlike ``1 + erf(x / sqrt(2))``."""
    t = tl.minimum(tl.abs(x), 10.0, propagate_nan=_NAN)
    r = t * 2.10219286e-09 + -8.74626309e-08
    r = r * t + 1.55415921e-06
    r = r * t + -1.54954851e-05
    r = r * t + 9.39898673e-05
    r = r * t + -0.000320785301
    r = r * t + 5.73999678e-05
    r = r * t + 0.00690166233
    r = r * t + -0.0524232052
    r = r * t + -0.459223717
    r = r * t + -1.15110409
    return tl.maximum(x, 0.0) - t * (0.5 * tl.exp2(t * r))


@device
def merge(count, mean, m2):
    """Moments (mean, sum of squared deviations) of the union along axis 0 (Chan, Golub and LeVeque, 1983).

    ``count`` (N, 1) or (N, M), ``mean`` and ``m2`` (N, M); an entry of count 0 has mean and m2 0.
    """
    total = tl.sum(count, axis=0)
    total = tl.maximum(total, 1.0)
    center = tl.sum(mean * count, axis=0) / total
    # The sum's rounding error matters where the mean is large against the deviation.
    center += tl.sum((mean - center[None, :]) * count, axis=0) / total
    deviation = mean - center[None, :]
    return center, tl.sum(m2 + deviation * deviation * count, axis=0)


@device
def merge_all(count, mean, m2):
    """:func:`merge` of vectors, to scalars. Not as columns: a layout of one may give every thread all of it, in 3.6."""
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    center = tl.sum(mean * count, axis=0) / total
    center += tl.sum((mean - center) * count, axis=0) / total
    deviation = mean - center
    return center, tl.sum(m2 + deviation * deviation * count, axis=0)

"""The kernels of the ops on rows (..., D): a gated residual, then a norm with one modulation or two, or one of these.

The axes before the last are folded to at most three, for all tensors alike, with strides of their own (0 where a
tensor is broadcast), so that ``chunk`` slices are read in place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends._gpu import Layout, fold
from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp32, i32, i64, kernel, power_of_2, processors

NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2
#: Longer rows are read in blocks.
LONGEST = 8192
BLOCK = 4096


@_math.device
def _load(pointer, offset, inside):
    return tl.load(pointer + offset, inside, other=0.0).to(tl.float32)


@_math.device
def _modulated(xhat, weight, bias, scale, shift, column, inside):
    """The affine map and the modulation; an absent tensor is None, one at its row a pointer."""
    if weight is not None:
        xhat *= _load(weight, column, inside)
    if bias is not None:
        xhat += _load(bias, column, inside)
    if scale is not None:
        xhat *= 1.0 + _load(scale, column, inside)
    if shift is not None:
        xhat += _load(shift, column, inside)
    return xhat


@_math.device
def _finish(value, factor, term, scale, shift, scale_row, shift_row, column, out, at, valid, PER_ROW: tl.constexpr):
    """Store ``value * factor + term``, first modulated row by row if ``PER_ROW``."""
    value = value * factor + term
    if PER_ROW:
        if scale is not None:
            value *= 1.0 + _load(scale, scale_row + column, valid)
        if shift is not None:
            value += _load(shift, shift_row + column, valid)
    _math.store(out + at, value, valid)


@kernel
def _in_registers(
    x, gate, residual, scale, shift, scale2, shift2, weight, bias, y, out, out2,
    width_v: i32, n1: i32, n2: i32, tiles: i32, rows: i32,
    x0: i64, x1: i64, x2: i64, g0: i64, g1: i64, g2: i64, r0: i64, r1: i64, r2: i64,
    a0: i64, a1: i64, a2: i64, b0: i64, b1: i64, b2: i64,
    c0: i64, c1: i64, c2: i64, d0: i64, d1: i64, d2: i64, eps: fp32,
    VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PER_ROW: tl.constexpr,
):
    """Each program: up to ``rows`` rows of the innermost folded axis, ROWS at a time, held in registers.

    Parameters that are the same for all of them (not ``PER_ROW``) are loaded once.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    i1 = (pid // tiles % n1).to(tl.int64)
    i0 = (pid // tiles // n1).to(tl.int64)
    width = width_v * VEC
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    x += (i0 * x0 + i1 * x1) * VEC
    target = (i0 * n1 + i1) * n2
    if gate is not None:
        gate += (i0 * g0 + i1 * g1) * VEC
    if residual is not None:
        residual += (i0 * r0 + i1 * r1) * VEC
    if scale is not None:
        scale += (i0 * a0 + i1 * a1) * VEC
    if shift is not None:
        shift += (i0 * b0 + i1 * b1) * VEC
    if scale2 is not None:
        scale2 += (i0 * c0 + i1 * c1) * VEC
    if shift2 is not None:
        shift2 += (i0 * d0 + i1 * d1) * VEC
    # The parameters as one map, xhat * factor + term.
    factor = tl.full([1, BLOCK], 1.0, tl.float32)
    term = tl.zeros([1, BLOCK], tl.float32)
    if NORM:
        factor = _modulated(factor, weight, None, None, None, column, inside)
        term = _modulated(term, None, bias, None, None, column, inside)
        factor2, term2 = factor, term
        if not PER_ROW:
            if out2 is not None:
                factor2 = _modulated(factor, None, None, scale2, None, column, inside)
                term2 = _modulated(term, None, None, scale2, shift2, column, inside)
            factor = _modulated(factor, None, None, scale, None, column, inside)
            term = _modulated(term, None, None, scale, shift, column, inside)
    if gate is not None and not PER_ROW:
        gates = _load(gate, column, inside)
    first = tile * rows
    end = tl.minimum(first + rows, n2)
    for start in range(first, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        valid = (row < end) & inside
        row = row.to(tl.int64)
        row_v = row * VEC  # multiplied first, or ptxas spills
        value = _load(x, row * x2 * VEC + column, valid)
        at = (target + row) * width + column
        if residual is not None:
            base = _load(residual, row * r2 * VEC + column, valid)
            if gate is not None:
                if PER_ROW:
                    gates = _load(gate, row * g2 * VEC + column, valid)
                value = base + gates * value
            else:
                value = base + value
            rounded = _math.cast(value, y.dtype.element_ty)
            tl.store(y + at, rounded, valid)
            value = rounded.to(tl.float32)
        if NORM:
            if NORM == 1:
                value -= tl.sum(value, axis=1)[:, None] / width
                value = tl.where(inside, value, 0.0)
            value *= tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
            _finish(value, factor, term, scale, shift, row_v * a2, row_v * b2, column, out, at, valid, PER_ROW)
            if out2 is not None:
                _finish(value, factor2, term2, scale2, shift2, row_v * c2, row_v * d2, column, out2, at, valid, PER_ROW)


@kernel
def _in_blocks(
    x, gate, residual, scale, shift, scale2, shift2, weight, bias, y, out, out2,
    width_v: i32, n1: i32, n2: i32, tiles: i32, rows: i32,
    x0: i64, x1: i64, x2: i64, g0: i64, g1: i64, g2: i64, r0: i64, r1: i64, r2: i64,
    a0: i64, a1: i64, a2: i64, b0: i64, b1: i64, b2: i64,
    c0: i64, c1: i64, c2: i64, d0: i64, d1: i64, d2: i64, eps: fp32,
    VEC: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):
    """The same for rows of any length, one a program: read once for the moments, once more for the result."""
    pid = tl.program_id(0)
    i2 = (pid % n2).to(tl.int64)
    i1 = (pid // n2 % n1).to(tl.int64)
    i0 = (pid // n2 // n1).to(tl.int64)
    width = width_v * VEC
    x += (i0 * x0 + i1 * x1 + i2 * x2) * VEC
    target = pid.to(tl.int64) * width
    if NORM:
        out += target
    if out2 is not None:
        out2 += target
    if gate is not None:
        gate += (i0 * g0 + i1 * g1 + i2 * g2) * VEC
    if residual is not None:
        residual += (i0 * r0 + i1 * r1 + i2 * r2) * VEC
        y += target
    if scale is not None:
        scale += (i0 * a0 + i1 * a1 + i2 * a2) * VEC
    if shift is not None:
        shift += (i0 * b0 + i1 * b1 + i2 * b2) * VEC
    if scale2 is not None:
        scale2 += (i0 * c0 + i1 * c1 + i2 * c2) * VEC
    if shift2 is not None:
        shift2 += (i0 * d0 + i1 * d1 + i2 * d2) * VEC
    column = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = column < width - start
        value = _load(x, start + column, inside)
        if residual is not None:
            base = _load(residual, start + column, inside)
            if gate is not None:
                value = base + _load(gate, start + column, inside) * value
            else:
                value = base + value
            rounded = _math.cast(value, y.dtype.element_ty)
            tl.store(y + start + column, rounded, inside)
            value = rounded.to(tl.float32)
        if NORM == 1:  # Welford's recurrence in every lane
            count += tl.where(inside, 1.0, 0.0)
            delta = tl.where(inside, value - mean, 0.0)
            mean += delta / tl.maximum(count, 1.0)
            squares += delta * (value - mean)
        elif NORM == 2:
            squares += tl.where(inside, value * value, 0.0)
    if NORM:
        center = 0.0
        if NORM == 1:
            center, total = _math.merge_all(count, mean, squares)
        else:
            total = tl.sum(squares, axis=0)
        rstd = tl.rsqrt(total / width + eps)
        for start in range(0, width, BLOCK):
            inside = column < width - start
            if residual is not None:
                value = _load(y, start + column, inside)
            else:
                value = _load(x, start + column, inside)
            value = (value - center) * rstd
            first = _modulated(value, weight, bias, scale, shift, start + column, inside)
            _math.store(out + start + column, first, inside)
            if out2 is not None:
                second = _modulated(value, weight, bias, scale2, shift2, start + column, inside)
                _math.store(out2 + start + column, second, inside)


class _Plan(NamedTuple):
    """What is the same for all calls with tensors of these sizes and strides."""

    programs: int
    sizes: tuple[int, ...]  # width, n1, n2, tiles, rows
    strides: tuple[int, ...]  # three for each of x, gate, residual, scale, shift, scale2, shift2
    per_row: bool
    divisible: bool


@functools.lru_cache(maxsize=4096)
def _plan(shape: torch.Size, layouts: tuple[Layout | None, ...], tile: int, resident: int) -> _Plan:
    sizes, strides = fold(shape, layouts)
    while len(sizes) < 3:
        sizes, strides = (1, *sizes), tuple((0, *s) for s in strides)
    n0, n1, n2 = sizes
    _, gate, _, *modulations = strides
    per_row = any(s[2] != 0 for s in (gate, *modulations))
    # Rows enough for each program to reuse the parameters, but few enough to fill the device.
    rows = max(1, min(cdiv(n2, tile), 16, n0 * n1 * n2 // tile // resident)) * tile
    tiles = cdiv(n2, rows)
    width = shape[-1]
    flat = tuple(n for stride in strides for n in stride)
    divisible = all(n % WIDE == 0 for n in (width, *flat))
    return _Plan(n0 * n1 * tiles, (width, n1, n2, tiles, rows), flat, per_row, divisible)


Modulation = tuple[Tensor | None, Tensor | None]


def run_rows(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    modulations: tuple[Modulation, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """``residual + gate * x`` (or ``residual + x``) if there is a residual, and its norm with each of at most two
    modulations (scale, shift)."""
    y = None if residual is None else torch.empty(x.shape, dtype=out_dtype, device=x.device)
    outs = tuple(torch.empty(x.shape, dtype=out_dtype, device=x.device) for _ in modulations)
    if not x.numel():
        return y, outs
    width = x.shape[-1]
    block = min(power_of_2(width), LONGEST)
    tuned = config("rows", x.device, block)
    tile = max(1, tuned["elements"] // block)
    absent = 2 - len(modulations)
    placed = (x, gate, residual, *(t for pair in modulations for t in pair), *(None,) * (2 * absent))
    layouts = tuple(None if t is None else (t.shape, t.stride()) for t in placed)
    plan = _plan(x.shape, layouts, tile, tuned["waves"] * processors(x.device))
    tensors = (*placed, weight, bias, y, *outs, *(None,) * absent)
    vec = WIDE if plan.divisible and aligned(*tensors) else 1
    scalars = (width // vec, *plan.sizes[1:], *[n // vec for n in plan.strides], eps)
    if width <= LONGEST:
        constants = (vec, tile, block, norm, plan.per_row)
        _in_registers.launch(plan.programs, tensors, scalars, constants, warps=tuned["warps"])
    else:
        _in_blocks.launch(x.numel() // width, tensors, scalars, (vec, BLOCK, norm), warps=tuned["warps"])
    return y, outs

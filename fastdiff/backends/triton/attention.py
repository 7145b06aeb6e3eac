"""Attention: a flash forward (Dao et al., 2022), and a kernel for few keys, which stay on the chip.

A head dimension D is held as D0 + D1, the largest power of two below it and the rest rounded up to one (40 = 32 + 8,
which is held as 32 + 16; 72 and 80 as 64 + 16): padding to the next power of two would cost up to twice the work.
The number of keys of the second kernel is split alike (77 = 64 + 16).
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import FEW_KEYS, Config, config
from fastdiff.backends.triton._launch import (
    INTERPRETED,
    WIDE,
    aligned,
    cdiv,
    fp32,
    i32,
    i64,
    kernel,
    power_of_2,
    processors,
)

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2
#: The smallest operand of a matrix product.
SMALLEST = 16

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@_math.device
def _load(base, row, stride, column, rows, depth, WIDEN: tl.constexpr, EVERY_ROW: tl.constexpr):
    """Rows of a matrix, zero where there are none."""
    inside = (column < depth)[None, :]
    if not EVERY_ROW:
        inside = inside & (row < rows)[:, None]
    value = tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], inside, other=0.0)
    return value.to(tl.float32) if WIDEN else value


@_math.device
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@_math.device
def _logits(
    q0, q1, k0, k1, mask, row, key, m_q, m_k, queries, keys, scale,
    D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EVERY_KEY: tl.constexpr,
):
    """``q k^T``; with an additive mask scaled and masked. Keys that a query does not see have -inf."""
    s = _dot(q0, tl.trans(k0), tl.zeros([q0.shape[0], k0.shape[0]], tl.float32))
    if D1:
        s = _dot(q1, tl.trans(k1), s)
    if MASK:
        inside = (row < queries)[:, None] & (key < keys)[None, :]
        at = mask + row.to(tl.int64)[:, None] * m_q + key.to(tl.int64)[None, :] * m_k
        if MASK == 1:
            s = tl.where(tl.load(at, inside, other=0) != 0, s, float("-inf"))
        else:
            s = s * scale + tl.load(at, inside, other=0.0).to(tl.float32)
    if CAUSAL:
        s = tl.where(key[None, :] <= row[:, None], s, float("-inf"))
    if not EVERY_KEY:
        s = tl.where((key < keys)[None, :], s, float("-inf"))
    return s


@_math.device
def _finish(acc, total):
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@_math.device
def _store(out, row, queries, stride, column, depth, value):
    inside = (row < queries)[:, None] & (column < depth)[None, :]
    _math.store(out + row.to(tl.int64)[:, None] * stride + column[None, :], value, inside)


@_math.device
def _accumulate(
    q0, q1, k0, k1, v0, v1, acc0, acc1, top, total, share, mask, row, key, m_q, m_k, queries, keys, scale, unit,
    D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EVERY_KEY: tl.constexpr,
):
    """One block of keys: the running maximum, sum and weighted sum of values."""
    s = _logits(q0, q1, k0, k1, mask, row, key, m_q, m_k, queries, keys, scale, D1, MASK, CAUSAL, EVERY_KEY)
    new = tl.maximum(top, tl.max(s, axis=1))
    # Of a query that has seen no key yet: exp(-inf - 0) = 0, where -inf - -inf would be NaN.
    safe = tl.where(new == float("-inf"), 0.0, new)
    # Subtracted first: a product rounded before would be off by whole units where logits are huge.
    p = tl.exp2((s - safe[:, None]) * unit)
    decay = tl.exp2((top - safe) * unit)
    total = total * decay + tl.sum(p, axis=1)
    p = p.to(v0.dtype)
    # Of the weights as rounded, so that the result is a mean of the values.
    share = share * decay + tl.sum(p.to(tl.float32), axis=1)
    acc0 = _dot(p, v0, acc0 * decay[:, None])
    if D1:
        acc1 = _dot(p, v1, acc1 * decay[:, None])
    return acc0, acc1, new, total, share


@_math.device
def _step(
    q0, q1, acc0, acc1, top, total, share, k, v, mask, row, first, k_s, v_s, m_q, m_k, queries, keys, scale, unit,
    WIDEN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EVERY_KEY: tl.constexpr,
):
    """One block of keys, from memory."""
    key = first + tl.arange(0, BLOCK)
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, D1 if D1 else 16)
    k0 = _load(k, key, k_s, column0, keys, D, WIDEN, EVERY_KEY)
    v0 = _load(v, key, v_s, column0, keys, D, WIDEN, EVERY_KEY)
    k1, v1 = k0, v0
    if D1:
        k1 = _load(k, key, k_s, column1, keys, D, WIDEN, EVERY_KEY)
        v1 = _load(v, key, v_s, column1, keys, D, WIDEN, EVERY_KEY)
    return _accumulate(
        q0, q1, k0, k1, v0, v1, acc0, acc1, top, total, share, mask, row, key, m_q, m_k, queries, keys, scale, unit,
        D1, MASK, CAUSAL, EVERY_KEY,
    )


@kernel
def _flash(
    q, k, v, mask, out, lse,
    queries: i32, keys: i32, heads: i32, tiles: i32,
    q_b: i64, q_s: i64, q_h: i64, k_b: i64, k_s: i64, k_h: i64, v_b: i64, v_s: i64, v_h: i64,
    m_b: i64, m_h: i64, m_q: i64, m_k: i64, scale: fp32,
    VEC: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    h = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    q += (b * q_b + h * q_h) * VEC
    k += (b * k_b + h * k_h) * VEC
    v += (b * v_b + h * v_h) * VEC
    if MASK:
        mask += b * m_b + h * m_h
    row = tile * M + tl.arange(0, M)
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, D1 if D1 else 16)
    q0 = _load(q, row, q_s * VEC, column0, queries, D, WIDEN, False)
    q1 = q0
    if D1:
        q1 = _load(q, row, q_s * VEC, column1, queries, D, WIDEN, False)
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1 if D1 else 16], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    share = tl.zeros([M], tl.float32)
    # The logits' unit in powers of two; the scale is in them already where a mask was added.
    unit = _LOG2E if MASK == 2 else scale * _LOG2E
    end = keys
    every = keys // N * N
    if CAUSAL:
        end = tl.minimum(keys, tile * M + M)
        every = tl.minimum(every, tile * M // N * N)
    for first in range(0, every, N):
        acc0, acc1, top, total, share = _step(
            q0, q1, acc0, acc1, top, total, share, k, v, mask, row, first, k_s * VEC, v_s * VEC, m_q, m_k,
            queries, keys, scale, unit, WIDEN, N, D, D0, D1, MASK, False, True,
        )
    for first in range(every, end, N):
        acc0, acc1, top, total, share = _step(
            q0, q1, acc0, acc1, top, total, share, k, v, mask, row, first, k_s * VEC, v_s * VEC, m_q, m_k,
            queries, keys, scale, unit, WIDEN, N, D, D0, D1, MASK, CAUSAL, False,
        )
    out += (b * queries * heads + h) * D
    _store(out, row, queries, heads * D, column0, D, _finish(acc0, share))
    if D1:
        _store(out, row, queries, heads * D, column1, D, _finish(acc1, share))
    if lse is not None:
        at = (b * queries + row) * heads + h
        tl.store(lse + at, top * (unit * _LN2) + tl.log(total), row < queries)


@kernel
def _few_keys(
    q, k, v, mask, out, lse,
    queries: i32, keys: i32, heads: i32, tiles: i32, turns: i32,
    q_b: i64, q_s: i64, q_h: i64, k_b: i64, k_s: i64, k_h: i64, v_b: i64, v_s: i64, v_h: i64,
    m_b: i64, m_h: i64, m_q: i64, m_k: i64, scale: fp32,
    VEC: tl.constexpr, M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDEN: tl.constexpr,
):
    """Each program loads one head's keys and values once and takes ``turns`` tiles of queries in turn."""
    pid = tl.program_id(0)
    chunk = pid % tiles
    h = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    q += (b * q_b + h * q_h) * VEC
    k += (b * k_b + h * k_h) * VEC
    v += (b * v_b + h * v_h) * VEC
    if MASK:
        mask += b * m_b + h * m_h
    out += (b * queries * heads + h) * D
    column0 = tl.arange(0, D0)
    column1 = D0 + tl.arange(0, D1 if D1 else 16)
    key0 = tl.arange(0, N0)
    key1 = N0 + tl.arange(0, N1 if N1 else 16)
    k00 = _load(k, key0, k_s * VEC, column0, keys, D, WIDEN, False)
    v00 = _load(v, key0, v_s * VEC, column0, keys, D, WIDEN, False)
    k01, v01, k10, v10, k11, v11 = k00, v00, k00, v00, k00, v00
    if D1:
        k01 = _load(k, key0, k_s * VEC, column1, keys, D, WIDEN, False)
        v01 = _load(v, key0, v_s * VEC, column1, keys, D, WIDEN, False)
    if N1:
        k10 = _load(k, key1, k_s * VEC, column0, keys, D, WIDEN, False)
        v10 = _load(v, key1, v_s * VEC, column0, keys, D, WIDEN, False)
        if D1:
            k11 = _load(k, key1, k_s * VEC, column1, keys, D, WIDEN, False)
            v11 = _load(v, key1, v_s * VEC, column1, keys, D, WIDEN, False)
    unit = _LOG2E if MASK == 2 else scale * _LOG2E
    first = chunk * turns * M
    for start in range(first, tl.minimum(first + turns * M, queries), M):
        row = start + tl.arange(0, M)
        q0 = _load(q, row, q_s * VEC, column0, queries, D, WIDEN, False)
        q1 = q0
        if D1:
            q1 = _load(q, row, q_s * VEC, column1, queries, D, WIDEN, False)
        acc0 = tl.zeros([M, D0], tl.float32)
        acc1 = tl.zeros([M, D1 if D1 else 16], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        share = tl.zeros([M], tl.float32)
        acc0, acc1, top, total, share = _accumulate(
            q0, q1, k00, k01, v00, v01, acc0, acc1, top, total, share, mask, row, key0, m_q, m_k, queries, keys,
            scale, unit, D1, MASK, CAUSAL, False,
        )
        if N1:
            acc0, acc1, top, total, share = _accumulate(
                q0, q1, k10, k11, v10, v11, acc0, acc1, top, total, share, mask, row, key1, m_q, m_k, queries, keys,
                scale, unit, D1, MASK, CAUSAL, False,
            )
        _store(out, row, queries, heads * D, column0, D, _finish(acc0, share))
        if D1:
            _store(out, row, queries, heads * D, column1, D, _finish(acc1, share))
        if lse is not None:
            at = (b * queries + row) * heads + h
            tl.store(lse + at, top * (unit * _LN2) + tl.log(total), row < queries)


@functools.cache
def split(n: int, smallest: int = SMALLEST) -> tuple[int, int]:
    """n as a power of two and the rest, rounded up to a power of two, 0 if there is none."""
    head = max(smallest, power_of_2(n + 1) // 2)
    return (head, 0) if n <= head else (head, max(smallest, power_of_2(n - head)))


@functools.cache
def on_chip(device: torch.device) -> int:
    """Bytes of shared memory one program can have."""
    if device.type == "cpu":
        return 1 << 17
    properties = getattr(torch, device.type).get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 1 << 16)


def split_keys(keys: int) -> tuple[int, int]:
    """Few keys in two parts, neither larger than the registers' share of logits."""
    return (256, 256) if keys > 320 else split(keys)


def few_keys_fit(keys: int, depth: int, itemsize: int, limit: int) -> bool:
    """Whether keys and values of one head stay on the chip, beside a tile of queries and of weights."""
    # So that nothing spills: in fp32 there are no matrix instructions, and the registers hold less.
    most = 128 if itemsize == 4 else FEW_KEYS if depth <= 64 and not split(depth)[1] else 160
    n, d = sum(split_keys(keys)), sum(split(depth))
    return keys <= most and depth <= 256 and (2 * n * d + 64 * (n + d)) * itemsize <= limit


def tuned_for(op: str, size: int, q: Tensor) -> Config:
    """The configuration of ``op`` at a size (head dimension, or number of keys)."""
    return config(op, q.device, "fp32" if q.dtype == torch.float32 else power_of_2(size + 1) // 2)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, queries, heads) if return_lse else 0, dtype=torch.float32)
    if not out.numel():
        return out, lse
    mask_kind = NO_MASK
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        full = attn_mask.expand(batch, heads, queries, keys)
        mask_strides = full.stride()
        mask_kind = BOOLEAN if attn_mask.dtype == torch.bool else ADDITIVE
    strides = [n for t in (q, k, v) for n in t.stride()[:3]]
    vec = WIDE if depth % WIDE == 0 and all(n % WIDE == 0 for n in strides) and aligned(q, k, v, attn_mask) else 1
    # The interpreter's products of bfloat16 are wrong.
    widen = INTERPRETED and q.dtype == torch.bfloat16
    tensors = (q, k, v, attn_mask, out, lse if return_lse else None)
    scalars = (*[n // vec for n in strides], *mask_strides, depth**-0.5 if scale is None else scale)
    shape = (depth, *split(depth), mask_kind, is_causal, widen)
    if few_keys_fit(keys, depth, q.element_size(), on_chip(q.device)):
        tuned = tuned_for("short_attention", keys, q)
        m = tuned["m"]
        programs = tuned["waves"] * processors(q.device)
        turns = max(1, cdiv(queries, m) * batch * heads // programs)
        tiles = cdiv(queries, m * turns)
        sizes = (queries, keys, heads, tiles, turns)
        constants = (vec, m, *split_keys(keys), *shape)
        _few_keys.launch(batch * heads * tiles, tensors, (*sizes, *scalars), constants, warps=tuned["warps"])
    else:
        tuned = tuned_for("attention", depth, q)
        tiles = cdiv(queries, tuned["m"])
        _flash.launch(
            batch * heads * tiles,
            tensors,
            (queries, keys, heads, tiles, *scalars),
            (vec, tuned["m"], tuned["n"], *shape),
            warps=tuned["warps"],
            stages=tuned["stages"],
        )
    return out, lse

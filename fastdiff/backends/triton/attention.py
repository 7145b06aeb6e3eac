"""Attention: a flash forward (Dao et al., 2022), and a kernel for few keys, which stay on the chip.

A head dimension D is held as D0 + D1, the largest power of two below it and the rest rounded up to one (40 = 32 + 8,
which is held as 32 + 16; 72 and 80 as 64 + 16): padding to the next power of two would cost up to twice the work.
The keys of the second kernel are blocks of 64 and a smaller one (77 = 64 + 16, 300 = 4 * 64 + 64).

How many keys stay on the chip, in half precision; with more, and in fp32, the first kernel runs. Architectures that are
not in the table are as sm_80, as far as their shared memory goes (sm_89 is one of them).
Shared memory is the limit but at 160 (of 256: 128): there it is the registers, which more would spill, and on sm_100
tensor memory.

==============  =====  =====  =====  ======
head dimension  sm_80  sm_89  sm_90  sm_100
==============  =====  =====  =====  ======
32              512    512    512    320
64              512    352    512    320
40              160    160    512    160
72, 80          160    160    512    160
88, 96          160    160    512    160
112, 128        160    160    416    160
160             160    96     160    160
256             128    80     128    128
==============  =====  =====  =====  ======
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import Config, config
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
#: Of a head dimension, in one product of fp32.
PART = tl.constexpr(32)
#: Bytes of shared memory for what passes between warps.
SLACK = 1024

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
def _load_transposed(base, row, stride, column, rows, depth, WIDEN: tl.constexpr, EVERY_ROW: tl.constexpr):
    """The same as columns. Not ``tl.trans`` of the above: few keys would wait in registers for a place on the chip."""
    inside = (column < depth)[:, None]
    if not EVERY_ROW:
        inside = inside & (row < rows)[None, :]
    value = tl.load(base + row.to(tl.int64)[None, :] * stride + column[:, None], inside, other=0.0)
    return value.to(tl.float32) if WIDEN else value


@_math.device
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@_math.device
def _products(q, block, D1: tl.constexpr):
    """``q k^T``."""
    q0, q1 = q
    k0, k1, _, _ = block
    s = _dot(q0, k0, tl.zeros([q0.shape[0], k0.shape[1]], tl.float32))
    if D1:
        s = _dot(q1, k1, s)
    return s


@_math.device
def _products_by_parts(q, k, row, key, q_s, k_s, queries, keys, D: tl.constexpr, PART: tl.constexpr):
    """The same of fp32, which has no matrix instruction: a product is unrolled, and of a whole head it would spill."""
    s = tl.zeros([row.shape[0], key.shape[0]], tl.float32)
    for first in tl.range(0, D, PART, num_stages=1):
        column = first + tl.arange(0, PART)
        of_keys = _load_transposed(k, key, k_s, column, keys, D, False, False)
        s = _dot(_load(q, row, q_s, column, queries, D, False, False), of_keys, s)
    return s


@_math.device
def _masked(
    s, mask, row, key, m_q, m_k, queries, keys, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EVERY_KEY: tl.constexpr,
):
    """Products as logits, scaled where an additive mask is added. Keys that a query does not see have -inf."""
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
def _store(out, row, queries, stride, column, depth, value):
    inside = (row < queries)[:, None] & (column < depth)[None, :]
    _math.store(out + row.to(tl.int64)[:, None] * stride + column[None, :], value, inside)


@_math.device
def _accumulate(s, block, state, unit, D1: tl.constexpr):
    """One block of keys and their logits: the running weighted sum of values, maximum and sums of weights."""
    _, _, v0, v1 = block
    acc0, acc1, top, total, share = state
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
def _columns(D0: tl.constexpr, D1: tl.constexpr):
    """Of both parts of a head."""
    return tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 16)


@_math.device
def _load_queries(
    q, row, stride, queries, WIDEN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    column0, column1 = _columns(D0, D1)
    q0 = _load(q, row, stride, column0, queries, D, WIDEN, False)
    q1 = q0
    if D1:
        q1 = _load(q, row, stride, column1, queries, D, WIDEN, False)
    return q0, q1


@_math.device
def _load_keys(
    k, v, key, k_s, v_s, keys,
    WIDEN: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVERY_KEY: tl.constexpr,
):
    """Both parts of a block's keys, and of its values."""
    column0, column1 = _columns(D0, D1)
    k0 = _load_transposed(k, key, k_s, column0, keys, D, WIDEN, EVERY_KEY)
    v0 = _load(v, key, v_s, column0, keys, D, WIDEN, EVERY_KEY)
    k1, v1 = k0, v0
    if D1:
        k1 = _load_transposed(k, key, k_s, column1, keys, D, WIDEN, EVERY_KEY)
        v1 = _load(v, key, v_s, column1, keys, D, WIDEN, EVERY_KEY)
    return k0, k1, v0, v1


@_math.device
def _start(M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The state before any key."""
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = tl.zeros([M, D1 if D1 else 16], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    return acc0, acc1, top, tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)


@_math.device
def _finish(state, out, lse, row, queries, heads, unit, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Store the result and, if wanted, the log-sum-exp; ``out`` and ``lse`` are at their head's first query."""
    acc0, acc1, top, total, share = state
    column0, column1 = _columns(D0, D1)
    share = tl.where(share == 0.0, 1.0, share)[:, None]
    _store(out, row, queries, heads * D, column0, D, acc0 / share)
    if D1:
        _store(out, row, queries, heads * D, column1, D, acc1 / share)
    if lse is not None:
        tl.store(lse + row.to(tl.int64) * heads, top * (unit * _LN2) + tl.log(total), row < queries)


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
    out += (b * queries * heads + h) * D
    if lse is not None:
        lse += b * queries * heads + h
    row = tile * M + tl.arange(0, M)
    both = _load_queries(q, row, q_s * VEC, queries, WIDEN, D, D0, D1)
    # The logits' unit in powers of two; the scale is in them already where a mask was added.
    unit = _LOG2E if MASK == 2 else scale * _LOG2E
    FP32: tl.constexpr = q.dtype.element_ty == tl.float32
    # One loop takes the blocks that need no masking of keys, another the rest. Where a mask is read, or products cost
    # most, that gains little, and one loop is half the code to compile.
    ONE_LOOP: tl.constexpr = MASK or FP32
    end = keys
    every = keys if ONE_LOOP else keys // N * N
    if CAUSAL:
        end = tl.minimum(keys, tile * M + M)
        every = end if ONE_LOOP else tl.minimum(every, tile * M // N * N)
    state = _start(M, D0, D1)
    for first in range(0, every, N):
        key = first + tl.arange(0, N)
        block = _load_keys(k, v, key, k_s * VEC, v_s * VEC, keys, WIDEN, D, D0, D1, not ONE_LOOP)
        if FP32:
            s = _products_by_parts(q, k, row, key, q_s * VEC, k_s * VEC, queries, keys, D, PART)
        else:
            s = _products(both, block, D1)
        s = _masked(s, mask, row, key, m_q, m_k, queries, keys, scale, MASK, CAUSAL and ONE_LOOP, not ONE_LOOP)
        state = _accumulate(s, block, state, unit, D1)
    if not ONE_LOOP:
        # Few blocks, which a pipeline would only unroll.
        for first in tl.range(every, end, N, num_stages=1):
            key = first + tl.arange(0, N)
            block = _load_keys(k, v, key, k_s * VEC, v_s * VEC, keys, WIDEN, D, D0, D1, False)
            s = _products(both, block, D1)
            s = _masked(s, mask, row, key, m_q, m_k, queries, keys, scale, MASK, CAUSAL, False)
            state = _accumulate(s, block, state, unit, D1)
    _finish(state, out, lse, row, queries, heads, unit, D, D0, D1)


@_math.device
def _keys_of(i: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr):
    """The keys of block i, of which the one after COUNT is of size REST."""
    return i * N + tl.arange(0, REST if i == COUNT else N)


@kernel
def _few_keys(
    q, k, v, mask, out, lse,
    queries: i32, keys: i32, heads: i32, tiles: i32, turns: i32,
    q_b: i64, q_s: i64, q_h: i64, k_b: i64, k_s: i64, k_h: i64, v_b: i64, v_s: i64, v_h: i64,
    m_b: i64, m_h: i64, m_q: i64, m_k: i64, scale: fp32,
    VEC: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr,
    HOIST: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WIDEN: tl.constexpr,
):
    """Each program loads one head's keys and values once, COUNT blocks of N and one of REST, and takes ``turns``
    tiles of queries in turn."""
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
    if lse is not None:
        lse += b * queries * heads + h
    BLOCKS: tl.constexpr = COUNT + (1 if REST else 0)
    held = ()
    for i in tl.static_range(BLOCKS):
        key = _keys_of(i, N, COUNT, REST)
        block = _load_keys(k, v, key, k_s * VEC, v_s * VEC, keys, WIDEN, D, D0, D1, i < BLOCKS - 1)
        held = held + (block,)  # type: ignore[assignment]  # noqa: RUF005
    unit = _LOG2E if MASK == 2 else scale * _LOG2E
    first = chunk * turns * M
    # Hoisted out of the loop, the places of all blocks would fill the registers.
    for start in tl.range(first, tl.minimum(first + turns * M, queries), M, disable_licm=not HOIST):
        row = start + tl.arange(0, M)
        both = _load_queries(q, row, q_s * VEC, queries, WIDEN, D, D0, D1)
        state = _start(M, D0, D1)
        for i in tl.static_range(BLOCKS):
            key = _keys_of(i, N, COUNT, REST)
            s = _products(both, held[i], D1)
            s = _masked(s, mask, row, key, m_q, m_k, queries, keys, scale, MASK, CAUSAL, i < BLOCKS - 1)
            state = _accumulate(s, held[i], state, unit, D1)
        _finish(state, out, lse, row, queries, heads, unit, D, D0, D1)


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
    # torch's names for it with CUDA and with XPU; AMD's compute units have 64 KB
    return getattr(properties, "shared_memory_per_block_optin", 0) or getattr(properties, "local_mem_size", 1 << 16)


def few_keys_blocks(keys: int, most: int) -> tuple[int, int, int]:
    """Keys in blocks: their size, at most ``most``, how many there are, and a smaller one for the rest, 0 if none."""
    block = min(split(keys)[0], most)
    count, left = divmod(keys, block)
    rest = max(SMALLEST, power_of_2(left)) if left else 0
    return (block, count + 1, 0) if rest == block else (block, count, rest)


@functools.lru_cache(maxsize=4096)
def _fit(keys: int, depth: int, itemsize: int, limit: int, m: int, n: int, most: int) -> bool:
    """Whether keys and values of one head stay on the chip, beside a tile of queries."""
    if keys > most or depth > 256:
        return False
    block, count, rest = few_keys_blocks(keys, n)
    return (2 * (block * count + rest) + m) * sum(split(depth)) * itemsize + SLACK <= limit


def few_keys_fit(keys: int, depth: int, itemsize: int, device: torch.device) -> bool:
    """Whether the kernel for few keys takes so many."""
    tuned = _short(depth, itemsize, device)
    most = tuned["keys" if depth <= 64 and not split(depth)[1] else "keys_deep"]
    return _fit(keys, depth, itemsize, on_chip(device), tuned["m"], tuned["n"], most)


def _short(depth: int, itemsize: int, device: torch.device) -> Config:
    return config("short_attention", device, "fp32" if itemsize == 4 else sum(split(depth)))


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
    itemsize = q.element_size()
    if few_keys_fit(keys, depth, itemsize, q.device):
        tuned = _short(depth, itemsize, q.device)
        m = tuned["m"]
        programs = tuned["waves"] * processors(q.device)
        turns = max(1, cdiv(queries, m) * batch * heads // programs)
        tiles = cdiv(queries, m * turns)
        sizes: tuple[int, ...] = (queries, keys, heads, tiles, turns)
        blocks = few_keys_blocks(keys, tuned["n"])
        # The places of a single block are few.
        constants = (vec, m, *blocks, tuned["hoist"] or blocks[1:] == (1, 0), *shape)
        _few_keys.launch(batch * heads * tiles, tensors, (*sizes, *scalars), constants, warps=tuned["warps"])
    else:
        d0, held = split(depth)[0], sum(split(depth))
        tuned = config("attention", q.device, f"fp32/{held}" if itemsize == 4 else f"{d0}/{held}")
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

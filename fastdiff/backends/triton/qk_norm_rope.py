"""Norm and rotation of queries and keys, into one sequence with the text's. One launch for the queries, one for the
keys."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp32, i32, i64, kernel, power_of_2

NO_NORM, LAYER_NORM, RMS_NORM = 0, 1, 2
NO_ROPE, TABLES, PAIRS = 0, 1, 2


@_math.device
def _of_both(own, text, own_at, text_at, own_inside, text_inside, absent: tl.constexpr):
    """An element of the own stream's tensor or of the text's, whichever this token belongs to."""
    value = absent
    if own is not None:
        value = tl.load(own + own_at, own_inside, other=absent).to(tl.float32)
    if text is not None:
        value = tl.where(text_inside, tl.load(text + text_at, text_inside, other=absent).to(tl.float32), value)
    return value


@kernel
def _kernel(
    x, weight, bias, text, text_weight, cos, sin, out,
    heads: i32, tokens: i32, own_first: i32, own_tokens: i32, text_first: i32, blocks: i32,
    rope_first: i32, rope_tokens: i32, rotated: i32,
    x_b: i64, x_s: i64, x_h: i64, t_b: i64, t_s: i64, t_h: i64, c_b: i64, c_s: i64, c_h: i64,
    eps: fp32,
    VEC: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
    ACROSS: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """One token, HEADS heads: all of them where the norm is across heads."""
    pid = tl.program_id(0)
    block = pid % blocks
    token = pid // blocks % tokens
    b = (pid // blocks // tokens).to(tl.int64)
    head = (block * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (d < D)
    here = tl.zeros([1, 1], tl.int32) + token  # the interpreter cannot combine masks with scalars
    mine = inside & (here >= own_first) & (here < own_first + own_tokens)
    texts = inside & ((here < own_first) | (here >= own_first + own_tokens))
    x += (b * x_b + (token - own_first).to(tl.int64) * x_s) * VEC
    x_at = head.to(tl.int64) * x_h * VEC
    t_at = x_at
    if text is not None:
        text += (b * t_b + (token - text_first).to(tl.int64) * t_s) * VEC
        t_at = head.to(tl.int64) * t_h * VEC
    first = head * D if ACROSS else head * 0
    y = _of_both(x, text, x_at + d, t_at + d, mine, texts, 0.0)
    mean = 0.0
    rstd = 1.0
    if NORM:
        if ACROSS:
            number = heads * D
            if NORM == 1:
                mean = tl.sum(tl.sum(y, axis=1), axis=0) / number
            deviation = tl.where(inside, y - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(tl.sum(deviation * deviation, axis=1), axis=0) / number + eps)
        else:
            if NORM == 1:
                mean = tl.sum(y, axis=1)[:, None] / D
            deviation = tl.where(inside, y - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(deviation * deviation, axis=1)[:, None] / D + eps)
        y = (y - mean) * rstd * _of_both(weight, text_weight, first + d, first + d, mine, texts, 1.0)
        if bias is not None:
            y += tl.load(bias + first + d, mine, other=0.0).to(tl.float32)
    if ROPE:
        turn = inside & (d < rotated) & (here >= rope_first) & (here < rope_first + rope_tokens)
        # The other element of the pair, read and normalised once more: it is in the nearest cache.
        half = rotated // 2
        if INTERLEAVED:
            is_first = d % 2 == 0
            other = tl.where(is_first, d + 1, d - 1)
        else:
            is_first = d < half
            other = tl.where(is_first, d + half, d - half)
        partner = _of_both(x, text, x_at + other, t_at + other, mine & turn, texts & turn, 0.0)
        if NORM:
            scale = _of_both(weight, text_weight, first + other, first + other, mine & turn, texts & turn, 1.0)
            partner = (partner - mean) * rstd * scale
            if bias is not None:
                partner += tl.load(bias + first + other, mine & turn, other=0.0).to(tl.float32)
        at = b * c_b + (token - rope_first).to(tl.int64) * c_s + head.to(tl.int64) * c_h
        if ROPE == 1:
            c = tl.load(cos + at + d, turn, other=1.0).to(tl.float32)
            s = tl.load(sin + at + d, turn, other=0.0).to(tl.float32)
        else:  # (cosine, sine) of each pair
            pair = d // 2 if INTERLEAVED else d % half
            c = tl.load(cos + at + pair * 2, turn, other=1.0).to(tl.float32)
            s = tl.load(cos + at + pair * 2 + 1, turn, other=0.0).to(tl.float32)
        turned = y * c + tl.where(is_first, -partner, partner) * s
        y = tl.where(turn, turned, y)
    target = ((b * tokens + token) * heads + head) * D + d
    _math.store(out + target, y, inside)


def run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    rms: bool = True,
    across_heads: bool = False,
    interleaved: bool = True,
    text_first: bool = True,
    rope_start: int = 0,
) -> tuple[Tensor, Tensor]:
    options = (cos, sin, eps, rms, across_heads, interleaved, text_first, rope_start)
    return (
        _one(q, q_weight, q_bias, text_q, text_q_weight, *options),
        _one(k, k_weight, k_bias, text_k, text_k_weight, *options),
    )


def _one(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    text: Tensor | None,
    text_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float | None,
    rms: bool,
    across_heads: bool,
    interleaved: bool,
    text_first: bool,
    rope_start: int,
) -> Tensor:
    batch, own, heads, depth = x.shape
    texts = 0 if text is None else text.shape[1]
    if not texts:
        text = text_weight = None
    tokens = own + texts
    out = x.new_empty(batch, tokens, heads, depth)
    if not out.numel():
        return out
    width = power_of_2(depth)
    tuned = config("qk_norm_rope", x.device)
    block = power_of_2(heads) if across_heads else min(power_of_2(heads), max(1, tuned["elements"] // width))
    blocks = cdiv(heads, block)
    strides = (*x.stride()[:3], *(text.stride()[:3] if text is not None else (0, 0, 0)))
    vec = WIDE if depth % WIDE == 0 and all(n % WIDE == 0 for n in strides) else 1
    tensors = (x, weight, bias, text, text_weight, cos, sin, out)
    if not aligned(*tensors):
        vec = 1
    rope, rotated, rope_tokens, rope_strides = _tables(cos, sin)
    sizes = (heads, tokens, texts if text_first else 0, own, 0 if text_first else own, blocks)
    scalars = (*sizes, rope_start, rope_tokens, rotated, *[n // vec for n in strides], *rope_strides, eps or 0.0)
    norm = NO_NORM if eps is None else RMS_NORM if rms else LAYER_NORM
    constants = (vec, block, depth, width, norm, across_heads, rope, interleaved)
    warps = max(1, min(16, block * width // 256))
    _kernel.launch(batch * tokens * blocks, tensors, scalars, constants, warps=warps)
    return out


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int, int, tuple[int, int, int]]:
    """The kind of table, elements rotated, tokens, and strides over batch, token and head."""
    if cos is None:
        return NO_ROPE, 0, 0, (0, 0, 0)
    kind, shape, stride = (TABLES, cos.shape, cos.stride()) if sin is not None else _pairs(cos)
    if len(shape) == 2:
        return kind, shape[1], shape[0], (0, stride[0], 0)
    batch, head = (s if n > 1 else 0 for n, s in ((shape[0], stride[0]), (shape[2], stride[2])))
    return kind, shape[3], shape[1], (batch, stride[1], head)


def _pairs(cos: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    shape = torch.Size((*cos.shape[:-2], 2 * cos.shape[-2]))
    return PAIRS, shape, (*cos.stride()[:-2], 1)

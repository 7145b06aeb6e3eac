"""One step of a linear sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp64, i64, kernel

_NAN = tl.constexpr(tl.PropagateNan.ALL)


@_math.device
def _times(coefficient, value):
    """Their product in the value's type: scalars come in fp64. Of a value that is not in the sum nothing is left, be it
    infinite."""
    if _math.INTERPRETED:  # where they are Python's
        if coefficient == 0:
            value = tl.zeros_like(value)
    else:
        coefficient = coefficient.to(value.dtype)
        value = tl.where(coefficient == 0, tl.zeros_like(value), value)
    return coefficient * value


@_math.device
def _add(prev, kept, p, k, pointer, offset, inside, THIRD: tl.constexpr):
    """One more tensor in both combinations, if it is there."""
    if pointer is not None:
        value = tl.load(pointer + offset, inside).to(prev.dtype)
        prev += _times(p, value)
        if THIRD:
            kept += _times(k, value)
    return prev, kept


@kernel
def _kernel(
    sample, output, noise, h0, h1, h2, h3, h4, h5, h6, h7, following, entry, third,
    n_v: i64, e0: fp64, e1: fp64, clip: fp64,
    p0: fp64, p1: fp64, p2: fp64, p3: fp64, p4: fp64, p5: fp64,
    p6: fp64, p7: fp64, p8: fp64, p9: fp64, p10: fp64, p11: fp64,
    k0: fp64, k1: fp64, k2: fp64, k3: fp64, k4: fp64, k5: fp64,
    k6: fp64, k7: fp64, k8: fp64, k9: fp64, k10: fp64, k11: fp64,
    VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):
    """In WIDE: fp64 where fp32 is at stake, as large terms may have a small sum; latents are small."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < n_v * VEC - start
    offset = start + lane
    THIRD: tl.constexpr = third is not None
    x = tl.load(sample + offset, inside).to(WIDE)
    m = tl.load(output + offset, inside).to(WIDE)
    prev = _times(p0, x) + _times(p1, m)
    kept = _times(k0, x) + _times(k1, m)
    if entry is not None:
        highest = _times(clip, tl.full([1], 1.0, WIDE))
        lowest = -highest
        new = _times(e0, x) + _times(e1, m)
        new = tl.minimum(tl.maximum(new, lowest, propagate_nan=_NAN), highest, propagate_nan=_NAN)
        prev += _times(p2, new)
        kept += _times(k2, new)
        _math.store(entry + offset, new.to(tl.float32), inside)
    prev, kept = _add(prev, kept, p3, k3, noise, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p4, k4, h0, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p5, k5, h1, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p6, k6, h2, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p7, k7, h3, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p8, k8, h4, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p9, k9, h5, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p10, k10, h6, offset, inside, THIRD)
    prev, kept = _add(prev, kept, p11, k11, h7, offset, inside, THIRD)
    _math.store(following + offset, prev.to(tl.float32), inside)
    if THIRD:
        _math.store(third + offset, kept.to(tl.float32), inside)


def run(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    prev: Sequence[float],
    entry: Sequence[float],
    clip: float | None = None,
    prev_dtype: torch.dtype | None = None,
    entry_dtype: torch.dtype | None = None,
    kept: Sequence[float] = (),
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def result(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(sample, dtype=dtype) if wanted else sample.new_empty(0, dtype=dtype)

    following = result(True, prev_dtype or sample.dtype)
    new = result(bool(entry), entry_dtype or model_output.dtype)
    third = result(bool(kept), kept_dtype or sample.dtype)
    n = sample.numel()
    if n:
        if sample.is_contiguous():  # else all are laid out alike
            model_output, noise = model_output.contiguous(), noise if noise is None else noise.contiguous()
            history = [t.contiguous() for t in history]
        older = (*history, *(None,) * (8 - len(history)))
        tensors = (
            sample, model_output, noise, *older, following, new if entry else None, third if kept else None
        )
        vec = WIDE if n % WIDE == 0 and aligned(*tensors) else 1
        wide = tl.float64 if any(t is not None and t.dtype == torch.float32 for t in tensors) else tl.float32
        bound = math.inf if clip is None else clip
        coefficients = [c for group in (prev, kept) for c in (*group, *(0.0,) * (12 - len(group)))]
        tuned = config("elementwise", sample.device)
        _kernel.launch(
            cdiv(n, tuned["block"]),
            tensors,
            (n // vec, *(entry or (0.0, 0.0)), bound, *coefficients),
            (vec, tuned["block"], wide),
            warps=tuned["warps"],
        )
    return following, new, third

"""Classifier-free guidance, with its rescaling in the same launch."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp32, i64, kernel


@kernel
def _combine(uncond, cond, out, n_v: i64, guidance: fp32, VEC: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < n_v * VEC - start
    u = tl.load(uncond + start + offset, inside).to(tl.float32)
    c = tl.load(cond + start + offset, inside).to(tl.float32)
    _math.store(out + start + offset, u + guidance * (c - u), inside)


@kernel
def _rescale(
    uncond, cond, out, n_v: i64, guidance: fp32, rescale: fp32, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sample: the moments of both tensors, then the result. Latents are small."""
    size = n_v * VEC
    first = tl.program_id(0).to(tl.int64) * size
    offset = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    mean_c, m2_c, mean_g, m2_g = count, count, count, count
    for start in range(0, size, BLOCK):  # Welford's recurrence in every lane
        inside = offset < size - start
        u = tl.load(uncond + first + start + offset, inside, other=0.0).to(tl.float32)
        c = tl.load(cond + first + start + offset, inside, other=0.0).to(tl.float32)
        g = u + guidance * (c - u)
        count += tl.where(inside, 1.0, 0.0)
        weight = tl.where(inside, 1.0 / tl.maximum(count, 1.0), 0.0)
        delta = tl.where(inside, c - mean_c, 0.0)
        mean_c += delta * weight
        m2_c += delta * (c - mean_c)
        delta = tl.where(inside, g - mean_g, 0.0)
        mean_g += delta * weight
        m2_g += delta * (g - mean_g)
    _, all_c = _math.merge_all(count, mean_c, m2_c)
    _, all_g = _math.merge_all(count, mean_g, m2_g)
    degrees = (size - 1).to(tl.float32)
    # Not the quotient of the sums: one element has no deviation, and constants have the quotient 0 / 0.
    factor = rescale * (tl.sqrt(all_c / degrees) / tl.sqrt(all_g / degrees)) + (1.0 - rescale)
    for start in range(0, size, BLOCK):
        inside = offset < size - start
        u = tl.load(uncond + first + start + offset, inside).to(tl.float32)
        c = tl.load(cond + first + start + offset, inside).to(tl.float32)
        g = u + guidance * (c - u)
        _math.store(out + first + start + offset, g * factor, inside)


def run(uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    out = torch.empty_like(cond)
    n = cond.numel()
    if not n:
        return out
    rescale = guidance_rescale > 0.0
    size = n // cond.shape[0] if rescale else n
    vec = WIDE if size % WIDE == 0 and aligned(uncond, cond) else 1
    tensors = (uncond, cond, out)
    if rescale:
        tuned = config("cfg_rescale", cond.device)
        scalars: tuple[float, ...] = (size // vec, guidance_scale, guidance_rescale)
        _rescale.launch(cond.shape[0], tensors, scalars, (vec, tuned["block"]), warps=tuned["warps"])
    else:
        tuned = config("elementwise", cond.device)
        grid = cdiv(n, tuned["block"])
        _combine.launch(grid, tensors, (n // vec, guidance_scale), (vec, tuned["block"]), warps=tuned["warps"])
    return out

"""Tanh-approximated GELU."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, i64, kernel


@kernel
def _kernel(x, out, n_v: i64, VEC: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < n_v * VEC - start
    value = tl.load(x + start + offset, inside).to(tl.float32)
    _math.store(out + start + offset, _math.gelu_tanh(value), inside)


def run(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        vec = WIDE if n % WIDE == 0 and aligned(x) else 1
        tuned = config("elementwise", x.device)
        _kernel.launch(cdiv(n, tuned["block"]), (x, out), (n // vec,), (vec, tuned["block"]), warps=tuned["warps"])
    return out

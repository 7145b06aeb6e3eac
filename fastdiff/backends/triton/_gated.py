"""The kernel of the gated activations: half of the last axis times an activation of the other half."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, kernel


@kernel
def _kernel(x, out, width_v: "i64", blocks: "i32", VEC: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    width = width_v * VEC
    column = (pid % blocks).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < width - column
    first = x + row * 2 * width + column
    left = tl.load(first + offset, inside).to(tl.float32)
    right = tl.load(first + width + offset, inside).to(tl.float32)
    # SwiGLU gates with the first half, GEGLU with the second.
    y = _math.silu(left) * right if SILU else left * _math.gelu_erf(right)
    _math.store(out + row * width + column + offset, y, inside)


def run_gated(x: Tensor, *, silu: bool) -> Tensor:
    """``silu(left) * right`` or ``left * gelu(right)`` of the halves of x's last axis; x is contiguous."""
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    if out.numel():
        vec = WIDE if width % WIDE == 0 and aligned(x) else 1
        tuned = config("elementwise", x.device)
        # The block that leaves the fewest lanes idle, the larger of equals.
        block = min((tuned["block"], tuned["block"] // 2), key=lambda block: cdiv(width, block) * block)
        blocks = cdiv(width, block)
        programs = out.numel() // width * blocks
        _kernel.launch(programs, (x, out), (width // vec, blocks), (vec, block, silu), warps=max(1, block // 256))
    return out

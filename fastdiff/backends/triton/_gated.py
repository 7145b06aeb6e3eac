"""The kernel of the gated activations: a product of one tensor with an activation of another, row by row."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fastdiff.backends._gpu import fold
from fastdiff.backends.triton import _math
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, i32, i64, kernel


@kernel
def _kernel(
    left, right, out, width_v: i64, l0: i64, l1: i64, r0: i64, r1: i64, n1: i32, blocks: i32,
    VEC: tl.constexpr, BLOCK: tl.constexpr, SWIGLU: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    i0, i1 = row // n1, row % n1
    width = width_v * VEC
    start = (pid % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < width - start
    a = tl.load(left + (i0 * l0 + i1 * l1) * VEC + start + lane, inside).to(tl.float32)
    b = tl.load(right + (i0 * r0 + i1 * r1) * VEC + start + lane, inside).to(tl.float32)
    y = _math.silu(a) * b if SWIGLU else a * _math.gelu_erf(b)
    _math.store(out + row * width + start + lane, y, inside)


def run_gated(left: Tensor, right: Tensor, *, swiglu: bool) -> Tensor:
    """``silu(left) * right`` or ``left * gelu(right)``, for tensors whose axes before the last fold into two."""
    width = left.shape[-1] if left.dim() else 1
    out = left.new_empty(left.shape)
    if out.numel():
        n1 = 1
        rows: tuple[int, ...] = (0, 0, 0, 0)
        if left.dim():
            sizes, (of_left, of_right) = fold(left.shape, ((left.shape, left.stride()), (right.shape, right.stride())))
            n1, rows = sizes[-1], (*(0, *of_left)[-2:], *(0, *of_right)[-2:])
        vec = WIDE if all(n % WIDE == 0 for n in (width, *rows)) and aligned(left, right) else 1
        most = config("elementwise", left.device)["block"]
        # The block that leaves the fewest lanes idle, the larger of equals.
        block = min((most, most // 2), key=lambda block: cdiv(width, block) * block)
        blocks = cdiv(width, block)
        scalars = (width // vec, *[n // vec for n in rows], n1, blocks)
        grid = out.numel() // width * blocks
        _kernel.launch(grid, (left, right, out), scalars, (vec, block, swiglu), warps=max(1, block // 256))
    return out

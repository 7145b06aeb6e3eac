"""RMSNorm over channels with what follows it. See :mod:`fastdiff.ops.rms_norm_silu` for the contract.

A program has PIXELS of one sample with all their channels, which stay in registers: one read, one write. More channels
than fit there are taken CHANNELS at a time, twice.
"""

from __future__ import annotations

import functools

import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math, _pixels
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp32, i64, kernel, power_of_2
from fastdiff.ops.group_norm_silu import empty_in_layout_of, is_channels_last

#: The most channels that are held at once.
CHANNELS = 1024


@_math.device
def _value(x, at, valid):
    return tl.load(x + at, valid, other=0.0).to(tl.float32)


@_math.device
def _finish(value, factor, weight, bias, scale, shift, scale_c, shift_c, channel, inside, SILU: tl.constexpr):
    """What becomes of a tile, given 1 / rms of its pixels."""
    value *= factor[:, None]
    if weight is not None:
        value *= _pixels.vector(weight, 1, channel, inside)[None, :]
    if bias is not None:
        value += _pixels.vector(bias, 1, channel, inside)[None, :]
    if scale is not None:
        value *= 1.0 + _pixels.vector(scale, scale_c, channel, inside)[None, :]
    if shift is not None:
        value += _pixels.vector(shift, shift_c, channel, inside)[None, :]
    if SILU:
        value = _math.silu(value)
    return value


@kernel
def _kernel(
    x, weight, bias, scale, shift, out,
    batch_stride: i64, pixels_v: i64, channels_v: i64, tiles: i64,
    scale_b: i64, scale_c: i64, shift_b: i64, shift_c: i64, eps: fp32,
    VEC: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    CLAMP: tl.constexpr, SILU: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    pixel = pid % tiles * PIXELS + tl.arange(0, PIXELS)
    pixels = pixels_v * (1 if LAST else VEC)
    channels = channels_v * (VEC if LAST else 1)
    x += sample * batch_stride * VEC
    out += sample * pixels * channels
    if scale is not None:
        scale += sample * scale_b
    if shift is not None:
        shift += sample * shift_b
    there = (pixel < pixels)[:, None]
    lane = tl.arange(0, WIDTH)
    if WHOLE:
        inside = lane < channels
        at = _pixels.offsets(pixel, lane, pixels, channels, LAST)
        value = _value(x, at, there & inside[None, :])
        square = tl.sum(value * value, axis=1)
    else:
        squares = tl.zeros([PIXELS, WIDTH], tl.float32)
        for first in range(0, channels, WIDTH):
            channel = first + lane
            at = _pixels.offsets(pixel, channel, pixels, channels, LAST)
            value = _value(x, at, there & (channel < channels)[None, :])
            squares += value * value
        square = tl.sum(squares, axis=1)
    if CLAMP:
        inverse = tl.rsqrt(square)
        bound = 1.0 / eps
        factor = tl.where(inverse > bound, bound, inverse) * tl.sqrt(channels.to(tl.float32))  # NaN stays
    else:
        factor = tl.rsqrt(square / channels.to(tl.float32) + eps)
    if WHOLE:
        value = _finish(value, factor, weight, bias, scale, shift, scale_c, shift_c, lane, inside, SILU)
        _math.store(out + at, value, there & inside[None, :])
    else:
        for first in range(0, channels, WIDTH):
            channel = first + lane
            inside = channel < channels
            at = _pixels.offsets(pixel, channel, pixels, channels, LAST)
            value = _value(x, at, there & inside[None, :])
            value = _finish(value, factor, weight, bias, scale, shift, scale_c, shift_c, channel, inside, SILU)
            _math.store(out + at, value, there & inside[None, :])


@functools.lru_cache(maxsize=4096)
def _tile(channels: int, last: bool, elements: int) -> tuple[int, int]:
    """Pixels and channels of a tile."""
    wide = min(power_of_2(channels), CHANNELS)
    # Pixels that are innermost are read 16 bytes at a time.
    return max(1 if last else WIDE, elements // wide), wide


def run(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    clamp: bool = False,
    silu: bool = True,
) -> Tensor:
    batch, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    last = is_channels_last(x)
    out = empty_in_layout_of(x)
    if not x.numel():
        return out
    if not last and not x[0].is_contiguous():
        x = x.contiguous()
    tuned = config("rms_norm", x.device)
    tile, wide = _tile(channels, last, tuned["elements"])
    innermost = channels if last else pixels
    tensors = (x, weight, bias, scale, shift, out)
    vec = WIDE if innermost % WIDE == 0 and x.stride(0) % WIDE == 0 and aligned(*tensors) else 1
    tiles = cdiv(pixels, tile)
    sizes = (x.stride(0) // vec, pixels // (1 if last else vec), channels // (vec if last else 1), tiles)
    scalars = (*sizes, *_pixels.strides(scale), *_pixels.strides(shift), eps)
    constants = (vec, last, tile, wide, wide >= channels, clamp, silu)
    _kernel.launch(batch * tiles, tensors, scalars, constants, warps=tuned["warps"])
    return out

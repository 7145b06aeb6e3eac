"""GroupNorm with what surrounds it. See :mod:`fastdiff.ops.group_norm_silu` for the contract.

A tile is PIXELS x CHANNELS of one sample, CHANNELS holding whole groups, whatever the memory layout: the two flags
say which axis is innermost. A sample's pixels are split over as many programs as fill the device: a first kernel
leaves the moments of every (sample, group, split), a second merges them and writes the result. Small images take
one launch, whose programs find the moments of their groups themselves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math, _pixels
from fastdiff.backends.triton._config import config
from fastdiff.backends.triton._launch import WIDE, aligned, cdiv, fp32, i32, i64, kernel, power_of_2, processors
from fastdiff.ops.group_norm_silu import is_channels_last

#: Channels of a tile; a single group with more has a tile as wide as it needs.
CHANNELS = 64


@_math.device
def _pivot(x, group, per_group, pixels, inside, LAST: tl.constexpr):
    """A value of each channel's group, which half-precision values are taken relative to, exactly: fp32 does not hold
    a large mean as finely as their rounding. Of fp32 values the difference would be rounded itself."""
    first = (group * per_group).to(tl.int64)
    half = x.dtype.element_ty.primitive_bitwidth == 16
    return tl.load(x + (first if LAST else first * pixels), inside & half, other=0.0).to(tl.float32)


@_math.device
def _moments(
    x, temb, pivot, begin, end, pixels, channels, channel, inside, group, per_group,
    LAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, ONE_GROUP: tl.constexpr,
):
    """Mean and M2 of each channel's group over the pixels from ``begin`` to ``end``."""
    count = tl.zeros([PIXELS, 1], tl.float32)
    mean = tl.zeros([PIXELS, WIDTH], tl.float32)
    m2 = tl.zeros([PIXELS, WIDTH], tl.float32)
    for start in range(begin, end, PIXELS):  # Welford's recurrence in every lane
        pixel = start + tl.arange(0, PIXELS)
        valid = (pixel < end)[:, None] & inside[None, :]
        value = tl.load(x + _pixels.offsets(pixel, channel, pixels, channels, LAST), valid, other=0.0).to(tl.float32)
        value -= pivot[None, :]
        if temb is not None:
            value += temb[None, :]
        count += tl.where(pixel < end, 1.0, 0.0)[:, None]
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (value - mean)
    number = (end - begin).to(tl.float32)
    mean, m2 = _math.merge(count, mean, m2)  # of each channel
    return _over_groups(mean, m2, number, inside, group, per_group, ONE_GROUP)


@_math.device
def _over_groups(mean, m2, number, inside, group, per_group, ONE_GROUP: tl.constexpr):
    """The moments of each channel's group from those of the channels, over ``number`` pixels each."""
    if ONE_GROUP:
        one = tl.zeros([1], tl.float32)
        center, total = _math.merge_all(tl.where(inside, number, 0.0), mean, m2)
        center, total = one + center, one + total
    else:
        same = (group[:, None] == group[None, :]) & inside[:, None]  # (channel, channel whose group it is)
        # Selected, not multiplied: another group's NaN must not leak.
        center = tl.sum(tl.where(same, mean[:, None], 0.0), axis=0) / per_group
        center += tl.sum(tl.where(same, mean[:, None] - center[None, :], 0.0), axis=0) / per_group
        deviation = mean[:, None] - center[None, :]
        total = tl.sum(tl.where(same, m2[:, None] + number * deviation * deviation, 0.0), axis=0)
    return center, total


@kernel
def _partial(
    x, temb, partials,
    batch_stride: i64, pixels_v: i64, channels_v: i64, per_group: i32, width_v: i32, blocks: i32,
    splits: i32, turns: i32, temb_b: i64, temb_c: i64,
    VEC: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, ONE_GROUP: tl.constexpr,
):
    """Moments of each group over one split's pixels, to partials (B, groups, splits, 2)."""
    pid = tl.program_id(0)
    split = pid % splits
    block = pid // splits % blocks
    sample = (pid // splits // blocks).to(tl.int64)
    pixels = pixels_v * (1 if LAST else VEC)
    channels = channels_v * (VEC if LAST else 1)
    width = width_v * (VEC if LAST else 1)
    lane = tl.arange(0, WIDTH)
    channel = block * width + lane
    inside = (lane < width) & (channel < channels)
    group = channel // per_group
    shift = temb
    if temb is not None:
        shift = _pixels.vector(temb + sample * temb_b, temb_c, channel, inside)
    pivot = _pivot(x + sample * batch_stride * VEC, group, per_group, pixels, inside, LAST)
    begin = split * turns * PIXELS
    end = tl.minimum(begin + turns * PIXELS, pixels)
    mean, m2 = _moments(
        x + sample * batch_stride * VEC, shift, pivot, begin, end, pixels, channels, channel, inside, group, per_group,
        LAST, PIXELS, WIDTH, ONE_GROUP,
    )
    groups = channels // per_group
    target = partials + ((sample * groups + group) * splits + split) * 2
    if ONE_GROUP:
        first = inside & (lane == 0)
        mean = tl.broadcast_to(mean, [WIDTH])
        m2 = tl.broadcast_to(m2, [WIDTH])
    else:
        first = inside & (channel % per_group == 0)
    tl.store(target, mean, first)
    tl.store(target + 1, m2, first)


@kernel
def _apply(
    x, weight, bias, temb, scale, shift, partials, out,
    batch_stride: i64, pixels_v: i64, channels_v: i64, per_group: i32, width_v: i32, blocks: i32,
    splits: i32, turns: i32, temb_b: i64, temb_c: i64, scale_b: i64, scale_c: i64, shift_b: i64,
    shift_c: i64, eps: fp32,
    VEC: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, ONE_GROUP: tl.constexpr,
    OUT_LAST: tl.constexpr, SILU: tl.constexpr,
):
    """The result on one split's pixels. Without ``partials`` the moments are found here, and there is one split."""
    pid = tl.program_id(0)
    if partials is not None:
        pid = tl.num_programs(0) - 1 - pid  # what the first kernel read last is still in the cache
    split = pid % splits
    block = pid // splits % blocks
    sample = (pid // splits // blocks).to(tl.int64)
    pixels = pixels_v * (1 if LAST else VEC)
    channels = channels_v * (VEC if LAST else 1)
    width = width_v * (VEC if LAST else 1)
    lane = tl.arange(0, WIDTH)
    channel = block * width + lane
    inside = (lane < width) & (channel < channels)
    group = channel // per_group
    x += sample * batch_stride * VEC
    added = temb
    if temb is not None:
        added = _pixels.vector(temb + sample * temb_b, temb_c, channel, inside)
    pivot = _pivot(x, group, per_group, pixels, inside, LAST)
    if partials is None:
        mean, m2 = _moments(
            x, added, pivot, 0, pixels, pixels, channels, channel, inside, group, per_group,
            LAST, PIXELS, WIDTH, ONE_GROUP,
        )
    else:
        owner = tl.full([1], block, tl.int32) if ONE_GROUP else group
        held = (owner < channels // per_group)[None, :]
        base = partials + (sample * (channels // per_group) + owner)[None, :] * splits * 2
        count = tl.zeros([32, 1], tl.float32)
        means = tl.zeros([32, 1 if ONE_GROUP else WIDTH], tl.float32)
        m2s = means
        for first in range(0, splits, 32):  # Chan's formula in every lane
            s = (first + tl.arange(0, 32))[:, None]
            number = tl.minimum(tl.maximum(pixels - s.to(tl.int64) * turns * PIXELS, 0), turns * PIXELS)
            n = (number * per_group).to(tl.float32)
            delta = tl.load(base + s * 2, held & (s < splits), other=0.0) - means
            part = n / tl.maximum(count + n, 1.0)
            means += delta * part
            m2s += tl.load(base + s * 2 + 1, held & (s < splits), other=0.0) + delta * delta * (count * part)
            count += n
        mean, m2 = _math.merge(count, means, m2s)
    factor = tl.rsqrt(m2 / (pixels * per_group).to(tl.float32) + eps)
    if ONE_GROUP:  # else it has the tile's shape already
        factor = tl.broadcast_to(factor, [WIDTH])
    term = tl.zeros([WIDTH], tl.float32)
    if weight is not None:
        factor *= _pixels.vector(weight, 1, channel, inside)
    if bias is not None:
        term = _pixels.vector(bias, 1, channel, inside)
    if scale is not None:
        scales = 1.0 + _pixels.vector(scale + sample * scale_b, scale_c, channel, inside)
        factor *= scales
        term *= scales
    if shift is not None:
        term += _pixels.vector(shift + sample * shift_b, shift_c, channel, inside)
    out += sample * pixels * channels
    begin = split * turns * PIXELS
    end = tl.minimum(begin + turns * PIXELS, pixels)
    for start in range(begin, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        valid = (pixel < end)[:, None] & inside[None, :]
        value = tl.load(x + _pixels.offsets(pixel, channel, pixels, channels, LAST), valid, other=0.0).to(tl.float32)
        value -= pivot[None, :]
        if temb is not None:
            value += added[None, :]
        value = (value - mean[None, :]) * factor[None, :] + term[None, :]
        if SILU:
            value = _math.silu(value)
        target = out + _pixels.offsets(pixel, channel, pixels, channels, OUT_LAST)
        _math.store(target, value, valid)


class _Plan(NamedTuple):
    pixels: int
    channels_last: bool
    contiguous_samples: bool
    tile: int  # pixels of a tile
    wide: int  # channels of a tile
    width: int  # those that are used
    blocks: int
    splits: int
    turns: int  # tiles of one split
    divisible: bool


def _width(channels: int, groups: int, whole_vectors: bool) -> tuple[int, int]:
    """Channels that a tile uses, always whole groups, and that it is wide."""
    per_group = channels // groups
    if per_group >= CHANNELS:
        return per_group, power_of_2(per_group)
    if whole_vectors:
        for wide in (CHANNELS, 2 * CHANNELS):
            for width in range(wide // per_group * per_group, 0, -per_group):
                if width % WIDE == 0:
                    return width, wide
    tiles = cdiv(groups, CHANNELS // per_group)
    return cdiv(groups, tiles) * per_group, CHANNELS


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, stride: tuple[int, ...], groups: int, pixels_of_tile: int, once: int, programs: int
) -> _Plan:
    batch, channels = shape[:2]
    pixels = shape[2:].numel()
    first = torch.empty_strided(shape[1:], stride[1:], device="meta")
    contiguous = first.is_contiguous()
    last = not contiguous and first.movedim(0, -1).is_contiguous()
    if pixels == 1 and stride[1] == 1:
        contiguous, last = False, True
    width, wide = _width(channels, groups, last and channels % WIDE == 0)
    # Pixels that are innermost are read 16 bytes at a time, where a tile of so many fits the registers.
    tile = max(WIDE if not last and wide <= 1024 else 1, pixels_of_tile * CHANNELS // wide)
    blocks = cdiv(channels, width)
    tiles = cdiv(pixels, tile)
    splits = 1 if pixels <= once else max(1, min(tiles, cdiv(programs, batch * blocks)))
    turns = cdiv(tiles, splits)
    numbers = (stride[0], channels, width) if last else (stride[0], pixels)
    return _Plan(
        pixels, last, contiguous or last, tile, wide, width, blocks, cdiv(tiles, turns), turns,
        all(n % WIDE == 0 for n in numbers),
    )


def run(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    tokens: bool = False,
) -> Tensor:
    batch, channels = x.shape[:2]
    spatial = x.shape[2:]
    channels_last = is_channels_last(x)
    if tokens:
        result = out = x.new_empty(batch, spatial.numel(), channels)
    elif channels_last:
        out = x.new_empty(batch, *spatial, channels)
        result = out.movedim(-1, 1)
    else:
        result = out = x.new_empty(x.shape)
    if not x.numel():
        return result
    wide = channels // num_groups >= CHANNELS
    tuned = config("group_norm", x.device, ("fp32/wide" if wide else "fp32") if x.element_size() == 4 else None)
    programs = tuned["waves"] * processors(x.device)
    plan = _plan(x.shape, x.stride(), num_groups, tuned["pixels"], tuned["once"], programs)
    if not plan.contiguous_samples:
        x = x.contiguous()
        plan = _plan(x.shape, x.stride(), num_groups, tuned["pixels"], tuned["once"], programs)
    last = tokens or channels_last
    _launch(x, num_groups, weight, bias, eps, temb, scale, shift, silu, out, last, plan, tuned["warps"])
    return result


def _launch(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out: Tensor,
    out_last: bool,
    plan: _Plan,
    warps: int,
) -> None:
    batch, channels = x.shape[:2]
    per_group = channels // groups
    vec = WIDE if plan.divisible and aligned(x, weight, bias, temb, scale, shift) else 1
    vec_p, vec_c = (1, vec) if plan.channels_last else (vec, 1)
    sizes = (
        x.stride(0) // vec, plan.pixels // vec_p, channels // vec_c, per_group, plan.width // vec_c, plan.blocks,
        plan.splits, plan.turns,
    )
    one_group = per_group >= CHANNELS
    constants = (vec, plan.channels_last, plan.tile, plan.wide, one_group)
    grid = batch * plan.blocks * plan.splits
    partials = None
    if plan.splits > 1:
        partials = torch.empty(batch * groups * plan.splits * 2, dtype=torch.float32, device=x.device)
        _partial.launch(grid, (x, temb, partials), (*sizes, *_pixels.strides(temb)), constants, warps=warps)
    scalars = (*sizes, *_pixels.strides(temb), *_pixels.strides(scale), *_pixels.strides(shift), eps)
    tensors = (x, weight, bias, temb, scale, shift, partials, out)
    _apply.launch(grid, tensors, scalars, (*constants, out_last, silu), warps=warps)

"""Feature maps (B, C, *spatial): addresses in both layouts, and values per channel."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from fastdiff.backends.triton import _math


@_math.device
def vector(pointer, stride, channel, inside):
    """A parameter for a tile's channels, or None."""
    value = None
    if pointer is not None:
        value = tl.load(pointer + channel * stride, inside, other=0.0).to(tl.float32)
    return value


@_math.device
def offsets(pixel, channel, pixels, channels, LAST: tl.constexpr):
    """Where a tile's elements lie in their sample: in (channel, pixel) order, or with channels last."""
    if LAST:
        offset = pixel[:, None].to(tl.int64) * channels + channel[None, :]
    else:
        offset = channel[None, :].to(tl.int64) * pixels + pixel[:, None]
    return offset


def strides(t: Tensor | None) -> tuple[int, int]:
    """Between samples, and between channels."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))

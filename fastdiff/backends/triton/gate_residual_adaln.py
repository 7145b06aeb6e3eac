"""A gated residual and the norm that follows, in one pass."""

from __future__ import annotations

from torch import Tensor

from fastdiff.backends.triton._rows import LAYER_NORM, RMS_NORM, run_rows


def run(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    norm = RMS_NORM if rms else LAYER_NORM
    y, (out,) = run_rows(x, gate, residual, ((scale, shift),), weight, bias, eps, norm, residual.dtype)
    assert y is not None
    return y, out

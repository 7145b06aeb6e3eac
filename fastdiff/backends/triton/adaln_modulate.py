"""LayerNorm or RMSNorm with modulation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.backends.triton._rows import LAYER_NORM, RMS_NORM, run_rows


def run(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    norm = RMS_NORM if rms else LAYER_NORM
    _, (out,) = run_rows(x, None, None, ((scale, shift),), weight, bias, eps, norm, out_dtype or x.dtype)
    return out

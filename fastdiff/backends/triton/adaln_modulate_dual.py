"""LayerNorm or RMSNorm with two modulations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.backends.triton._rows import LAYER_NORM, RMS_NORM, run_rows


def run(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    norm, modulations = RMS_NORM if rms else LAYER_NORM, ((scale, shift), (scale2, shift2))
    _, (out, out2) = run_rows(x, None, None, modulations, weight, bias, eps, norm, out_dtype or x.dtype)
    return out, out2

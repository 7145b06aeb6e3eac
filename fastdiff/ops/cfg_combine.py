"""Classifier-free guidance in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op("(Tensor uncond, Tensor cond, float guidance_scale, float guidance_rescale=0.0) -> Tensor")
def cfg_combine(uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """``out = uncond + guidance_scale * (cond - uncond)`` (Ho and Salimans, "Classifier-Free Diffusion
    Guidance", 2022); then, if ``guidance_rescale`` r is positive, ``r * out * std(cond) / std(out)
    + (1 - r) * out`` per sample (section 3.4 of Lin et al., "Common Diffusion Noise Schedules and Sample
    Steps are Flawed", 2024).

    Args:
        uncond, cond: (B, ...), of one shape and dtype.
        guidance_scale: 1 gives cond.
        guidance_rescale: usually 0 to 1. The standard deviations are unbiased, over all axes but the first.

    Returns:
        A contiguous tensor of cond's shape and dtype.

    Raises:
        ValueError: if the shapes or dtypes differ, or a rescale is asked for tensors of fewer than 2 axes.
    """
    out = uncond + guidance_scale * (cond - uncond)
    if guidance_rescale > 0.0:
        axes = list(range(1, cond.dim()))
        rescaled = out * (cond.std(axes, keepdim=True) / out.std(axes, keepdim=True))
        out = guidance_rescale * rescaled + (1 - guidance_rescale) * out
    return out.contiguous()


@cfg_combine.check
def _check(uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> None:
    if uncond.shape != cond.shape:
        raise ValueError(f"uncond has shape {tuple(uncond.shape)}, cond {tuple(cond.shape)}")
    if uncond.dtype != cond.dtype or not cond.is_floating_point():
        raise ValueError(f"uncond is {uncond.dtype} and cond {cond.dtype}: expected one floating-point type")
    if guidance_rescale > 0.0 and cond.dim() < 2:
        raise ValueError(f"guidance_rescale needs tensors (B, ...), not shape {tuple(cond.shape)}")


@cfg_combine.fake
def _fake(uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    return torch.empty(cond.shape, dtype=cond.dtype, device=cond.device)

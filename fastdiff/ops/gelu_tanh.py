"""Tanh-approximated GELU in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op("(Tensor x) -> Tensor")
def gelu_tanh(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel, 2016; the
    ``approximate="tanh"`` form of :class:`diffusers.models.activations.GELU`).

    Args:
        x: any shape, float32, bfloat16 or float16 in kernels, any floating dtype in eager.

    Returns:
        A tensor like ``x``.

    Raises:
        ValueError: if ``x`` is not floating point.
    """
    return F.gelu(x, approximate="tanh")


@gelu_tanh.check
def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"gelu_tanh: x is {str(x.dtype)[6:]}, expected floating point")


@gelu_tanh.fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)

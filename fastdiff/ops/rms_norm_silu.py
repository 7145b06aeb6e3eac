"""RMSNorm over the channels of feature maps, with what VAEs do next: scale and shift, SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.group_norm_silu import check_per_channel, empty_in_layout_of, in_layout_of, modulated_silu


@fused_op(
    "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-6, *, Tensor? scale=None, Tensor? shift=None,"
    " bool clamp=False, bool silu=True) -> Tensor"
)
def rms_norm_silu(
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
    """``silu(rms_norm(x) * (1 + scale) + shift)``, the RMSNorm (Zhang and Sennrich, 2019) being over the channels of
    each pixel: the norm of the VAEs of LTX and Sana, and with ``clamp`` that of Wan and Qwen-Image, which is
    ``F.normalize(x, dim=1) * C ** 0.5 * weight + bias``.

    Args:
        x: (B, C, *spatial), 2 to 5 dimensions; float32, bfloat16 or float16 in kernels, any floating dtype in eager.
        weight, bias: (C,), any floating dtype.
        eps: added to the mean square, or with ``clamp`` the least Euclidean norm that is divided by.
        scale, shift: (B, C) or (B, C, 1, ..., 1), any strides and floating dtype.
        clamp: what ``eps`` is.
        silu: apply SiLU at the end.

    Returns:
        x's dtype and shape; channels last if x is, else contiguous.

    Raises:
        ValueError: if shapes do not fit.
    """
    dtype = x.dtype
    for t in (weight, bias, scale, shift):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    if clamp:
        y = F.normalize(wide, dim=1, eps=eps) * x.shape[1] ** 0.5
    else:
        y = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    y = y.to(dtype)
    if weight is not None:
        y = y * weight.view(-1, *(1,) * (x.dim() - 2))
    if bias is not None:
        y = y + bias.view(-1, *(1,) * (x.dim() - 2))
    return in_layout_of(x, modulated_silu(y, x, scale, shift, silu))


@rms_norm_silu.fake
def _fake(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return empty_in_layout_of(x)


@rms_norm_silu.check
def _check(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    clamp: bool = False,
    silu: bool = True,
) -> None:
    check_per_channel("rms_norm_silu", x, weight, bias, scale, shift)

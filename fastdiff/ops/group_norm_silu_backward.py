"""The backward of :mod:`fastdiff.ops.group_norm_silu`, as an op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op(
    "(Tensor grad, Tensor x, int num_groups, Tensor? factor, Tensor? offset, Tensor? temb, float eps, bool silu,"
    " bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)"
)
def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    factor: Tensor | None,
    offset: Tensor | None,
    temb: Tensor | None,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``silu(z)``, ``z = n * factor + offset`` with ``n = group_norm(x + temb)``.

    Args:
        grad: of the result; x's shape and dtype.
        x: (B, C, S), or (B, S, C) with ``channels_last``.
        num_groups: divides C.
        factor, offset: (B, C) or (1, C), contiguous, fp32 (fp64 for an fp64 x); 1 and 0 if absent.
        temb: (B, C), likewise.
        eps: added to the variance.
        silu: as in the forward.

    Returns:
        The gradient of x, contiguous, and those of factor, offset and temb, (B, C) in fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    result, (grad, x) = x.dtype, (t.to(wide).transpose(1, 2) if channels_last else t.to(wide) for t in (grad, x))
    x = x if temb is None else x + temb[..., None]
    groups = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    rstd = torch.rsqrt(groups.var(-1, keepdim=True, correction=0) + eps)
    n = ((groups - groups.mean(-1, keepdim=True)) * rstd).reshape(x.shape)
    if silu:
        z = n if factor is None else n * factor[..., None]
        z = z if offset is None else z + offset[..., None]
        s = torch.sigmoid(z)
        grad = grad * s * (1 + z * (1 - s))
    dn = (grad if factor is None else grad * factor[..., None]).reshape(groups.shape)
    groups = n.reshape(groups.shape)
    dx = rstd * (dn - dn.mean(-1, keepdim=True) - groups * (dn * groups).mean(-1, keepdim=True))
    dx = dx.reshape(x.shape)
    dtemb = dx.sum(-1)
    dx = (dx.transpose(1, 2) if channels_last else dx).to(result).contiguous()
    return dx, (grad * n).sum(-1), grad.sum(-1), dtemb


@group_norm_silu_backward.fake
def _fake(grad: Tensor, x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = x.shape[0], x.shape[2 if args[-1] else 1]
    sums = x.new_empty((batch, channels), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), sums, torch.empty_like(sums), torch.empty_like(sums)

"""GroupNorm with everything a ResNet block does around it: embedding added before, scale and shift, SiLU after."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.group_norm_silu_backward import group_norm_silu_backward


@fused_op(
    "(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, *, Tensor? temb=None,"
    " Tensor? scale=None, Tensor? shift=None, bool silu=True, bool tokens=False) -> Tensor"
)
def group_norm_silu(
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
    """``silu(group_norm(x + temb) * (1 + scale) + shift)`` (GroupNorm: Wu and He, 2018), the chain of
    :class:`diffusers.models.resnet.ResnetBlock2D` and, without SiLU and as tokens, the entrance of
    :class:`diffusers.models.transformers.transformer_2d.Transformer2DModel`.

    Args:
        x: (B, C, *spatial), 2 to 5 dimensions; float32, bfloat16 or float16 in kernels, any floating dtype in eager.
        num_groups: divides C.
        weight, bias: (C,), any floating dtype.
        eps: added to the variance.
        temb: (B, C) or (B, C, 1, ..., 1), any strides and floating dtype; added before the normalization.
        scale, shift: like ``temb``; ``y * (1 + scale) + shift`` after the normalization and its affine map.
        silu: apply SiLU at the end.
        tokens: return (B, prod(spatial), C).

    Returns:
        x's dtype; contiguous with ``tokens``, else x's shape, channels last if x is, else contiguous.

    Raises:
        ValueError: if shapes do not fit.
    """
    h = x if temb is None else x + per_channel(temb, x)
    dtype = h.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    y = torch.group_norm(h.to(dtype), num_groups, weight, bias, eps)
    y = modulated_silu(y, x, scale, shift, silu)
    if tokens:
        return _as_tokens(y).contiguous()
    return in_layout_of(x, y)


def modulated_silu(y: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    """``silu(y * (1 + scale) + shift)`` in x's dtype, of what is there."""
    if scale is not None:
        y = y * (1 + per_channel(scale, x))
    if shift is not None:
        y = y + per_channel(shift, x)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)


def check_per_channel(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    temb: Tensor | None = None,
) -> None:
    """Raise ``ValueError`` unless x is (B, C, *spatial), weight and bias are (C,) and the others (B, C, 1, ..., 1)."""
    dim = x.dim()
    if not x.is_floating_point():
        raise ValueError(f"{op}: x is {str(x.dtype)[6:]}, expected floating point")
    if not 2 <= dim <= 5:
        raise ValueError(f"{op}: x has {dim} dimensions; expected (B, C, *spatial) with 2 to 5")
    batch, channels = x.shape[:2]
    if channels == 0:
        raise ValueError(f"{op}: x has no channels")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}; expected ({channels},)")
    for name, modulation in (("temb", temb), ("scale", scale), ("shift", shift)):
        if modulation is None:
            continue
        shape = modulation.shape
        if shape != (batch, channels) and shape != (batch, channels, *(1,) * (dim - 2)):
            raise ValueError(
                f"{op}: {name} has shape {tuple(shape)}; expected ({batch}, {channels}) or the same "
                f"followed by ones, for x of shape {tuple(x.shape)}"
            )


@group_norm_silu.fake
def _fake(x: Tensor, *args: object, tokens: bool = False, **kwargs: object) -> Tensor:
    if tokens:
        return x.new_empty(_as_tokens(x).shape)
    return empty_in_layout_of(x)


@group_norm_silu.check
def _check(
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
) -> None:
    check_per_channel("group_norm_silu", x, weight, bias, scale, shift, temb)
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: {channels} channels do not divide into {num_groups} groups")


@group_norm_silu.backward("x", "weight", "bias", "temb", "scale", "shift")
def _backward(
    needed: frozenset[str],
    grads: tuple[Tensor],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    temb: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    tokens: bool,
) -> dict[str, Tensor]:
    batch, channels = x.shape[:2]

    def row(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(-1, channels).float().contiguous()

    w, b, s, t = row(weight), row(bias), row(scale), row(shift)
    factor = offset = None  # the op is silu(normed * factor + offset)
    if w is not None or s is not None:
        factor = w if s is None else 1 + s if w is None else w * (1 + s)
    if b is not None or t is not None:
        offset = b if b is None or s is None else b * (1 + s)
        offset = t if offset is None else offset if t is None else offset + t
    channels_last = is_channels_last(x)
    x3 = _as_tokens(x) if channels_last else x.reshape(batch, channels, math.prod(x.shape[2:]))
    grad = grads[0] if tokens else _as_tokens(grads[0])
    dx, dfactor, doffset, dtemb = group_norm_silu_backward(
        grad if channels_last else grad.transpose(1, 2), x3, num_groups, factor, offset, row(temb), eps, silu,
        channels_last,
    )  # fmt: skip
    found = {"temb": dtemb, "shift": doffset}
    if channels_last:
        dx = dx.transpose(1, 2)
        found["x"] = dx.reshape(batch, channels, *x.shape[2:])
    else:
        found["x"] = dx.reshape(x.shape)
    if "scale" in needed:
        dscale = dfactor if w is None else dfactor * w
        found["scale"] = dscale if b is None else dscale + doffset * b
    found["weight"], found["bias"] = (g if s is None else g * (1 + s) for g in (dfactor, doffset))
    return found


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, *spatial) is dense with its channels innermost, and not plainly contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y with channels last if x has them there, else contiguous."""
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(x) else y.contiguous()


def empty_in_layout_of(x: Tensor) -> Tensor:
    """An uninitialised result of x's shape and dtype, laid out as by :func:`in_layout_of`."""
    if is_channels_last(x):
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """``t`` (B, C) or (B, C, 1, ..., 1) as a view that broadcasts to x."""
    return t.reshape(*t.shape[:2], *(1,) * (x.dim() - 2))


def _as_tokens(y: Tensor) -> Tensor:
    return y.reshape(y.shape[0], y.shape[1], math.prod(y.shape[2:])).transpose(1, 2)

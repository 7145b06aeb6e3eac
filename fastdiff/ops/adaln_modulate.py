"""LayerNorm or RMSNorm and adaptive modulation (adaLN) in one pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.adaln_modulate_backward import adaln_modulate_backward


def check_modulation(name: str, shape: torch.Size, full: torch.Size) -> None:
    """Raise ``ValueError`` unless :func:`align_modulation` makes ``shape`` broadcast to ``full``."""
    rank = len(shape)
    if 0 < rank <= len(full) and shape[-1] == full[-1]:
        if rank == 1 or (shape[0] in (1, full[0]) and shape[1:-1].numel() == 1):
            return
        if rank == len(full) and all(n in (1, m) for n, m in zip(shape, full, strict=True)):
            return
    raise ValueError(
        f"{name} has shape {tuple(shape)}, which does not modulate x of shape {tuple(full)}: expected (D,), "
        "(B, D), (B, 1, D) or sizes that broadcast to x's"
    )


def align_modulation(t: Tensor, x: Tensor) -> Tensor:
    """A view of ``t`` that broadcasts to ``x``: (B, D) becomes (B, 1, ..., 1, D)."""
    if 1 < t.dim() < x.dim():
        return t.reshape(t.shape[0], *(1,) * (x.dim() - 2), t.shape[-1])
    return t


def check_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Raise ``ValueError`` for arguments that no norm with modulation over the last axis takes."""
    full = x.shape
    if not full or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(full)}, expected floating point (..., D)")
    shape = None
    if scale is not None:
        shape = scale.shape
        check_modulation("scale", shape, full)
    if shift is not None and shift.shape != shape:
        check_modulation("shift", shift.shape, full)
    if weight is not None and weight.shape != full[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({full[-1]},)")
    if bias is not None and bias.shape != full[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({full[-1]},)")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating-point type, not {out_dtype}")


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    modulations: tuple[Tensor | None, ...],
) -> Tensor:
    """The eager norm of x, in the widest dtype of all that takes part."""
    dtype = x.dtype
    for t in (*modulations, weight, bias):
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    if not rms:
        return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def with_modulation(
    y: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """The eager ``y * (1 + scale) + shift``, y being the norm of x."""
    if scale is not None:
        y = y * (1 + align_modulation(scale, x))
    if shift is not None:
        y = y + align_modulation(shift, x)
    return y.to(out_dtype or x.dtype).contiguous()


@fused_op(
    "(Tensor x, Tensor? scale=None, Tensor? shift=None, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-6, *, bool rms=False, ScalarType? out_dtype=None) -> Tensor"
)
def adaln_modulate(
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
    """``norm(x) * (1 + scale) + shift``, the norm being over the last axis (adaLN of Peebles and Xie,
    "Scalable Diffusion Models with Transformers", 2023). Without scale and shift, a plain norm.

    Args:
        x: (..., D), usually (B, S, D).
        scale, shift: (B, D) or (B, 1, D) per sample, (B, S, D) per token, or (D,); any sizes that broadcast
            to x's. ``chunk`` slices are fine, and so is a dtype other than x's.
        weight, bias: (D,), the norm's own affine parameters.
        eps: added to the variance (LayerNorm) or to the mean square (RMSNorm).
        rms: RMSNorm instead of LayerNorm.
        out_dtype: of the result; x's by default.

    Returns:
        A contiguous tensor of x's shape.

    Raises:
        ValueError: if a shape or dtype is none of the above.
    """
    y = normalized(x, weight, bias, eps, rms, (scale, shift))
    return with_modulation(y, x, scale, shift, out_dtype)


@adaln_modulate.check
def _check(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    check_norm(x, scale, shift, weight, bias, out_dtype)


@adaln_modulate.fake
def _fake(
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
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def as_samples(t: Tensor) -> Tensor:
    """``t`` (..., D) as (B, S, D), B being its first axis if it has several."""
    batch = t.shape[0] if t.dim() > 1 else 1
    return t.reshape(batch, math.prod(t.shape[1:-1]) if t.dim() > 2 else 1, t.shape[-1])


def as_row(t: Tensor) -> Tensor:
    """A modulation that is not per token, or a norm's parameter, as (B, D) or (1, D) in fp32."""
    return t.reshape(-1, t.shape[-1]).float().contiguous()


def adaln_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    grad_x: Tensor | None = None,
) -> dict[str, Tensor]:
    """The gradients of :func:`adaln_modulate`; ``grad_x`` is added to that of x."""
    w, b, s = (None if t is None else as_row(t) for t in (weight, bias, scale))
    factor = w if s is None else 1 + s if w is None else w * (1 + s)
    dx, dfactor, doffset = adaln_modulate_backward(
        as_samples(grad), as_samples(x), factor, eps, rms, None if grad_x is None else as_samples(grad_x)
    )
    dscale = dfactor if w is None else dfactor * w
    return {
        "x": dx,
        "scale": dscale if b is None else dscale + doffset * b,
        "shift": doffset,
        "weight": dfactor if s is None else dfactor * (1 + s),
        "bias": doffset if s is None else doffset * (1 + s),
    }


@adaln_modulate.backward("x", "scale", "weight", "bias")
def _backward(
    needed: frozenset[str],
    grads: tuple[Tensor],
    x: Tensor,
    scale: Tensor | None,
    shift: None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    return adaln_gradients(grads[0], x, scale, weight, bias, eps, rms)

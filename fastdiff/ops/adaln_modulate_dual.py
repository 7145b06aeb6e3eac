"""Two adaptive modulations of one LayerNorm or RMSNorm, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.adaln_modulate import adaln_gradients, check_modulation, check_norm, normalized, with_modulation


@fused_op(
    "(Tensor x, Tensor? scale=None, Tensor? shift=None, Tensor? scale2=None, Tensor? shift2=None, "
    "Tensor? weight=None, Tensor? bias=None, float eps=1e-6, *, bool rms=False, ScalarType? out_dtype=None) "
    "-> (Tensor, Tensor)"
)
def adaln_modulate_dual(
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
    """``norm(x) * (1 + scale) + shift`` and ``norm(x) * (1 + scale2) + shift2``, the norm being computed once: what
    dual attention (Stable Diffusion 3.5 medium, Diffusers' ``SD35AdaLayerNormZeroX``) and attention between two
    streams in both directions (LTX-2) start from.

    Args:
        x, weight, bias, eps, rms, out_dtype: as in :func:`adaln_modulate`.
        scale, shift, scale2, shift2: each as in :func:`adaln_modulate`.

    Returns:
        The two modulated tensors, both contiguous, of x's shape.

    Raises:
        ValueError: if a shape or dtype is none of those.
    """
    y = normalized(x, weight, bias, eps, rms, (scale, shift, scale2, shift2))
    first, second = (with_modulation(y, x, *m, out_dtype) for m in ((scale, shift), (scale2, shift2)))
    return first, second.clone() if second is first else second


@adaln_modulate_dual.check
def _check(
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
) -> None:
    check_norm(x, scale, shift, weight, bias, out_dtype)
    for name, t in (("scale2", scale2), ("shift2", shift2)):
        if t is not None:
            check_modulation(name, t.shape, x.shape)


@adaln_modulate_dual.fake
def _fake(x: Tensor, *args: object, out_dtype: torch.dtype | None = None, **kwargs: object) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    return y, torch.empty_like(y)


@adaln_modulate_dual.backward("x", "scale", "scale2", "weight", "bias")
def _backward(
    needed: frozenset[str],
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    scale: Tensor | None,
    shift: None,
    scale2: Tensor | None,
    shift2: None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    # A result that nothing depends on has no gradient.
    grad, grad2 = (torch.zeros_like(x) if g is None else g for g in grads)
    first = adaln_gradients(grad, x, scale, weight, bias, eps, rms)
    both = adaln_gradients(grad2, x, scale2, weight, bias, eps, rms, first["x"])
    return {
        "x": both["x"],
        "scale": first["scale"],
        "shift": first["shift"],
        "scale2": both["scale"],
        "shift2": both["shift"],
        "weight": first["weight"] + both["weight"],
        "bias": first["bias"] + both["bias"],
    }

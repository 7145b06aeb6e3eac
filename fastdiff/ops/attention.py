"""Scaled dot-product attention, with the log-sum-exp of its logits on request."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops._library import FusedOp


class _Attention(FusedOp[..., Any]):
    """The schema's result is always (out, lse); a call drops the empty ``lse`` where none was asked for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, lse = super().__call__(*args, **kwargs)
        return (out, lse) if kwargs.get("return_lse") else out


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q @ k^T + mask) @ v`` per head, the softmax in float32 (Vaswani et al., "Attention Is
    All You Need", 2017; kernels work blockwise as by Dao et al., "FlashAttention", 2022).

    A query whose keys are all masked gets zeros, as :func:`torch.nn.functional.scaled_dot_product_attention`
    gives it.

    Args:
        q: (B, Sq, H, D). Callers that hold (B, H, S, D) pass ``.transpose(1, 2)``.
        k: (B, Sk, H, D).
        v: (B, Sk, H, Dv). q, k and v are of one dtype.
        attn_mask: bool (True: attend) or floating (added to the scaled logits), of 2 to 4 axes that broadcast
            to (B, H, Sq, Sk).
        scale: of the logits; ``1 / sqrt(D)`` by default.
        is_causal: query i attends to keys 0 to i only; excludes ``attn_mask``.
        return_lse: also return the natural logarithm of the sum of the logits' exponentials (-inf where all
            keys are masked), as context parallelism needs it.

    Returns:
        ``out``, (B, Sq, H, Dv), contiguous, of q's dtype; with ``return_lse`` the pair (``out``, ``lse``) with
        ``lse`` (B, Sq, H) in float32 (float64 for float64 inputs). The overload, ``eager`` and
        ``choose(...).run`` return the pair in any case, ``lse`` being empty where it was not asked for.

    Raises:
        ValueError: if a shape or dtype is none of the above.
    """
    qh, kh, vh = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    wide = _lse_dtype(q)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
        attn_mask = attn_mask.to(wide)
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask, is_causal=is_causal, scale=scale)
    out = out.transpose(1, 2).contiguous()
    if not return_lse:
        return out, q.new_empty(0, dtype=wide)
    logits = qh.to(wide) @ kh.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if masked else logits + attn_mask
    return out, logits.logsumexp(-1).transpose(1, 2).contiguous()


_reference.__name__ = _reference.__qualname__ = "attention"
attention = _Attention(
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, *, float? scale=None, bool is_causal=False, "
    "bool return_lse=False) -> (Tensor, Tensor)",
    _reference,
)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@attention.check
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> None:
    qs, ks, vs = q.shape, k.shape, v.shape
    if not (
        len(qs) == len(ks) == len(vs) == 4
        and qs[0] == ks[0] == vs[0]
        and qs[2] == ks[2] == vs[2]
        and qs[3] == ks[3]
        and ks[1] == vs[1]
    ):
        raise ValueError(
            f"q, k and v have shapes {tuple(qs)}, {tuple(ks)} and {tuple(vs)}, expected (B, Sq, H, D), "
            "(B, Sk, H, D) and (B, Sk, H, Dv)"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected one floating dtype")
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("is_causal excludes attn_mask: put the causal part into the mask")
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        raise ValueError(f"attn_mask is {attn_mask.dtype}, expected torch.bool or a floating-point dtype")
    full, ms = (qs[0], qs[2], qs[1], ks[1]), attn_mask.shape
    if not 2 <= len(ms) <= 4 or any(m not in (1, n) for m, n in zip(ms, full[-len(ms) :], strict=True)):
        raise ValueError(f"attn_mask has shape {tuple(ms)}, not one that broadcasts to (B, H, Sq, Sk) = {full}")


@attention.fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=_lse_dtype(q))
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse

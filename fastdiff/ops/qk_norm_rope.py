"""Norm of queries and keys, rotary position embedding, and the joint sequence of two streams, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op
from fastdiff.ops.adaln_modulate import adaln_modulate

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor? q_weight=None, Tensor? k_weight=None, Tensor? q_bias=None, Tensor? k_bias=None, "
    "Tensor? cos=None, Tensor? sin=None, Tensor? text_q=None, Tensor? text_k=None, Tensor? text_q_weight=None, "
    "Tensor? text_k_weight=None, float? eps=1e-6, *, bool rms=True, bool across_heads=False, "
    "bool interleaved=True, bool text_first=True, int rope_start=0) -> (Tensor, Tensor)"
)


@fused_op(_SCHEMA)
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    rms: bool = True,
    across_heads: bool = False,
    interleaved: bool = True,
    text_first: bool = True,
    rope_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them: normalised (Henry et al., "Query-Key Normalization for
    Transformers", 2020), rotated (Su et al., "RoFormer", 2021) and, where a text stream is given, put into one
    sequence with it.

    Rotation takes each pair (a, b) of a token's elements to (a cos - b sin, b cos + a sin).

    Args:
        q: (B, S, H, D).
        k: (B, Sk, Hk, D) of q's dtype; Hk may be 0, where keys are not to be rotated.
        q_weight, k_weight, q_bias, k_bias: (D,), or with ``across_heads`` (H D,): the norms' affine parameters.
        cos, sin: tables of R <= D elements per token, as (T, R) or (B or 1, T, H or 1, R). Complex tables come as
            ``cos=torch.view_as_real(table)``, so with R/2 pairs (cosine, sine) in the last two axes, without ``sin``.
        text_q, text_k: a second stream, (B, St, H, D) and (B, St, Hk, D), with norms of its own. The rotation is of
            the joint sequence.
        text_q_weight, text_k_weight: (D,) or (H D,).
        eps: added to the mean square or the variance; ``None``: no norm.
        rms: RMSNorm, else LayerNorm.
        across_heads: one norm over all heads of a token instead of one per head.
        interleaved: pairs are elements (2i, 2i + 1), else (i, i + R/2).
        text_first: whether the text comes first in the joint sequence.
        rope_start: the token of the joint sequence that the tables begin with; they end with token
            ``rope_start + T``. Tokens outside, and elements from R on, are not rotated.

    Returns:
        The queries (B, S + St, H, D) and keys (B, Sk + St, Hk, D), contiguous and of q's dtype.

    Raises:
        ValueError: if a shape or dtype is none of the above.
    """

    def joined(x: Tensor, weight: Tensor | None, bias: Tensor | None, text: Tensor | None, text_weight: Tensor | None,
               ) -> Tensor:  # fmt: skip
        parts = [_norm(x, weight, bias, eps, rms, across_heads)]
        if text is not None:
            parts.insert(0 if text_first else 1, _norm(text, text_weight, None, eps, rms, across_heads))
        y = torch.cat(parts, dim=1)
        return y if cos is None or not y.shape[2] else _rotate(y, cos, sin, rope_start, interleaved)

    return joined(q, q_weight, q_bias, text_q, text_q_weight), joined(k, k_weight, k_bias, text_k, text_k_weight)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, rms: bool, across_heads: bool
) -> Tensor:
    if eps is None:
        return x
    flat = x.flatten(2) if across_heads else x
    return adaln_modulate.eager(flat, None, None, weight, bias, eps, rms=rms).view(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor | None, start: int, interleaved: bool) -> Tensor:
    if sin is None:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else t.repeat(*(1,) * (t.dim() - 1), 2)
                    for t in cos.unbind(-1))  # fmt: skip
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    width, stop = cos.shape[-1], start + cos.shape[-3]
    part = x[:, start:stop, :, :width].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        partner = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), dim=-1)
    turned = (part * cos + partner * sin).to(x.dtype)
    if turned.shape == x.shape:
        return turned
    turned = torch.cat((turned, x[:, start:stop, :, width:]), dim=-1)
    return torch.cat((x[:, :start], turned, x[:, stop:]), dim=1)


@qk_norm_rope.check
def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    rms: bool = True,
    across_heads: bool = False,
    interleaved: bool = True,
    text_first: bool = True,
    rope_start: int = 0,
) -> None:
    qs, ks = q.shape, k.shape
    if len(qs) != 4 or len(ks) != 4 or qs[0] != ks[0] or qs[3] != ks[3]:
        raise ValueError(f"q and k have shapes {tuple(qs)} and {tuple(ks)}, expected (B, S, H, D) and (B, Sk, Hk, D)")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q and k are {q.dtype} and {k.dtype}, expected one floating-point dtype")
    if (text_q is None) != (text_k is None):
        raise ValueError("text_q and text_k go together: one of them is None")
    tokens = [qs[1], ks[1]]
    for i, (name, text, own) in enumerate((("text_q", text_q, q), ("text_k", text_k, k))):
        if text is not None:
            full, shape = own.shape, text.shape
            if len(shape) != 4 or shape[0] != full[0] or shape[2:] != full[2:] or text.dtype != own.dtype:
                raise ValueError(
                    f"{name} is {text.dtype} of shape {tuple(shape)}, expected {own.dtype} of shape "
                    f"({full[0]}, St, {full[2]}, {full[3]})"
                )
            tokens[i] += shape[1]
    for name, t, shape in (
        ("q_weight", q_weight, qs), ("k_weight", k_weight, ks), ("q_bias", q_bias, qs), ("k_bias", k_bias, ks),
        ("text_q_weight", text_q_weight, qs), ("text_k_weight", text_k_weight, ks),
    ):  # fmt: skip
        if t is None:
            continue
        wanted = shape[3] * (shape[2] if across_heads else 1)
        if eps is None or t.dim() != 1 or t.shape[0] != wanted:
            what = "there is no norm (eps is None)" if eps is None else f"expected ({wanted},)"
            raise ValueError(f"{name} has shape {tuple(t.shape)}, but {what}")
    if cos is not None:
        _check_tables(qs, ks, cos, sin, rope_start, min(tokens))
    elif sin is not None:
        raise ValueError("sin is given without cos")


def _check_tables(qs: torch.Size, ks: torch.Size, cos: Tensor, sin: Tensor | None, start: int, tokens: int) -> None:
    shape = tuple(cos.shape)
    if sin is None:
        if len(shape) < 3 or shape[-1] != 2:
            raise ValueError(f"cos has shape {shape} and there is no sin: expected (cosine, sine) pairs, (..., R/2, 2)")
        shape = (*shape[:-2], 2 * shape[-2])
    elif sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin is {sin.dtype} of shape {tuple(sin.shape)}, expected cos' {cos.dtype} of {tuple(cos.shape)}"
        )
    if not cos.is_floating_point():
        raise ValueError(f"cos is {cos.dtype}, expected floating point; pass torch.view_as_real of a complex table")
    fits = len(shape) in (2, 4) and 0 < shape[-1] <= qs[3] and shape[-1] % 2 == 0
    if fits and len(shape) == 4:
        fits = shape[0] in (1, qs[0]) and shape[2] in ({1, qs[2]} if ks[2] in (0, qs[2]) else {1})
    if not fits:
        raise ValueError(
            f"cos is a table of shape {shape}, expected (T, R) or (B or 1, T, H or 1, R) for {tuple(qs)}, R even"
        )
    if not 0 <= start <= tokens - shape[-3 if len(shape) == 4 else 0]:
        raise ValueError(f"tables of {shape[-3 if len(shape) == 4 else 0]} tokens from rope_start={start} on do not "
                         f"fit a sequence of {tokens}")  # fmt: skip


@qk_norm_rope.fake
def _fake(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    rms: bool = True,
    across_heads: bool = False,
    interleaved: bool = True,
    text_first: bool = True,
    rope_start: int = 0,
) -> tuple[Tensor, Tensor]:
    def like(x: Tensor, text: Tensor | None) -> Tensor:
        batch, tokens, heads, depth = x.shape
        return x.new_empty(batch, tokens + (0 if text is None else text.shape[1]), heads, depth)

    return like(q, text_q), like(k, text_k)

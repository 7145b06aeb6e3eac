"""Attention with QK norm, rotary embedding and a text stream: one forward for all families, and a row for each.

As in ``attention.py``, the module's forward is replaced and the processor stays what it is: another processor simply
runs, with fused attention if it dispatches (``dispatched.py``). What the processor would compute is said by its
:class:`AttentionRow`. Another attention backend, if somebody chose one, and context parallelism are left to Diffusers'
dispatcher; norm, rotation and concatenation are fused then too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from fastdiff.ops import attention, qk_norm_rope
from fastdiff.patching._site import Site, is_ours
from fastdiff.patching.blocks import Block, drop, forward, halves, once, rejoined
from fastdiff.patching.blocks.attention import ATTENTION, mask_by_head
from fastdiff.patching.blocks.dispatched import chosen_backend, dispatches, stock_attention, why_not_mode
from fastdiff.patching.blocks.token_norms import (
    NORM_SOURCES,
    is_rms,
    modulated,
    parameters_of,
    why_not_kinds,
    why_not_norms,
)

#: cos, sin (or ``None``) and rope_start, as :func:`fastdiff.ops.qk_norm_rope` takes them.
Tables = tuple[Tensor, Tensor | None, int]


def real_tables(value: Any, attn: Any, image: int, text: int) -> Tables:
    """A pair of real tables, of the joint sequence or of its first tokens."""
    cos, sin = value
    return cos, sin, 0


def tables_after_text(value: tuple[Tensor, Tensor], attn: Any, image: int, text: int) -> Tables:
    """Tables of the image's tokens, which come after the text's."""
    cos, sin = value
    return cos, sin, text


def complex_table(value: Tensor, attn: Any, image: int, text: int) -> Tables:
    """One complex table (S, D/2) or (B, S, D/2)."""
    pairs = torch.view_as_real(value)
    if value.dtype == torch.complex128:
        pairs = once(value, "float32 pairs", lambda value: torch.view_as_real(value).float())
    return (pairs if value.dim() == 2 else pairs.unsqueeze(2)), None, 0


def no_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor | None, **arguments: Any) -> None:
    """The processor ignores masks."""


def plain_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor | None, **arguments: Any) -> Tensor | None:
    """A mask that broadcasts to (B, H, Sq, Sk), or of the keys, (B, Sk)."""
    return mask[:, None, None] if mask is not None and mask.dim() == 2 and mask.shape[0] == image.shape[0] else mask


def head_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor | None, **arguments: Any) -> Tensor | None:
    """A mask as the legacy processors take it, for ``prepare_attention_mask``."""
    tokens = image if text is None else text
    return None if mask is None else mask_by_head(attn, mask, tokens.shape[1], tokens.shape[0])


@dataclass(frozen=True)
class AttentionRow:
    """What one of Diffusers' processors computes.

    Attributes:
        processor: ``module:name`` of its class.
        rope: name of the argument with the rotary tables; empty: there is none.
        tables: (that argument, module, image tokens, text tokens) -> :data:`Tables`.
        interleaved: see :func:`fastdiff.ops.qk_norm_rope`.
        across_heads: likewise.
        text_first: whether the text comes first in the joint sequence.
        joined: without projections of its own, the text goes through the image's, in one sequence with it.
        pair: the processor is for two streams only.
        cross_parallel: whether context parallelism applies to cross-attention.
        rotates_context: whether the keys of cross-attention are rotated as its queries are.
        mask: (module, mask, image, text, other arguments) -> the mask for attention.
        accepts: names of further arguments that the processor takes; their values matter to ``mask`` only.
        refuse: module -> why the processor does something else with this one, or ``None``.
        not_now: why it does so at the moment, or ``None``; asked at every call.
        sources: further functions that the processor relies on, for the guard.
    """

    processor: str
    rope: str = ""
    tables: Callable[[Any, Any, int, int], Tables] = real_tables
    interleaved: bool = True
    across_heads: bool = False
    text_first: bool = True
    joined: bool = False
    pair: bool = False
    cross_parallel: bool = True
    rotates_context: bool = True
    mask: Callable[..., Tensor | None] = plain_mask
    accepts: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = lambda attn: None
    not_now: Callable[[], str | None] = lambda: None
    sources: tuple[str, ...] = ("diffusers.models.embeddings:apply_rotary_emb",)


#: ``module:name`` of the processor's class -> its row. Filled by :func:`attention_block`.
_ROWS: dict[str, AttentionRow] = {}


def _processor_of(attn: Any) -> str:
    cls = type(attn.processor)
    return f"{cls.__module__}:{cls.__qualname__}"


def row_of(attn: Any) -> AttentionRow | None:
    return _ROWS.get(_processor_of(attn))


def joint_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replaces the attention module's forward."""
    site = self._fastdiff_site
    row, norms = row_of(self), _norms(self)
    reason = why_not_norms(hidden_states, *norms) or why_not(self)
    extra = kwargs
    if row is not None and row.rope and len(args) == 1:
        extra = {**kwargs, row.rope: args[0]}
    elif args:
        reason = "called with further positional arguments"
    if reason is None and row is not None:
        unknown = [name for name in extra if name != row.rope and name not in row.accepts]
        if unknown:
            reason = f"called with {', '.join(unknown)}"
        elif hidden_states.dim() != 3:
            reason = "its input is not (B, S, D)"
        elif encoder_hidden_states is None and row.pair:
            reason = "called without text"
    if row is None or reason is not None:
        return stock_attention(
            site, reason or "", self, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
        )
    image, text = hidden_states, encoder_hidden_states
    rope = extra.get(row.rope)
    mask = row.mask(self, attention_mask, image, text, **{n: extra[n] for n in row.accepts if n in extra})
    two_streams = text is not None and getattr(self, "add_q_proj", None) is not None
    joined = text is not None and row.joined and not two_streams
    context = None if two_streams or joined else text
    if joined and text is not None:
        image = rejoined(*((text, image) if row.text_first else (image, text)))
    query, key, value = _project(self, image, context)
    text_query = text_key = None
    if two_streams:
        text_query, text_key, text_value = _added_heads(self, text)
        value = torch.cat([text_value, value] if row.text_first else [value, text_value], dim=1)
    if rope is not None or norms[0] is not None or two_streams:
        tables: tuple[Any, ...] = (None, None, 0)
        if rope is not None:
            tables = row.tables(rope, self, hidden_states.shape[1], 0 if text is None else text.shape[1])
        if rope is not None and context is not None and not row.rotates_context:
            query, _ = prepare(site, row, norms, query, query[:, :, :0], None, None, *tables)
            key = key if norms[1] is None else modulated(site, "norm of keys", norms[1], key)
        else:
            query, key = prepare(site, row, norms, query, key, text_query, text_key, *tables)
    parallel = context is None or row.cross_parallel
    out = attend(site, self.processor, query, key, value, mask, parallel=parallel).flatten(2)
    if joined or not two_streams:
        out = _project_out(self, out)
    if text is None or context is not None:
        return out
    lengths = hidden_states.shape[1], text.shape[1]
    first, second = halves(out, lengths[1 if row.text_first else 0])
    image, text = (second, first) if row.text_first else (first, second)
    if joined:
        return image, text
    to_add_out = getattr(self, "to_add_out", None)
    return _project_out(self, image), text if to_add_out is None else to_add_out(text)


def attend(
    site: Site,
    processor: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    parallel: bool = True,
    slot: str = "attention",
) -> Tensor:
    """Attention by the fused op, or by the backend or the context parallelism that somebody chose.

    Keys and values may have fewer heads than queries.
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    config = getattr(processor, "_parallel_config", None) if parallel else None
    if config is None and chosen_backend(processor) is None:
        out, _ = site.serve(slot, attention, query, key, value, mask)
        return out
    if hasattr(processor, "_attention_backend"):
        backend = None if is_ours(processor._attention_backend) else processor._attention_backend
        return dispatch_attention_fn(query, key, value, mask, backend=backend, parallel_config=config)
    out, _ = site.serve(slot, attention, query, key, value, mask)  # such processors know no backends
    return out


def prepare(
    site: Site,
    row: AttentionRow,
    norms: tuple[Any, ...],
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised, rotated and joined with the text's. There may be no keys: with no heads."""
    norm_q, norm_k, norm_added_q, norm_added_k = norms
    eps, rms = None, True
    q_weight = k_weight = q_bias = k_bias = text_q_weight = text_k_weight = None
    if norm_q is not None:
        rms = is_rms(norm_q)
        q_weight, q_bias, eps = parameters_of(norm_q, query)
        k_weight, k_bias, _ = parameters_of(norm_k, key)
        if text_query is not None:
            text_q_weight, text_k_weight = norm_added_q.weight, norm_added_k.weight
    return site.serve(
        "norm and rotation", qk_norm_rope, query, key, q_weight, k_weight, q_bias, k_bias, cos, sin,
        text_query, text_key, text_q_weight, text_k_weight, eps,
        rms=rms, across_heads=row.across_heads, interleaved=row.interleaved, text_first=row.text_first,
        rope_start=start,
    )  # fmt: skip


def heads_of(attn: Any, x: Tensor) -> Tensor:
    """(B, S, H D) as (B, S, H, D). H is what is left: there are fewer heads under tensor parallelism."""
    return x.unflatten(-1, (-1, getattr(attn, "head_dim", None) or attn.inner_dim // attn.heads))


def _project(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values as strided heads (B, S, H, D)."""
    if not getattr(attn, "fused_projections", False):
        source = x if context is None else context
        parts: tuple[Tensor, ...] = (attn.to_q(x), attn.to_k(source), attn.to_v(source))
    elif hasattr(attn, "to_qkv"):
        parts = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        parts = (attn.to_q(x), *attn.to_kv(x if context is None else context).chunk(2, dim=-1))
    return tuple(heads_of(attn, t) for t in parts)


def _added_heads(attn: Any, text: Any) -> tuple[Tensor, ...]:
    if getattr(attn, "fused_projections", False):
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    return tuple(heads_of(attn, t) for t in parts)


def _project_out(attn: Any, x: Tensor) -> Tensor:
    layers = getattr(attn, "to_out", None)
    if layers is None or getattr(attn, "pre_only", False):
        return x
    x = layers[0](x)
    return drop(layers[1], x) if len(layers) > 1 else x


def _norms(attn: Any) -> tuple[Any, ...]:
    return tuple(getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))


def why_not(attn: Any) -> str | None:
    """Why the module is not what its processor's row says; it may be changed at any time."""
    row = row_of(attn)
    reason = _why_never(attn, row)
    return reason if row is None or reason is not None else row.not_now() or why_not_mode()


def _why_never(attn: Any, row: AttentionRow | None) -> str | None:
    """The same as far as it is the module's own doing."""
    norms = _norms(attn)
    if row is None:
        return f"its processor is {type(attn.processor).__name__}"
    if reason := row.refuse(attn):
        return reason
    if reason := why_they_differ(*norms):
        return reason
    if norms[0] is None and any(norm is not None for norm in norms):
        return "only the text is normalised"
    if getattr(attn, "add_q_proj", None) is not None and (norms[2] is None) != (norms[0] is None):
        return "only one stream is normalised"
    if any(getattr(norm, "bias", None) is not None for norm in norms[2:]):
        return "a norm of the text has a bias"
    if getattr(attn, "residual_connection", False) or getattr(attn, "rescale_output_factor", 1) != 1:
        return "it adds its input or divides its output"
    if getattr(attn, "group_norm", None) is not None or getattr(attn, "spatial_norm", None) is not None:
        return "it has a norm of feature maps"
    if getattr(attn, "norm_cross", None):
        return "it normalizes the context"
    return None


def why_they_differ(*norms: Any) -> str | None:
    """Why the norms, those of the image first, are not of one kind, or ``None``."""
    present = {(type(norm), norm.eps) for norm in norms if norm is not None}
    return "its norms differ" if len(present) > 1 or (norms[0] is None) != (norms[1] is None) else None


def attention_block(cls: str, *rows: AttentionRow, function: Callable[..., Any] = joint_attention) -> Block:
    """What is done with attention modules of the class ``module:name``, whose processors have the rows.

    Of the legacy class, which many families share, it is about those with these processors only. ``function``
    replaces the forward.
    """
    _ROWS.update({row.processor: row for row in rows})
    own = list(dict.fromkeys(source for row in rows for source in (f"{row.processor}.__call__", *row.sources)))

    def refuse(module: Any) -> str | None:
        row = row_of(module)
        known = row is not None or not dispatches(module)  # the processor may be another one by the next call
        return (_why_never(module, row) if known else None) or why_not_kinds(*_norms(module))

    processors = {row.processor for row in rows}
    return Block(
        cls=cls,
        what="QK norm, rotation and attention",
        sources=("forward", *own, *NORM_SOURCES),
        methods=forward(function),
        refuse=refuse,
        applies=lambda module: cls != LEGACY or _processor_of(module) in processors,
    )


LEGACY = ATTENTION.cls

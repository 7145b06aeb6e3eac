"""The legacy ``Attention`` class with its default processors: the U-Nets, DiT and the VAEs.

There are two: one for U-Nets in general, and one with added keys and values of the text (DeepFloyd IF, Kandinsky 2,
unCLIP). The forward is replaced, and computes the default processor's result as long as that is set. The processor
itself stays what it is: whatever sets, lists, counts or looks up processors sees stock ones, another
processor (IP-Adapter, slicing, PAG, fused projections) simply runs, and the forward's ``inspect.signature`` at
every call (about 30 us) is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0
from torch import Tensor, nn

from fastdiff.ops import attention, group_norm_silu
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, drop, forward, why_stock
from fastdiff.patching.blocks.dispatched import dispatches, stock_attention, why_not_mode

#: One is for a norm of VAEs, the others for the processors of IP-Adapters: stock code drops them at all other places.
_KNOWN_ARGUMENTS = {"temb", "ip_adapter_masks", "ip_hidden_states"}


def legacy_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Tensor:
    """Replaces ``Attention.forward``. Heads stay strided views of the projections, (B, S, H, D)."""
    site = self._fastdiff_site
    norm = self.group_norm
    reason = why_stock(hidden_states) if norm is None else why_stock(hidden_states, norm)
    if reason is None:
        reason = _why_not(self)
    if unknown := [name for name in cross_attention_kwargs if name not in _KNOWN_ARGUMENTS]:
        reason = f"called with {', '.join(unknown)}"
    if reason is not None:
        return stock_attention(
            site, reason, self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )

    residual = hidden_states
    if self.spatial_norm is not None:
        hidden_states = self.spatial_norm(hidden_states, cross_attention_kwargs.get("temb"))
    spatial = hidden_states.shape if hidden_states.dim() == 4 else None
    if norm is not None:
        tokens = _normed(site, "norm", norm, hidden_states if spatial is not None else hidden_states.mT)
    elif spatial is not None:
        tokens = hidden_states.flatten(2).mT
    else:
        tokens = hidden_states

    context = tokens if encoder_hidden_states is None else _context(self, encoder_hidden_states)
    query, key, value = self.to_q(tokens), self.to_k(context), self.to_v(context)
    batch, length, width = key.shape
    heads = self.heads
    head_dim = width // heads
    if attention_mask is not None:
        attention_mask = mask_by_head(self, attention_mask, length, batch)
    h, _ = site.serve(
        "attention",
        attention,
        query.view(batch, -1, heads, head_dim),
        key.view(batch, length, heads, head_dim),
        value.view(batch, length, heads, head_dim),
        attention_mask,
    )

    out, dropout = self.to_out
    h = out(h.flatten(2))
    h = drop(dropout, h)
    if spatial is not None:
        h = h.transpose(1, 2).reshape(spatial)
    if self.residual_connection:
        h = h + residual
    return h if self.rescale_output_factor == 1 else h / self.rescale_output_factor


def added_kv_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Tensor:
    """Replaces ``Attention.forward`` where text has keys and values of its own, before those of the image."""
    site = self._fastdiff_site
    norm = self.group_norm
    reason = why_stock(hidden_states, norm) or _why_not_added(self)
    if cross_attention_kwargs:
        reason = f"called with {', '.join(cross_attention_kwargs)}"
    elif encoder_hidden_states is None:
        reason = "called without encoder_hidden_states"
    if reason is not None:
        return stock_attention(
            site, reason, self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )

    tokens, context = _normed(site, "norm", norm, hidden_states), _context(self, encoder_hidden_states)
    batch, length, _ = tokens.shape
    query, key, value = self.to_q(tokens), self.add_k_proj(context), self.add_v_proj(context)
    if not self.only_cross_attention:
        key = torch.cat([key, self.to_k(tokens)], dim=1)
        value = torch.cat([value, self.to_v(tokens)], dim=1)
    if attention_mask is not None:  # the stock code repeats it per head
        attention_mask = self.prepare_attention_mask(attention_mask, length, batch, out_dim=4)[:, :1]
    h, _ = site.serve(
        "attention",
        attention,
        query.unflatten(2, (self.heads, -1)),
        key.unflatten(2, (self.heads, -1)),
        value.unflatten(2, (self.heads, -1)),
        attention_mask,
    )
    out, dropout = self.to_out
    h = drop(dropout, out(h.flatten(2)))
    return h.mT.reshape(hidden_states.shape) + hidden_states


def _context(attn: Any, tokens: Any) -> Tensor:
    """What keys and values are made of."""
    norm = attn.norm_cross
    if norm is None:
        return tokens
    if why_stock(tokens, norm) is not None:  # a LayerNorm, in the first place
        return attn.norm_encoder_hidden_states(tokens)
    return _normed(attn._fastdiff_site, "norm_cross", norm, tokens.mT)


def _normed(site: Site, slot: str, norm: Any, x: Tensor) -> Tensor:
    """The norm of x (B, C, *spatial) as (B, S, C)."""
    return site.serve(
        slot, group_norm_silu, x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False, tokens=True
    )


def mask_by_head(attn: Any, mask: Tensor, length: int, batch: int) -> Tensor:
    """The mask as (B, H or 1, Sq or 1, Sk)."""
    if mask.dim() == 3 and mask.shape[0] == batch and mask.shape[2] == length:
        return mask.unsqueeze(1)  # one for all heads; the stock code repeats it per head
    mask = attn.prepare_attention_mask(mask, length, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def _why_not(module: Any) -> str | None:
    """Why the module is not what :func:`legacy_attention` computes; it may be changed at any time."""
    if type(module.processor) is not AttnProcessor2_0:
        return f"its processor is {type(module.processor).__name__}"
    return why_not_mode() or _why_never(module)


def _why_not_added(module: Any) -> str | None:
    """As :func:`_why_not`, for :func:`added_kv_attention`."""
    if type(module.processor) is not AttnAddedKVProcessor2_0:
        return f"its processor is {type(module.processor).__name__}"
    return "it has a SpatialNorm" if module.spatial_norm is not None else why_not_mode() or _why_never(module)


def _why_never(module: Any) -> str | None:
    """What of that is not expected to change: processors come and go."""
    if module.norm_q is not None or module.norm_k is not None:
        return "it normalizes queries or keys"
    if len(module.to_out) != 2:
        return f"it has {len(module.to_out)} output layers"
    return None


def _refuse(module: Any) -> str | None:
    reason = _why_never(module)
    if reason is not None:
        return reason
    if module.group_norm is not None and type(module.group_norm) is not nn.GroupNorm:
        return f"its norm is a {type(module.group_norm).__name__}"
    if module.added_kv_proj_dim is not None:
        return "it has added key and value projections"
    return None


def _refuse_added(module: Any) -> str | None:
    reason = "it has a SpatialNorm" if module.spatial_norm is not None else _why_never(module)
    if reason is not None:
        return reason
    return None if type(module.group_norm) is nn.GroupNorm else f"its norm is a {type(module.group_norm).__name__}"


def _has_added(module: Any) -> bool:
    # Joint attention has queries of the text, too, and says what becomes of them.
    # Subclasses need not have what ``Attention.__init__`` sets.
    added = getattr(module, "added_kv_proj_dim", None) is not None
    return added and getattr(module, "context_pre_only", None) is None


ATTENTION = Block(
    cls="diffusers.models.attention_processor:Attention",
    what="attention on strided heads",
    sources=(
        "forward",
        "prepare_attention_mask",
        "norm_encoder_hidden_states",
        "diffusers.models.attention_processor:AttnProcessor2_0.__call__",
    ),
    methods=forward(legacy_attention),
    refuse=_refuse,
    covers=("group_norm", "norm_cross"),
    applies=lambda module: not _has_added(module) and not dispatches(module),  # these processors do not
)

ADDED_KV_ATTENTION = Block(
    cls="diffusers.models.attention_processor:Attention",
    what="GroupNorm to tokens; attention on strided heads, with added keys and values",
    sources=(
        "forward",
        "prepare_attention_mask",
        "norm_encoder_hidden_states",
        "diffusers.models.attention_processor:AttnAddedKVProcessor2_0.__call__",
    ),
    methods=forward(added_kv_attention),
    refuse=_refuse_added,
    covers=("group_norm", "norm_cross"),
    applies=lambda module: _has_added(module) and not dispatches(module),
)

"""The legacy ``Attention`` class with its default processor: SD 1, 2 and XL, DiT, DDPM and the VAEs.

Its forward is replaced, and computes the default processor's result as long as the default processor is set. The
processor itself stays what it is: whatever sets, lists, counts or looks up processors sees stock ones, another
processor (IP-Adapter, slicing, PAG, fused projections) simply runs, and the forward's ``inspect.signature`` at
every call (about 30 us) is gone.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from fastdiff.ops import attention, group_norm_silu
from fastdiff.patching.blocks import Block, drop, forward, why_stock


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
    if cross_attention_kwargs and cross_attention_kwargs.keys() != {"temb"}:
        reason = f"called with {', '.join(cross_attention_kwargs)}"
    elif norm is not None and hidden_states.dim() != 4:
        reason = "its GroupNorm takes tokens"
    if reason is not None:
        return site.stock(reason, self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)

    residual = tokens = hidden_states
    spatial = hidden_states.shape if hidden_states.dim() == 4 else None
    if norm is not None:
        tokens = site.serve(
            "norm", group_norm_silu, hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps,
            silu=False, tokens=True,
        )  # fmt: skip
    elif spatial is not None:
        tokens = hidden_states.flatten(2).transpose(1, 2)

    context = tokens if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = self.to_q(tokens), self.to_k(context), self.to_v(context)
    batch, length, width = key.shape
    heads = self.heads
    head_dim = width // heads
    if attention_mask is not None:
        attention_mask = _mask_by_head(self, attention_mask, length, batch)
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


def _mask_by_head(attn: Any, mask: Tensor, length: int, batch: int) -> Tensor:
    """The mask as (B, H or 1, Sq or 1, Sk)."""
    if mask.dim() == 3 and mask.shape[0] == batch and mask.shape[2] == length:
        return mask.unsqueeze(1)  # one for all heads; the stock code repeats it per head
    mask = attn.prepare_attention_mask(mask, length, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def _why_not(module: Any) -> str | None:
    """Why the module is not what :func:`legacy_attention` computes; it may be changed at any time."""
    if type(module.processor) is not AttnProcessor2_0:
        return f"its processor is {type(module.processor).__name__}"
    return _why_never(module)


def _why_never(module: Any) -> str | None:
    """What of that is not expected to change: processors come and go."""
    if module.spatial_norm is not None:
        return "it has a SpatialNorm"
    if module.norm_cross or module.norm_q is not None or module.norm_k is not None:
        return "it normalizes queries, keys or the context"
    if len(module.to_out) != 2:
        return f"it has {len(module.to_out)} output layers"
    return None


def _refuse(module: Any) -> str | None:
    reason = _why_never(module)
    if reason is not None:
        return reason
    if module.group_norm is not None and type(module.group_norm) is not nn.GroupNorm:
        return f"its norm is a {type(module.group_norm).__name__}"
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "it has added key and value projections"
    return None


ATTENTION = Block(
    cls="diffusers.models.attention_processor:Attention",
    what="attention on strided heads",
    sources=(
        "forward",
        "prepare_attention_mask",
        "diffusers.models.attention_processor:AttnProcessor2_0.__call__",
    ),
    methods=forward(legacy_attention),
    refuse=_refuse,
    covers=("group_norm",),
)

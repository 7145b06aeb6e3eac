"""Parts of transformer blocks: the entrance from feature maps to tokens, and adaLN-Zero with its gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops import gate_residual, gate_residual_adaln, group_norm_silu
from fastdiff.patching.blocks import Block, activated_once, forward, why_stock
from fastdiff.patching.blocks.token_norms import NORM_SOURCES, modulated, why_not_kinds, why_not_norms


def continuous_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
    """Replaces ``Transformer2DModel._operate_on_continuous_inputs``."""
    site = self._fastdiff_site
    norm, linear = self.norm, self.use_linear_projection
    reason = why_stock(hidden_states, norm)
    if reason is not None:
        return site.stock(reason, self, hidden_states, name="_operate_on_continuous_inputs")
    # A linear projection wants tokens, which the kernel writes directly; a convolution wants the feature map.
    h = site.serve(
        "norm", group_norm_silu, hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps,
        silu=False, tokens=linear,
    )  # fmt: skip
    if linear:
        return self.proj_in(h), h.shape[-1]
    h = self.proj_in(h)
    return h.permute(0, 2, 3, 1).flatten(1, 2), h.shape[1]


def continuous_outputs(
    self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """Replaces ``Transformer2DModel._get_output_for_continuous_inputs``: tokens are NHWC already."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    h = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    if residual.is_contiguous():
        h = h.contiguous()
    if not self.use_linear_projection:
        h = self.proj_out(h)
    return h + residual


def ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Replaces ``AdaLayerNormZero.forward``."""
    site, parts = self._fastdiff_site, self._modules
    norm = parts["norm"]
    reason = why_not_norms(x, norm)
    if reason is not None:
        return site.stock(reason, self, x, timestep, class_labels, hidden_dtype, emb)
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    modulation = parts["linear"](activated_once(parts["silu"], emb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    x = modulated(site, "norm", norm, x, scale, shift)
    return x, gate, shift_mlp, scale_mlp, gate_mlp


def ada_norm_zero_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Replaces ``BasicTransformerBlock.forward`` where ``norm_type="ada_norm_zero"`` (DiT)."""
    site = self._fastdiff_site
    norm3 = self.norm3
    reason = why_stock(hidden_states, norm3, kind=nn.LayerNorm) or _why_not_block(self)
    if cross_attention_kwargs:
        reason = "called with cross_attention_kwargs"
    elif self._chunk_size is not None:
        reason = "its feed-forward runs in chunks"
    elif hidden_states.dim() != 3:
        reason = "its input is not (B, S, D)"
    if reason is not None:
        return site.stock(
            reason, self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    h, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(
        hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype
    )
    h = self.attn1(
        h,
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
    )
    hidden_states, h = site.serve(
        "norm3", gate_residual_adaln, h, gate, hidden_states, scale_mlp, shift_mlp,
        norm3.weight, norm3.bias, norm3.eps,
    )  # fmt: skip
    return site.serve("gate", gate_residual, self.ff(h), gate_mlp, hidden_states)


def _refuse_transformer(module: Any) -> str | None:
    if not module.is_input_continuous:
        return "its input is not a feature map"
    return None if type(module.norm) is nn.GroupNorm else f"its norm is a {type(module.norm).__name__}"


def _why_not_block(module: Any) -> str | None:
    if module.norm_type != "ada_norm_zero":
        return f"norm_type={module.norm_type!r} has no modulation to fuse"
    if module.attn2 is not None or module.pos_embed is not None or "fuser" in module._modules:
        return "it has cross-attention, positions or a fuser"
    return None


def _refuse_block(module: Any) -> str | None:
    reason = _why_not_block(module)
    if reason is not None:
        return reason
    return None if type(module.norm3) is nn.LayerNorm else f"norm3 is a {type(module.norm3).__name__}"


TRANSFORMER_ENTRANCE = Block(
    cls="diffusers.models.transformers.transformer_2d:Transformer2DModel",
    what="GroupNorm to tokens",
    sources=("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"),
    methods=lambda module: [
        (module, "_operate_on_continuous_inputs", continuous_inputs),
        (module, "_get_output_for_continuous_inputs", continuous_outputs),
    ],
    refuse=_refuse_transformer,
    covers=("norm",),
)

ADA_LAYER_NORM_ZERO = Block(
    cls="diffusers.models.normalization:AdaLayerNormZero",
    what="norm + modulation",
    sources=("forward", *NORM_SOURCES),
    methods=forward(ada_layer_norm_zero),
    refuse=lambda module: why_not_kinds(module.norm),
)

ADA_NORM_ZERO_BLOCK = Block(
    cls="diffusers.models.attention:BasicTransformerBlock",
    what="gate + residual + LayerNorm + modulation; gate + residual",
    sources=("forward",),
    methods=forward(ada_norm_zero_block),
    refuse=_refuse_block,
)

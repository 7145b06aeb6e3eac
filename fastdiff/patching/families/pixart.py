"""``PixArtTransformer2DModel``: PixArt alpha and sigma. Latte's blocks are the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GEGLU, GELU_TANH
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs


@guarded("norm1", "norm2")
def ada_norm_single_block(
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
    """Replaces ``BasicTransformerBlock.forward`` where ``norm_type="ada_norm_single"``."""
    site = self._fastdiff_site
    reason = _why_not(self)
    if cross_attention_kwargs:
        reason = "called with cross_attention_kwargs"
    elif self._chunk_size is not None:
        reason = "its feed-forward runs in chunks"
    elif hidden_states.dim() != 3 or timestep is None:
        reason = "its input is not (B, S, D) with a timestep"
    if reason is not None or timestep is None:
        return site.stock(
            reason or "", self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    table = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
    h = modulated(site, "norm1", self.norm1, hidden_states, scale, shift)
    if self.pos_embed is not None:
        h = self.pos_embed(h)
    out = self.attn1(
        h,
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
    )
    if self.attn2 is not None:
        hidden_states, gate = gated(site, "gate", out, gate, hidden_states), None
        out = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
    hidden_states, h = gated_then_modulated(
        site, "norm2", out, gate, hidden_states, self.norm2, scale_mlp, shift_mlp
    )
    return gated(site, "feed-forward gate", self.ff(h), gate_mlp, hidden_states)


def _why_not(module: Any) -> str | None:
    if module.norm_type != "ada_norm_single":
        return f"norm_type={module.norm_type!r} has no modulation to fuse"
    return "it has a fuser" if "fuser" in module._modules else None


ADA_NORM_SINGLE_BLOCK = block_row(
    "diffusers.models.attention:BasicTransformerBlock",
    f"{MODULATED}; gate + residual",
    ada_norm_single_block,
    refuse=_why_not,
)


def example(model: Any) -> dict[str, Any]:
    """2 small latents, 9 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    size = 6 * config.patch_size
    mask = inputs.noise(2, 9) * 0 + 1
    mask[0, 5:] = 0
    none = {"resolution": None, "aspect_ratio": None}
    shape = {"resolution": inputs.noise(2, 2), "aspect_ratio": inputs.noise(2, 1)}
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "encoder_hidden_states": inputs.noise(2, 9, config.caption_channels or config.cross_attention_dim),
        "encoder_attention_mask": mask,
        "timestep": inputs.timestep(500, batch=2),
        "added_cond_kwargs": shape if model.use_additional_conditions else none,
    }


PIXART = Family(
    model="diffusers.models.transformers.pixart_transformer_2d:PixArtTransformer2DModel",
    blocks=(ADA_NORM_SINGLE_BLOCK, ATTENTION, GELU_TANH, GEGLU),
    example=example,
)

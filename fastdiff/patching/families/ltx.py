"""``LTXVideoTransformer3DModel``: LTX-Video."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import AttentionRow, Tables, attention_block, head_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_ltx"


@guarded("norm1", "norm2")
def ltx_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Replaces ``LTXVideoTransformerBlock.forward``; the modulation is per sample or per token."""
    site = self._fastdiff_site
    table = self.scale_shift_table
    table = table[None, None].to(temb.device) + temb.reshape(*temb.shape[:2], table.shape[0], -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.unbind(dim=2)
    h = modulated(site, "norm1", self.norm1, hidden_states, scale, shift)
    out = self.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    hidden_states = gated(site, "gate", out, gate, hidden_states)
    out = self.attn2(
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    hidden_states, h = gated_then_modulated(
        site, "norm2", out, None, hidden_states, self.norm2, scale_mlp, shift_mlp
    )
    return gated(site, "feed-forward gate", self.ff(h), gate_mlp, hidden_states)


def tables_by_head(value: tuple[Tensor, Tensor], attn: Any, image: int, text: int) -> Tables:
    """Tables over all heads, (B, S, H D), as (B, S, H, D)."""
    cos, sin = (t.unflatten(-1, (attn.heads, -1)) for t in value)
    return cos, sin, 0


def example(model: Any) -> dict[str, Any]:
    """2 frames of 3 by 4, 9 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    mask = inputs.noise(2, 9) * 0 + 1
    mask[0, 5:] = 0
    return {
        "hidden_states": inputs.noise(2, 24, config.in_channels),
        "encoder_hidden_states": inputs.noise(2, 9, config.caption_channels),
        "timestep": inputs.timestep(500, batch=2),
        "encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }


LTX = Family(
    model=f"{_FILE}:LTXVideoTransformer3DModel",
    blocks=(
        block_row(f"{_FILE}:LTXVideoTransformerBlock", f"{MODULATED}; gate + residual", ltx_block),
        attention_block(
            f"{_FILE}:LTXAttention",
            AttentionRow(
                processor=f"{_FILE}:LTXVideoAttnProcessor", rope="image_rotary_emb", tables=tables_by_head,
                across_heads=True, mask=head_mask, sources=(f"{_FILE}:apply_rotary_emb",),
            ),
        ),
        GELU_TANH,
    ),
    example=example,
)  # fmt: skip

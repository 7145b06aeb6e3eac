"""``AllegroTransformer3DModel``: Allegro, text to video, whose heads are rotated in three parts, one for each axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import qk_norm_rope
from fastdiff.patching.blocks import drop, why_stock
from fastdiff.patching.blocks.adaln import block_row, gated, guarded
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import (
    LEGACY,
    AttentionRow,
    attend,
    attention_block,
    head_mask,
    heads_of,
    joint_attention,
    why_not,
)
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_allegro"


@guarded("norm1", "norm2")
def allegro_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    temb: Any = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
) -> Tensor:
    """Replaces ``AllegroTransformerBlock.forward``."""
    site, x = self._fastdiff_site, hidden_states
    if x.dim() != 3:
        return site.stock(
            "its input is not (B, S, D)", self, x, encoder_hidden_states, temb, attention_mask,
            encoder_attention_mask, image_rotary_emb,
        )  # fmt: skip
    modulation = (self.scale_shift_table[None] + temb.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    h = modulated(site, "norm", self.norm1, x, scale, shift)
    out = self.attn1(
        h, encoder_hidden_states=None, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    if self.attn2 is not None:
        x, gate = gated(site, "gate", out, gate, x), None
        out = self.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask,
            image_rotary_emb=None,
        )  # fmt: skip
    slot = "norm before feed-forward"
    x, h = gated_then_modulated(site, slot, out, gate, x, self.norm2, mlp_scale, mlp_shift)
    return gated(site, "feed-forward gate", self.ff(h), mlp_gate, x)


def allegro_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    """Replaces ``Attention.forward``.

    ``image_rotary_emb`` has, for time, height and width, a pair of tables (n, D/3), and the tokens' rows in them,
    (B or 1, S) each.
    """
    if image_rotary_emb is None or self.is_cross_attention:
        return joint_attention(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    site = self._fastdiff_site
    reason = why_stock(hidden_states) or why_not(self)
    if kwargs or encoder_hidden_states is not None or hidden_states.dim() != 3:
        reason = "called in an unusual way"
    if reason is not None:
        kwargs["image_rotary_emb"] = image_rotary_emb
        return stock_attention(site, reason, self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    query, key, value = (heads_of(self, layer(hidden_states)) for layer in (self.to_q, self.to_k, self.to_v))
    parts = []
    for axis, q, k, tables, rows in zip("thw", query.chunk(3, -1), key.chunk(3, -1), *image_rotary_emb, strict=True):
        cos, sin = (F.embedding(rows, table).unsqueeze(2) for table in tables)
        rotated = site.serve(
            f"rotation {axis}", qk_norm_rope, q, k, cos=cos, sin=sin, eps=None, interleaved=False
        )  # fmt: skip
        parts.append(rotated)
    query, key = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    mask = head_mask(self, attention_mask, hidden_states, None)
    out = attend(site, self.processor, query, key, value, mask).flatten(2)
    return drop(self.to_out[1], self.to_out[0](out))


def example(model: Any) -> dict[str, Any]:
    """2 small clips of 2 frames, of which the second is cropped; 7 text tokens of which the first has 5."""
    config, inputs = model.config, Inputs(model)
    frames, height, width = 2, 2, 3
    shape = frames * config.patch_size_t, height * config.patch_size, width * config.patch_size
    mask, text_mask = torch.ones(2, *shape, device=inputs.device), torch.ones(2, 7, device=inputs.device)
    mask[1, ..., -config.patch_size :] = 0
    text_mask[0, 5:] = 0
    part = config.attention_head_dim // 3
    rates = 1e4 ** (-torch.arange(0, part, 2, device=inputs.device) / part)
    angles = (torch.arange(4, device=inputs.device)[:, None] * rates).repeat(1, 2)
    rows = torch.cartesian_prod(*(torch.arange(n, device=inputs.device) for n in (frames, height, width)))
    return {
        "hidden_states": inputs.noise(2, config.in_channels, *shape),
        "encoder_hidden_states": inputs.noise(2, 7, config.caption_channels),
        "timestep": inputs.timestep(500, batch=2),
        "attention_mask": mask,
        "encoder_attention_mask": text_mask,
        "image_rotary_emb": (((angles.cos(), angles.sin()),) * 3, tuple(rows.T[:, None])),
    }


ALLEGRO = Family(
    model=f"{_FILE}:AllegroTransformer3DModel",
    blocks=(
        block_row(f"{_FILE}:AllegroTransformerBlock", "norm + modulation; gate + residual", allegro_block),
        attention_block(
            LEGACY,
            AttentionRow(
                processor="diffusers.models.attention_processor:AllegroAttnProcessor2_0",
                rope="image_rotary_emb",
                mask=head_mask,
                sources=("diffusers.models.embeddings:apply_rotary_emb_allegro",),
            ),
            function=allegro_attention,
        ),
        GELU_TANH,
    ),
    example=example,
)

"""``HiDreamImageTransformer2DModel``: HiDream-I1, whose feed-forwards are mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.patching.blocks import halves, once
from fastdiff.patching.blocks.adaln import GATES, MODULATED, block_row, gated_feed_forward, guarded
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import silu_feed_forward_row
from fastdiff.patching.blocks.joint_attention import (
    AttentionRow,
    attend,
    attention_block,
    heads_of,
    prepare,
    why_not,
    why_they_differ,
)
from fastdiff.patching.blocks.token_norms import modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_hidream_image"
_ROW = AttentionRow(
    processor=f"{_FILE}:HiDreamAttnProcessor",
    rope="image_rotary_emb",
    across_heads=True,
    text_first=False,
    sources=(f"{_FILE}:apply_rope", f"{_FILE}:rope", f"{_FILE}:HiDreamImageEmbedND.forward"),
)


def _modulation(block: Any, temb: Tensor, streams: int) -> list[tuple[Tensor, ...]]:
    """Shift, scale, gate, and the same of the feed-forward, for each stream."""
    parts = block.adaLN_modulation(temb)[:, None].chunk(6 * streams, dim=-1)
    return [parts[i : i + 6] for i in range(0, len(parts), 6)]


@guarded("norm1_i", "norm1_t", "norm3_i", "norm3_t")
def double_block(
    self: Any,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Any = None,
    temb: Any = None,
    image_rotary_emb: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HiDreamImageTransformerBlock.forward``."""
    site, x, text = self._fastdiff_site, hidden_states, encoder_hidden_states
    (shift, scale, gate, *rest), (text_shift, text_scale, text_gate, *text_rest) = _modulation(self, temb, 2)
    h = modulated(site, "norm", self.norm1_i, x, scale, shift)
    text_h = modulated(site, "norm of text", self.norm1_t, text, text_scale, text_shift)
    out, text_out = self.attn1(h, hidden_states_masks, text_h, image_rotary_emb=image_rotary_emb)
    shift, scale, mlp_gate = rest
    x = gated_feed_forward(site, "image", x, out, gate, self.norm3_i, scale, shift, self.ff_i, mlp_gate)
    shift, scale, mlp_gate = text_rest
    text = gated_feed_forward(site, "text", text, text_out, text_gate, self.norm3_t, scale, shift, self.ff_t, mlp_gate)
    return x, text


@guarded("norm1_i", "norm3_i")
def single_block(
    self: Any,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Any = None,
    temb: Any = None,
    image_rotary_emb: Any = None,
) -> Tensor:
    """Replaces ``HiDreamImageSingleTransformerBlock.forward``."""
    site = self._fastdiff_site
    ((shift, scale, gate, mlp_shift, mlp_scale, mlp_gate),) = _modulation(self, temb, 1)
    h = modulated(site, "norm", self.norm1_i, hidden_states, scale, shift)
    out = self.attn1(h, hidden_states_masks, image_rotary_emb=image_rotary_emb)
    return gated_feed_forward(
        site, "joint", hidden_states, out, gate, self.norm3_i, mlp_scale, mlp_shift, self.ff_i, mlp_gate
    )


@guarded("norm_final")
def out_embed(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Replaces ``HiDreamImageOutEmbed.forward``."""
    shift, scale = self.adaLN_modulation(temb).chunk(2, dim=1)
    result: Tensor = self.linear(modulated(self._fastdiff_site, "norm", self.norm_final, hidden_states, scale, shift))
    return result


def rotation_pairs(matrices: Tensor) -> Tensor:
    """Cosines and sines, (..., D/2, 2), of rotation matrices (..., D/2, 2, 2): their first columns."""
    return matrices[..., 0].contiguous()


def hidream_attention(
    self: Any,
    norm_hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    norm_encoder_hidden_states: Any = None,
    image_rotary_emb: Any = None,
) -> Any:
    """Replaces ``HiDreamAttention.forward``: keys that a mask (B, S) says are padding of the picture become zero."""
    site, image, text = self._fastdiff_site, norm_hidden_states, norm_encoder_hidden_states
    norms = [self.q_rms_norm, self.k_rms_norm, None, None]
    if not self.single:
        norms[2:] = self.q_rms_norm_t, self.k_rms_norm_t
    reason = why_not_norms(image, *norms) or why_not(self) or why_they_differ(*norms)
    if reason is not None:
        return stock_attention(site, reason, self, image, hidden_states_masks, text, image_rotary_emb)
    query, key, value = (heads_of(self, layer(image)) for layer in (self.to_q, self.to_k, self.to_v))
    text_query = text_key = None
    if not self.single:
        layers = self.to_q_t, self.to_k_t, self.to_v_t
        text_query, text_key, text_value = (heads_of(self, layer(text)) for layer in layers)
        value = torch.cat([value, text_value], dim=1)
    pairs = once(image_rotary_emb, "pairs", rotation_pairs)
    query, key = prepare(site, _ROW, tuple(norms), query, key, text_query, text_key, pairs, None, 0)
    if hidden_states_masks is not None:
        mask = F.pad(hidden_states_masks, (0, key.shape[1] - hidden_states_masks.shape[1]), value=1.0)
        key = key * mask[:, :, None, None]
    out = attend(site, self.processor, query, key, value).flatten(2)
    if self.single:
        return self.to_out(out)
    first, second = halves(out, image.shape[1])
    return self.to_out(first), self.to_out_t(second)


def example(model: Any) -> dict[str, Any]:
    """2 square latents, 7 text tokens of T5 and 5 of Llama."""
    config, inputs = model.config, Inputs(model)
    size, (t5, llama) = 4 * config.patch_size, config.caption_channels
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "timesteps": inputs.timestep(500, batch=2),
        "encoder_hidden_states_t5": inputs.noise(2, 7, t5),
        "encoder_hidden_states_llama3": inputs.noise(1 + max(config.llama_layers), 2, 5, llama),
        "pooled_embeds": inputs.noise(2, config.text_emb_dim),
    }


HIDREAM = Family(
    model=f"{_FILE}:HiDreamImageTransformer2DModel",
    blocks=(
        block_row(f"{_FILE}:HiDreamImageTransformerBlock", GATES, double_block),
        block_row(f"{_FILE}:HiDreamImageSingleTransformerBlock", GATES, single_block),
        block_row(f"{_FILE}:HiDreamImageOutEmbed", MODULATED, out_embed),
        attention_block(f"{_FILE}:HiDreamAttention", _ROW, function=hidream_attention),
        silu_feed_forward_row(f"{_FILE}:HiDreamImageFeedForwardSwiGLU", "w1", "w3", "w2"),
    ),
    example=example,
)

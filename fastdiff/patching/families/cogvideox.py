"""``CogVideoXTransformer3DModel``: CogVideoX, text and image to video; and ConsisID, which has its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import activated_once
from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded
from fastdiff.patching.blocks.attention import mask_by_head
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, tables_after_text
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.cogvideox_transformer_3d"
_CONSISID = "diffusers.models.transformers.consisid_transformer_3d"
_NORMS = "diffusers.models.normalization"


@guarded("norm")
def two_streams(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces ``CogVideoXLayerNormZero.forward``."""
    site = self._fastdiff_site
    modulation = self.linear(activated_once(self.silu, temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = modulation
    h = modulated(site, "image norm", self.norm, hidden_states, scale, shift)
    text = modulated(site, "text norm", self.norm, encoder_hidden_states, text_scale, text_shift)
    return h, text, gate[:, None, :], text_gate[:, None, :]


@guarded("norm")
def ada_layer_norm(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Any = None) -> Tensor:
    """Replaces ``AdaLayerNorm.forward`` where ``chunk_dim`` is 1."""
    site = self._fastdiff_site
    if self.emb is not None:
        temb = self.emb(timestep)
    shift, scale = self.linear(activated_once(self.silu, temb)).chunk(2, dim=1)
    return modulated(site, "norm", self.norm, x, scale, shift)


@guarded()
def cogvideox_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``CogVideoXBlock.forward`` and ``ConsisIDBlock.forward``."""
    site = self._fastdiff_site
    tokens = encoder_hidden_states.shape[1]
    h, text, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
    out, text_out = self.attn1(
        hidden_states=h, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, **attention_kwargs or {}
    )
    hidden_states = gated(site, "image gate", out, gate, hidden_states)
    encoder_hidden_states = gated(site, "text gate", text_out, text_gate, encoder_hidden_states)
    h, text, gate, text_gate = self.norm2(hidden_states, encoder_hidden_states, temb)
    h = self.ff(torch.cat([text, h], dim=1))
    hidden_states = gated(site, "image feed-forward gate", h[:, tokens:], gate, hidden_states)
    return hidden_states, gated(site, "text feed-forward gate", h[:, :tokens], text_gate, encoder_hidden_states)


def joint_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor) -> Tensor | None:
    """A mask of the joint sequence, as the legacy processors take it."""
    return None if mask is None else mask_by_head(attn, mask, image.shape[1] + text.shape[1], image.shape[0])


def example(model: Any) -> dict[str, Any]:
    """2 latent frames of 4 by 6 patches and the text that the positions are for."""
    config, inputs = model.config, Inputs(model)
    patch, frames = config.patch_size, 2 * (config.get("patch_size_t") or 1)
    found: dict[str, Any] = {
        "hidden_states": inputs.noise(1, frames, config.in_channels, 4 * patch, 6 * patch),
        "encoder_hidden_states": inputs.noise(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.tensor([500], device=inputs.device),
    }
    if config.use_rotary_positional_embeddings:
        angle = torch.randn(48, config.attention_head_dim // 2, device=inputs.device).repeat_interleave(2, -1)
        found["image_rotary_emb"] = (angle.cos(), angle.sin())
    else:  # the positions are of all frames of the configuration
        height, width = config.sample_height, config.sample_width
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        found["hidden_states"] = inputs.noise(1, frames, config.in_channels, height, width)
    if config.get("ofs_embed_dim") is not None:
        found["ofs"] = inputs.timestep(2.0)
    return found


COGVIDEOX_ATTENTION = attention_block(
    LEGACY,
    AttentionRow(
        processor="diffusers.models.attention_processor:CogVideoXAttnProcessor2_0",
        rope="image_rotary_emb",
        tables=tables_after_text,
        joined=True,
        pair=True,
        mask=joint_mask,
    ),
)

ADA_LAYER_NORM = block_row(
    f"{_NORMS}:AdaLayerNorm", MODULATED, ada_layer_norm,
    refuse=lambda module: None if module.chunk_dim == 1 else "its embeddings are along the batch",
)  # fmt: skip
_BLOCKS = (
    block_row(f"{_FILE}:CogVideoXBlock", "gate + residual", cogvideox_block),
    block_row(f"{_CONSISID}:ConsisIDBlock", "gate + residual", cogvideox_block),
    block_row(f"{_NORMS}:CogVideoXLayerNormZero", MODULATED, two_streams),
    ADA_LAYER_NORM,
    COGVIDEOX_ATTENTION,
    GELU_TANH,
)
FAMILIES = (
    Family(f"{_FILE}:CogVideoXTransformer3DModel", _BLOCKS, example),
    Family(f"{_CONSISID}:ConsisIDTransformer3DModel", _BLOCKS, example),
)

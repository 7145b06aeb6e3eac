"""``HunyuanVideoTransformer3DModel``: HunyuanVideo; blocks with token replacement (image to video) are left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    block_row,
    gated,
    gated_feed_forward,
    guarded,
    left_row,
)
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GELU_TANH, activated
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_hunyuan_video"
_REPLACED = "its first frame has a modulation of its own"


@guarded("norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HunyuanVideoTransformerBlock.forward``."""
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    h, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(
        hidden_states=h, encoder_hidden_states=text, attention_mask=attention_mask, image_rotary_emb=freqs_cis
    )
    h = gated_feed_forward(
        site, "image", hidden_states, out, gate, self.norm2, scale_mlp, shift_mlp, self.ff, gate_mlp
    )
    return h, gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.norm2_context, text_scale, text_shift,
        self.ff_context, text_gate_mlp,
    )  # fmt: skip


@guarded()
def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HunyuanVideoSingleTransformerBlock.forward``."""
    site = self._fastdiff_site
    lengths = hidden_states.shape[1], encoder_hidden_states.shape[1]
    joint = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    h, gate = self.norm(joint, emb=temb)
    mlp = activated(site, self.act_mlp, self.proj_mlp(h))
    image, text = h.split(lengths, dim=1)
    out, text_out = self.attn(
        hidden_states=image,
        encoder_hidden_states=text,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    h = self.proj_out(torch.cat([torch.cat([out, text_out], dim=1), mlp], dim=2))
    image, text = gated(site, "gate", h, gate, joint).split(lengths, dim=1)
    return image, text


@guarded("norm1", "norm2")
def refiner_block(self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Replaces ``HunyuanVideoIndividualTokenRefinerBlock.forward``."""
    site = self._fastdiff_site
    h = modulated(site, "norm1", self.norm1, hidden_states)
    out = self.attn(hidden_states=h, encoder_hidden_states=None, attention_mask=attention_mask)
    gate, gate_mlp = self.norm_out(temb)
    hidden_states, h = gated_then_modulated(site, "norm2", out, gate, hidden_states, self.norm2)
    return gated(site, "gate", self.ff(h), gate_mlp, hidden_states)


def example(model: Any) -> dict[str, Any]:
    """2 small frames, 9 text tokens of which 6 count."""
    config, inputs = model.config, Inputs(model)
    size = 4 * config.patch_size
    mask = torch.ones(1, 9, dtype=torch.long, device=inputs.device)
    mask[:, 6:] = 0
    found = {
        "hidden_states": inputs.noise(1, config.in_channels, 2 * config.patch_size_t, size, size),
        "timestep": inputs.timestep(500),
        "encoder_hidden_states": inputs.noise(1, 9, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": inputs.noise(1, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        found["guidance"] = inputs.timestep(4000.0)
    return found


HUNYUAN_VIDEO = Family(
    model=f"{_FILE}:HunyuanVideoTransformer3DModel",
    blocks=(
        block_row(f"{_FILE}:HunyuanVideoTransformerBlock", GATES, double_block),
        block_row(f"{_FILE}:HunyuanVideoSingleTransformerBlock", "GELU; gate + residual", single_block),
        block_row(f"{_FILE}:HunyuanVideoIndividualTokenRefinerBlock", GATES, refiner_block),
        left_row(f"{_FILE}:HunyuanVideoTokenReplaceTransformerBlock", GATES, _REPLACED),
        left_row(f"{_FILE}:HunyuanVideoTokenReplaceSingleTransformerBlock", GATES, _REPLACED),
        attention_block(
            LEGACY,
            AttentionRow(
                processor=f"{_FILE}:HunyuanVideoAttnProcessor2_0", rope="image_rotary_emb", text_first=False,
                joined=True, pair=True,
            ),
        ),
        ATTENTION,
        ADA_LAYER_NORM_ZERO,
        ADA_LAYER_NORM_ZERO_SINGLE,
        ADA_LAYER_NORM_CONTINUOUS,
        GELU_TANH,
    ),
    example=example,
)  # fmt: skip

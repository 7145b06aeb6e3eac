"""``HunyuanVideoTransformer3DModel``: HunyuanVideo, with and without token replacement (image to video)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import activated_once, halves, rejoined
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    MODULATED,
    block_row,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GELU_TANH, activated
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_hunyuan_video"


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
    joint = rejoined(hidden_states, encoder_hidden_states)
    h, gate = self.norm(joint, emb=temb)
    h = _attention_beside_feed_forward(self, h, hidden_states.shape[1], attention_mask, image_rotary_emb)
    return halves(gated(site, "gate", h, gate, joint), hidden_states.shape[1])


def _attention_beside_feed_forward(block: Any, h: Tensor, image: int, mask: Any, rotary: Any) -> Tensor:
    """What a single block adds to its input, before the gate; the first ``image`` tokens are the image's."""
    mlp = activated(block._fastdiff_site, block.act_mlp, block.proj_mlp(h))
    tokens, text = halves(h, image)
    out = rejoined(
        *block.attn(hidden_states=tokens, encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=rotary)
    )
    return block.proj_out(torch.cat([out, mlp], dim=2))


@guarded("norm")
def replaced_norm(
    self: Any, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int
) -> tuple[Tensor, ...]:
    """Replaces the forward of ``HunyuanVideoTokenReplaceAdaLayerNormZero`` and of the one for single blocks.

    The first frame's tokens are known, and have a modulation of their own.
    """
    site = self._fastdiff_site
    parts, others = [], []
    for name, x, e in _frames(first_frame_num_tokens, hidden_states, (token_replace_emb, emb)):
        modulation = self.linear(activated_once(self.silu, e))
        shift, scale, *other = modulation.chunk(modulation.shape[-1] // x.shape[-1], dim=1)
        parts.append(modulated(site, f"norm of {name}", self.norm, x, scale, shift))
        others.append(other)
    return torch.cat(parts, dim=1), *others[1], *others[0]


def _frames(first: int, x: Tensor, *pairs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Of the first frame and then of the rest: its name, its tokens of x, and its part of every pair."""
    names = "the first frame", "the rest"
    return zip(names, (x[:, :first], x[:, first:]), *pairs, strict=True)


@guarded("norm2", "norm2_context")
def replaced_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HunyuanVideoTokenReplaceTransformerBlock.forward``."""
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    h, *modulations = self.norm1(hidden_states, temb, token_replace_emb, num_tokens)
    text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(
        hidden_states=h, encoder_hidden_states=text, attention_mask=attention_mask, image_rotary_emb=freqs_cis
    )
    by_frame = modulations[4:], modulations[:4]
    residuals, normed, parts = [], [], []
    outs = out[:, :num_tokens], out[:, num_tokens:]
    for name, x, branch, (gate, shift, scale, _) in _frames(num_tokens, hidden_states, outs, by_frame):
        x, h = gated_then_modulated(site, f"norm of {name}", branch, gate, x, self.norm2, scale, shift)
        residuals.append(x)
        normed.append(h)
    h = self.ff(torch.cat(normed, dim=1))
    for name, x, residual, (*_, gate) in _frames(num_tokens, h, tuple(residuals), by_frame):
        parts.append(gated(site, f"gate of {name}", x, gate, residual))
    return torch.cat(parts, dim=1), gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.norm2_context, text_scale, text_shift,
        self.ff_context, text_gate_mlp,
    )  # fmt: skip


@guarded()
def replaced_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HunyuanVideoTokenReplaceSingleTransformerBlock.forward``."""
    site, image = self._fastdiff_site, hidden_states.shape[1]
    joint = rejoined(hidden_states, encoder_hidden_states)
    h, gate, first_gate = self.norm(joint, temb, token_replace_emb, num_tokens)
    h = _attention_beside_feed_forward(self, h, image, attention_mask, image_rotary_emb)
    residuals = joint[:, :num_tokens], joint[:, num_tokens:]
    parts = [
        gated(site, f"gate of {name}", x, g, residual)
        for name, x, residual, g in _frames(num_tokens, h, residuals, (first_gate, gate))
    ]
    return halves(torch.cat(parts, dim=1), image)


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
        block_row(f"{_FILE}:HunyuanVideoTokenReplaceTransformerBlock", GATES, replaced_double_block),
        block_row(
            f"{_FILE}:HunyuanVideoTokenReplaceSingleTransformerBlock", "GELU; gate + residual", replaced_single_block
        ),
        block_row(f"{_FILE}:HunyuanVideoTokenReplaceAdaLayerNormZero", MODULATED, replaced_norm),
        block_row(f"{_FILE}:HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", MODULATED, replaced_norm),
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

"""``FluxTransformer2DModel`` and its ControlNet: Flux dev, schnell, Fill, Kontext, Depth, Canny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import halves, rejoined
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    block_row,
    clip_half,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH, activated
from fastdiff.patching.blocks.joint_attention import AttentionRow, attention_block
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families._savings import FLUX_TABLES

_FILE = "diffusers.models.transformers.transformer_flux"


def double(
    block: Any, image: Tensor, text: Tensor, temb: Tensor, text_temb: Tensor, **attention: Any
) -> tuple[Tensor, Tensor]:
    """A double block: joint attention, and of each stream the feed-forward; text and image."""
    site = block._fastdiff_site
    h, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(image, emb=temb)
    text_h, text_gate, text_shift, text_scale, text_gate_mlp = block.norm1_context(text, emb=text_temb)
    outputs = block.attn(hidden_states=h, encoder_hidden_states=text_h, **attention)
    h = gated_feed_forward(
        site, "image", image, outputs[0], gate, block.norm2, scale_mlp, shift_mlp, block.ff, gate_mlp
    )
    if len(outputs) == 3:  # of an IP-Adapter
        h = h + outputs[2]
    text = gated_feed_forward(
        site, "text", text, outputs[1], text_gate, block.norm2_context, text_scale, text_shift, block.ff_context,
        text_gate_mlp,
    )  # fmt: skip
    return clip_half(text), h


@guarded("norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``FluxTransformerBlock.forward``."""
    return double(
        self, hidden_states, encoder_hidden_states, temb, temb, image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )  # fmt: skip


def gelu(block: Any, h: Tensor) -> Tensor:
    """A single block's feed-forward as far as its activation."""
    return activated(block._fastdiff_site, block.act_mlp, block.proj_mlp(h))


def joint_single(
    block: Any, joint: Tensor, temb: Tensor, feed_forward: Callable[[Any, Tensor], Tensor] = gelu, **attention: Any
) -> Tensor:
    """A single block: attention and ``feed_forward``, as far as their common projection, from one norm."""
    h, gate = block.norm(joint, emb=temb)
    mlp = feed_forward(block, h)
    out = block.attn(hidden_states=h, **attention)
    out = block.proj_out(torch.cat([out, mlp], dim=2))
    return clip_half(gated(block._fastdiff_site, "gate", out, gate, joint))


def single(block: Any, image: Tensor, text: Tensor, *inputs: Any, **attention: Any) -> tuple[Tensor, Tensor]:
    """:func:`joint_single` of two streams."""
    return halves(joint_single(block, rejoined(text, image), *inputs, **attention), text.shape[1])


@guarded()
def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``FluxSingleTransformerBlock.forward``."""
    return single(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )  # fmt: skip


FLUX_ATTENTION = attention_block(
    f"{_FILE}:FluxAttention",
    AttentionRow(
        processor=f"{_FILE}:FluxAttnProcessor",
        rope="image_rotary_emb",
        accepts=("ip_hidden_states", "ip_adapter_masks"),  # for other blocks' processors: this one ignores them
    ),
)

FLUX_BLOCKS = (
    block_row(f"{_FILE}:FluxTransformerBlock", GATES, double_block),
    block_row(f"{_FILE}:FluxSingleTransformerBlock", "GELU; gate + residual", single_block),
    FLUX_ATTENTION,
    ADA_LAYER_NORM_ZERO,
    ADA_LAYER_NORM_ZERO_SINGLE,
    ADA_LAYER_NORM_CONTINUOUS,
    GELU_TANH,
)


def example(model: Any) -> dict[str, Any]:
    """4 by 6 latent patches and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    found = {
        "hidden_states": inputs.noise(1, 24, config.in_channels),
        "encoder_hidden_states": inputs.noise(1, 7, config.joint_attention_dim),
        "pooled_projections": inputs.noise(1, config.pooled_projection_dim),
        "timestep": inputs.timestep(),
        "img_ids": inputs.positions(1, 4, 6),
        "txt_ids": inputs.noise(7, 3) * 0,
    }
    if config.guidance_embeds:
        found["guidance"] = inputs.timestep(4.0)
    return found


def controlnet_example(model: Any) -> dict[str, Any]:
    """The same with a control image."""
    found = example(model)
    found["controlnet_cond"] = Inputs(model).noise(1, 24, model.controlnet_x_embedder.in_features)
    if model.union:
        found["controlnet_mode"] = torch.zeros(1, 1, dtype=torch.long, device=found["hidden_states"].device)
    return found


FLUX = Family(f"{_FILE}:FluxTransformer2DModel", FLUX_BLOCKS, example, (FLUX_TABLES,))
FLUX_CONTROLNET = Family(
    "diffusers.models.controlnets.controlnet_flux:FluxControlNetModel", FLUX_BLOCKS, controlnet_example, (FLUX_TABLES,)
)

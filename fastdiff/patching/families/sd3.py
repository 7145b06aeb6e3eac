"""``SD3Transformer2DModel`` and its ControlNet: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    GATES,
    SD35_ADA_LAYER_NORM_ZERO_X,
    block_row,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, no_mask
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs


@guarded("norm2", "norm2_context")
def joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Replaces ``JointTransformerBlock.forward``."""
    site = self._fastdiff_site
    if self._chunk_size is not None:
        return site.stock(
            "its feed-forward runs in chunks", self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )
    kwargs = joint_attention_kwargs or {}
    hidden_states = hidden_states.contiguous()  # some versions' patch embedding gives a transposed view
    h, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(hidden_states, emb=temb)
    if self.context_pre_only:
        text = self.norm1_context(encoder_hidden_states, temb)
    else:
        text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(hidden_states=h, encoder_hidden_states=text, **kwargs)
    if dual:
        hidden_states = gated(site, "image gate of attn", out, gate, hidden_states)
        h, gate = dual
        out = self.attn2(hidden_states=h, **kwargs)
    h = gated_feed_forward(
        site, "image", hidden_states, out, gate, self.norm2, scale_mlp, shift_mlp, self.ff, gate_mlp
    )
    if self.context_pre_only:
        return None, h
    return gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.norm2_context, text_scale, text_shift,
        self.ff_context, text_gate_mlp,
    ), h  # fmt: skip


SD3_ATTENTION = attention_block(
    LEGACY,
    AttentionRow(
        processor="diffusers.models.attention_processor:JointAttnProcessor2_0",
        text_first=False,
        mask=no_mask,
        sources=(),
    ),
)
SD3_BLOCKS = (
    block_row("diffusers.models.attention:JointTransformerBlock", GATES, joint_block),
    SD3_ATTENTION,
    ADA_LAYER_NORM_ZERO,
    SD35_ADA_LAYER_NORM_ZERO_X,
    ADA_LAYER_NORM_CONTINUOUS,
    GELU_TANH,
)


def example(model: Any) -> dict[str, Any]:
    """2 small latents and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    size = 6 * config.patch_size
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "encoder_hidden_states": inputs.noise(2, 7, config.joint_attention_dim),
        "pooled_projections": inputs.noise(2, config.pooled_projection_dim),
        "timestep": inputs.timestep(500, batch=2),
    }


def controlnet_example(model: Any) -> dict[str, Any]:
    """The same with a control image."""
    found = example(model)
    size = found["hidden_states"].shape[-1]
    channels = model.config.in_channels + model.config.extra_conditioning_channels
    return found | {"controlnet_cond": Inputs(model).noise(2, channels, size, size)}


SD3 = Family(
    model="diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel", blocks=SD3_BLOCKS, example=example
)
SD3_CONTROLNET = Family(
    model="diffusers.models.controlnets.controlnet_sd3:SD3ControlNetModel",
    blocks=SD3_BLOCKS,
    example=controlnet_example,
)

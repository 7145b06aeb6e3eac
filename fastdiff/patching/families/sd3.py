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


@guarded("norm2")
def single_block(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Replaces ``SD3SingleTransformerBlock.forward``, of ControlNets without text."""
    h, gate, shift, scale, gate_mlp = self.norm1(hidden_states, emb=temb)
    out = self.attn(hidden_states=h, encoder_hidden_states=None)
    return gated_feed_forward(
        self._fastdiff_site, "image", hidden_states.contiguous(), out, gate, self.norm2, scale, shift, self.ff, gate_mlp
    )


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
    block_row("diffusers.models.transformers.transformer_sd3:SD3SingleTransformerBlock", GATES, single_block),
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
    """The same with a control image; some take tokens, and some no text."""
    config, inputs = model.config, Inputs(model)
    size = 6 * config.patch_size
    found = {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "controlnet_cond": inputs.noise(2, config.in_channels + config.extra_conditioning_channels, size, size),
        "pooled_projections": inputs.noise(2, config.pooled_projection_dim),
        "timestep": inputs.timestep(500, batch=2),
    }
    if not config.use_pos_embed:
        found["hidden_states"] = inputs.noise(2, 36, model.inner_dim)
    if config.joint_attention_dim is not None:
        found["encoder_hidden_states"] = inputs.noise(2, 7, config.joint_attention_dim)
    return found


SD3 = Family(
    model="diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel", blocks=SD3_BLOCKS, example=example
)
SD3_CONTROLNET = Family(
    model="diffusers.models.controlnets.controlnet_sd3:SD3ControlNetModel",
    blocks=SD3_BLOCKS,
    example=controlnet_example,
)

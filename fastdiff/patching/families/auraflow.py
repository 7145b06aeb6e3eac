"""``AuraFlowTransformer2DModel``: AuraFlow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching._site import Site
from fastdiff.patching.blocks.adaln import GATES, block_row, gated, guarded
from fastdiff.patching.blocks.feed_forward import silu_feed_forward_row
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, no_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.auraflow_transformer_2d"


def _stream(
    site: Site, stream: str, x: Tensor, branch: Tensor, norm: Any, feed_forward: Any, modulation: list[Tensor]
) -> Tensor:
    """As in other families, but that the feed-forward is added to what came before the attention."""
    gate, shift, scale, feed_forward_gate = modulation
    _, h = gated_then_modulated(site, f"{stream} norm", branch, gate, x, norm, scale, shift)
    return gated(site, f"{stream} gate", feed_forward(h), feed_forward_gate, x)


@guarded("norm2", "norm2_context")
def joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``AuraFlowJointTransformerBlock.forward``."""
    site = self._fastdiff_site
    h, *modulation = self.norm1(hidden_states, emb=temb)
    text, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(hidden_states=h, encoder_hidden_states=text, **attention_kwargs or {})
    h = _stream(site, "image", hidden_states, out, self.norm2, self.ff, modulation)
    text = _stream(
        site, "text", encoder_hidden_states, text_out, self.norm2_context, self.ff_context, text_modulation
    )
    return text, h


@guarded("norm2")
def single_block(
    self: Any, hidden_states: Tensor, temb: Tensor, attention_kwargs: dict[str, Any] | None = None
) -> Tensor:
    """Replaces ``AuraFlowSingleTransformerBlock.forward``."""
    h, *modulation = self.norm1(hidden_states, emb=temb)
    out = self.attn(hidden_states=h, **attention_kwargs or {})
    return _stream(self._fastdiff_site, "joint", hidden_states, out, self.norm2, self.ff, modulation)


def example(model: Any) -> dict[str, Any]:
    """2 small latents and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    size = 4 * config.patch_size
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "encoder_hidden_states": inputs.noise(2, 7, config.joint_attention_dim),
        "timestep": inputs.timestep(batch=2),
    }


AURA_FLOW = Family(
    model=f"{_FILE}:AuraFlowTransformer2DModel",
    blocks=(
        block_row(f"{_FILE}:AuraFlowJointTransformerBlock", GATES, joint_block),
        block_row(f"{_FILE}:AuraFlowSingleTransformerBlock", GATES, single_block),
        attention_block(
            LEGACY,
            AttentionRow(
                processor="diffusers.models.attention_processor:AuraFlowAttnProcessor2_0", mask=no_mask, sources=()
            ),
        ),
        ADA_LAYER_NORM_ZERO,
        silu_feed_forward_row(f"{_FILE}:AuraFlowFeedForward", "linear_1", "linear_2", "out_projection"),
    ),
    example=example,
)

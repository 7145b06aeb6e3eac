"""``Lumina2Transformer2DModel``: Lumina Image 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import activated_once
from fastdiff.patching.blocks.adaln import MODULATED, block_row, guarded, sandwich
from fastdiff.patching.blocks.feed_forward import silu_feed_forward_row
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, complex_table
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_lumina2"
_NORMS = "diffusers.models.normalization"


@guarded("norm")
def rms_zero(self: Any, x: Tensor, emb: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces ``LuminaRMSNormZero.forward``."""
    scale, gate, scale_mlp, gate_mlp = self.linear(activated_once(self.silu, emb)).chunk(4, dim=1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale), gate, scale_mlp, gate_mlp


@guarded("norm")
def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Replaces ``LuminaLayerNormContinuous.forward``."""
    scale = self.linear_1(activated_once(self.silu, conditioning_embedding).to(x.dtype))
    x = modulated(self._fastdiff_site, "norm", self.norm, x, scale)
    return x if self.linear_2 is None else self.linear_2(x)


@guarded("norm2", "ffn_norm1", "ffn_norm2")
def lumina2_block(
    self: Any, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Tensor, temb: Tensor | None = None
) -> Tensor:
    """Replaces ``Lumina2TransformerBlock.forward``."""
    site = self._fastdiff_site
    gate = scale = gate_mlp = None
    if self.modulation:
        h, gate, scale, gate_mlp = self.norm1(hidden_states, temb)
    else:
        h = self.norm1(hidden_states)
    h = self.attn(
        hidden_states=h, encoder_hidden_states=h, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    norms = self.norm2, self.ffn_norm1, self.ffn_norm2
    return sandwich(site, hidden_states, h, norms, self.feed_forward, gate, scale, gate_mlp)


def example(model: Any) -> dict[str, Any]:
    """2 small latents, 7 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(2, 7, dtype=torch.bool, device=inputs.device)
    mask[0, 5:] = False
    size = 4 * config.patch_size
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "timestep": inputs.timestep(batch=2),
        "encoder_hidden_states": inputs.noise(2, 7, config.cap_feat_dim),
        "encoder_attention_mask": mask,
    }


def boolean_mask(attn: Any, mask: Tensor | None, image: Tensor, text: Tensor | None, **arguments: Any) -> Tensor | None:
    """A mask of the keys, (B, Sk)."""
    return None if mask is None else mask.bool()[:, None, None]


LUMINA2 = Family(
    model=f"{_FILE}:Lumina2Transformer2DModel",
    blocks=(
        block_row(f"{_FILE}:Lumina2TransformerBlock", "norms around attention and feed-forward", lumina2_block),
        block_row(f"{_NORMS}:LuminaRMSNormZero", MODULATED, rms_zero),
        block_row(f"{_NORMS}:LuminaLayerNormContinuous", MODULATED, continuous),
        attention_block(
            LEGACY,
            AttentionRow(
                processor=f"{_FILE}:Lumina2AttnProcessor2_0", rope="image_rotary_emb", tables=complex_table,
                mask=boolean_mask,
            ),
        ),
        silu_feed_forward_row("diffusers.models.attention:LuminaFeedForward", "linear_1", "linear_3", "linear_2"),
    ),
    example=example,
)  # fmt: skip

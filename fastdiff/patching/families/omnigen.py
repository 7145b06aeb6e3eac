"""``OmniGenTransformer2DModel``: OmniGen, a language model's blocks over text and picture in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import Block, forward
from fastdiff.patching.blocks.adaln import block_row, guarded
from fastdiff.patching.blocks.feed_forward import silu_product
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families.cogvideox import ADA_LAYER_NORM

_FILE = "diffusers.models.transformers.transformer_omnigen"


@guarded("input_layernorm", "post_attention_layernorm")
def omnigen_block(self: Any, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Any) -> Tensor:
    """Replaces ``OmniGenBlock.forward``."""
    site = self._fastdiff_site
    h = modulated(site, "norm before attention", self.input_layernorm, hidden_states)
    h = self.self_attn(
        hidden_states=h, encoder_hidden_states=h, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb
    )
    norm = self.post_attention_layernorm
    x, h = gated_then_modulated(site, "norm before feed-forward", h, None, hidden_states, norm)
    result: Tensor = x + self.mlp(h)
    return result


def feed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces ``OmniGenFeedForward.forward``."""
    gate, x = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    result: Tensor = self.down_proj(silu_product(self._fastdiff_site, self.activation_fn, gate, x))
    return result


def example(model: Any) -> dict[str, Any]:
    """2 small latents and 7 text tokens, to which the picture attends; the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    size = 4 * config.patch_size
    length = 7 + 1 + 16
    mask = torch.ones(2, length, length, device=inputs.device)
    mask[:, :8, 8:] = 0
    mask[0, :, :2] = 0
    return {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "timestep": inputs.timestep(batch=2),
        "input_ids": torch.arange(14, device=inputs.device).view(2, 7),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length, device=inputs.device).expand(2, length),
    }


OMNIGEN = Family(
    model=f"{_FILE}:OmniGenTransformer2DModel",
    blocks=(
        block_row(f"{_FILE}:OmniGenBlock", "norms before attention and feed-forward", omnigen_block),
        Block(
            cls=f"{_FILE}:OmniGenFeedForward",
            what="SiLU and product",
            sources=("forward",),
            methods=forward(feed_forward),
        ),
        attention_block(
            LEGACY,
            AttentionRow(processor=f"{_FILE}:OmniGenAttnProcessor2_0", rope="image_rotary_emb", interleaved=False),
        ),
        ADA_LAYER_NORM,
    ),
    example=example,
)

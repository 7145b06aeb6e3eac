"""``HunyuanDiT2DModel`` and its ControlNet: HunyuanDiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.patching.blocks import is_plain, once
from fastdiff.patching.blocks.adaln import ADA_LAYER_NORM_CONTINUOUS, MODULATED, block_row, guarded
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, head_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.hunyuan_transformer_2d"


@guarded("norm")
def shifted_norm(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Replaces ``AdaLayerNormShift.forward``."""

    def activated(emb: Tensor) -> Tensor:
        return self.silu(emb.to(torch.float32)).to(emb.dtype)

    emb = once(emb, "SiLU in float32", activated) if is_plain(self.silu, nn.SiLU) else activated(emb)
    return modulated(self._fastdiff_site, "norm", self.norm, x, None, self.linear(emb))


@guarded("norm2", "norm3")
def hunyuan_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    skip: Any = None,
) -> Tensor:
    """Replaces ``HunyuanDiTBlock.forward``."""
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    if self.skip_linear is not None:
        reason = why_not_norms(hidden_states, self.skip_norm)
        if reason is not None:
            return site.stock(reason, self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, skip)
        both = torch.cat([hidden_states, skip], dim=-1)
        hidden_states = self.skip_linear(modulated(site, "skip norm", self.skip_norm, both))
    h = self.attn1(self.norm1(hidden_states, temb), image_rotary_emb=image_rotary_emb)
    hidden_states, h = gated_then_modulated(site, "norm2", h, None, hidden_states, self.norm2)
    h = self.attn2(h, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=image_rotary_emb)
    hidden_states, h = gated_then_modulated(site, "norm3", h, None, hidden_states, self.norm3)
    return hidden_states + self.ff(h)


def example(model: Any) -> dict[str, Any]:
    """2 small latents and the text tokens that the padding is for, of which the first sample has fewer."""
    config, inputs = model.config, Inputs(model)
    masks = [torch.ones(2, n, dtype=torch.long, device=inputs.device) for n in (config.text_len, config.text_len_t5)]
    for mask in masks:
        mask[0, mask.shape[1] // 2 :] = 0
    angle = torch.randn(24, config.attention_head_dim // 2, device=inputs.device).repeat_interleave(2, -1)
    found = {
        "hidden_states": inputs.noise(2, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        "timestep": inputs.timestep(500, batch=2),
        "encoder_hidden_states": inputs.noise(2, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": masks[0],
        "encoder_hidden_states_t5": inputs.noise(2, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": masks[1],
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }
    if config.use_style_cond_and_image_meta_size:
        found["image_meta_size"] = inputs.noise(2, 6) * 0 + 64
        found["style"] = torch.zeros(2, dtype=torch.long, device=inputs.device)
    return found


def controlnet_example(model: Any) -> dict[str, Any]:
    """The same with a control image."""
    found = example(model)
    return found | {"controlnet_cond": Inputs(model).noise(*found["hidden_states"].shape)}


HUNYUAN_BLOCKS = (
    block_row(f"{_FILE}:HunyuanDiTBlock", "norm", hunyuan_block),
    block_row(f"{_FILE}:AdaLayerNormShift", MODULATED, shifted_norm),
    attention_block(
        LEGACY,
        AttentionRow(
            processor="diffusers.models.attention_processor:HunyuanAttnProcessor2_0", rope="image_rotary_emb",
            rotates_context=False, mask=head_mask,
        ),
    ),
    ADA_LAYER_NORM_CONTINUOUS,
    GELU_TANH,
)  # fmt: skip

HUNYUAN_DIT = Family(model=f"{_FILE}:HunyuanDiT2DModel", blocks=HUNYUAN_BLOCKS, example=example)
HUNYUAN_DIT_CONTROLNET = Family(
    model="diffusers.models.controlnets.controlnet_hunyuan:HunyuanDiT2DControlNetModel",
    blocks=HUNYUAN_BLOCKS,
    example=controlnet_example,
)

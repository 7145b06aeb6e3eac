"""``SanaTransformer2DModel``: Sana. Its linear self-attention stays: it is fp32 matrix products and a ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops import swiglu
from fastdiff.patching.blocks import is_plain
from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded, left_row
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, head_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.sana_transformer"


@guarded("norm1", "norm2")
def sana_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    height: Any = None,
    width: Any = None,
) -> Tensor:
    """Replaces ``SanaTransformerBlock.forward``."""
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    table = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
    h = modulated(site, "norm1", self.norm1, hidden_states, scale, shift)
    out = self.attn1(h)
    if self.attn2 is not None:
        hidden_states, gate = gated(site, "gate", out, gate, hidden_states), None
        out = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
    hidden_states, h = gated_then_modulated(
        site, "norm2", out, gate, hidden_states, self.norm2, scale_mlp, shift_mlp
    )
    h = self.ff(h.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    h = h.flatten(2, 3).permute(0, 2, 1).contiguous()  # as it is where the convolutions run channels-last
    return gated(site, "feed-forward gate", h, gate_mlp, hidden_states)


@guarded()
def gated_convolution(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces ``GLUMBConv.forward``; the product runs in the layout that the convolution gives."""
    site = self._fastdiff_site
    if not is_plain(self.nonlinearity, nn.SiLU):
        return site.stock("its activation is another, or has hooks", self, hidden_states)
    h = self.conv_depth(self.nonlinearity(self.conv_inverted(hidden_states)))
    if h.is_contiguous():
        x, gate = h.chunk(2, dim=1)
        h = site.serve("swiglu", swiglu, gate, x)
    else:
        x, gate = h.permute(0, 2, 3, 1).chunk(2, dim=-1)
        h = site.serve("swiglu", swiglu, gate, x).permute(0, 3, 1, 2)
    h = self.conv_point(h)
    if self.norm_type == "rms_norm":
        h = self.norm(h.movedim(1, -1)).movedim(-1, 1)
    return h + hidden_states if self.residual_connection else h


@guarded("norm")
def modulated_norm(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    """Replaces ``SanaModulatedNorm.forward``."""
    shift, scale = (scale_shift_table[None] + temb[:, None].to(scale_shift_table.device)).chunk(2, dim=1)
    return modulated(self._fastdiff_site, "norm", self.norm, hidden_states, scale, shift)


def example(model: Any) -> dict[str, Any]:
    """2 small latents, 9 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(2, 9, device=inputs.device)
    mask[0, 5:] = 0
    size = 4 * config.patch_size
    found = {
        "hidden_states": inputs.noise(2, config.in_channels, size, size),
        "encoder_hidden_states": inputs.noise(2, 9, config.caption_channels),
        "encoder_attention_mask": mask,
        "timestep": inputs.timestep(500, batch=2),
    }
    if config.get("guidance_embeds"):
        found["guidance"] = inputs.timestep(4.0, batch=2)
    return found


def controlnet_example(model: Any) -> dict[str, Any]:
    """The same with a control image."""
    found = example(model)
    return found | {"controlnet_cond": Inputs(model).noise(*found["hidden_states"].shape)}


GATED_CONVOLUTION = block_row(f"{_FILE}:GLUMBConv", "SiLU and product", gated_convolution)
_BLOCKS = (
    block_row(f"{_FILE}:SanaTransformerBlock", f"{MODULATED}; gate + residual", sana_block),
    GATED_CONVOLUTION,
    block_row(f"{_FILE}:SanaModulatedNorm", MODULATED, modulated_norm),
    left_row(
        LEGACY, "linear attention", "its attention has no softmax",
        applies=lambda module: type(module.processor).__name__ == "SanaLinearAttnProcessor2_0",
    ),
    attention_block(
        LEGACY,
        AttentionRow(processor=f"{_FILE}:SanaAttnProcessor2_0", across_heads=True, mask=head_mask, sources=()),
    ),
)  # fmt: skip
FAMILIES = (
    Family(f"{_FILE}:SanaTransformer2DModel", _BLOCKS, example),
    Family("diffusers.models.controlnets.controlnet_sana:SanaControlNetModel", _BLOCKS, controlnet_example),
)

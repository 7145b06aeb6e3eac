"""``QwenImageTransformer2DModel``: Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.patching.blocks import activated_once, is_plain, once
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    GATES,
    block_row,
    clip_half,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, Tables, attention_block
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_qwenimage"


def _modulation(parameters: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """shift, scale and gate, twice; with ``index``, the batch's second half is for the tokens whose index is not 0."""
    found = parameters.chunk(6, dim=-1)
    if index is None:
        return found
    first = (index == 0).unsqueeze(-1)
    batch = parameters.shape[0] // 2
    return tuple(torch.where(first, t[:batch, None], t[batch:, None]) for t in found)


def _project(modulation: Any, temb: Tensor) -> Tensor:
    """``modulation(temb)``: a SiLU, the same in all blocks, and a linear layer."""
    if not is_plain(modulation, nn.Sequential) or len(modulation) != 2:
        return modulation(temb)
    activation, linear = modulation
    return linear(activated_once(activation, temb))


@guarded("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
def qwen_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``QwenImageTransformerBlock.forward``."""
    site = self._fastdiff_site
    image_mod = _modulation(_project(self.img_mod, temb), modulate_index)
    text_temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
    text_mod = _modulation(_project(self.txt_mod, text_temb), None)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = image_mod
    text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = text_mod
    h = modulated(site, "image norm1", self.img_norm1, hidden_states, scale, shift)
    text = modulated(site, "text norm1", self.txt_norm1, encoder_hidden_states, text_scale, text_shift)
    out, text_out = self.attn(
        hidden_states=h,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )
    h = gated_feed_forward(
        site, "image", hidden_states, out, gate, self.img_norm2, scale_mlp, shift_mlp, self.img_mlp, gate_mlp
    )
    text = gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.txt_norm2, text_scale_mlp, text_shift_mlp,
        self.txt_mlp, text_gate_mlp,
    )  # fmt: skip
    return clip_half(text), clip_half(h)


def joint_table(value: tuple[Tensor, Tensor], attn: Any, image: int, text: int) -> Tables:
    """The complex tables of text and image, one after the other."""
    image_table, text_table = value

    def joint(text_table: Tensor) -> Tensor:
        return torch.view_as_real(torch.cat([text_table, image_table]))

    return once(text_table, ("joint with", image_table), joint), None, 0


def joint_mask(
    attn: Any, mask: Tensor | None, image: Tensor, text: Tensor, encoder_hidden_states_mask: Tensor | None = None
) -> Tensor | None:
    """The text's mask, and all of the image; older versions of Diffusers give the joint mask."""
    if mask is not None or encoder_hidden_states_mask is None:
        return mask

    def joint(mask: Tensor) -> Tensor:
        return torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1).bool()[:, None, None]

    return once(encoder_hidden_states_mask, ("joint mask", image.shape[1]), joint)


QWEN_ATTENTION = attention_block(
    LEGACY,
    AttentionRow(
        processor=f"{_FILE}:QwenDoubleStreamAttnProcessor2_0",
        rope="image_rotary_emb",
        tables=joint_table,
        pair=True,
        mask=joint_mask,
        accepts=("encoder_hidden_states_mask",),
        sources=(f"{_FILE}:apply_rotary_emb_qwen",),
    ),
)


def example(model: Any) -> dict[str, Any]:
    """4 by 6 latent patches and 7 text tokens; for editing, another picture of 2 by 3."""
    config, inputs = model.config, Inputs(model)
    shapes = [(1, 4, 6), (1, 2, 3)] if config.get("zero_cond_t") else [(1, 4, 6)]
    found = {
        "hidden_states": inputs.noise(1, sum(h * w for _, h, w in shapes), config.in_channels),
        "encoder_hidden_states": inputs.noise(1, 7, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool, device=inputs.device),
        "timestep": inputs.timestep(),
        "img_shapes": [shapes],
    }
    if config.get("use_additional_t_cond"):
        found["additional_t_cond"] = torch.zeros(1, dtype=torch.long, device=inputs.device)
    return found


def controlnet_example(model: Any) -> dict[str, Any]:
    """The same with a control image."""
    found = example(model)
    return found | {"controlnet_cond": Inputs(model).noise(1, 24, model.controlnet_x_embedder.in_features)}


_BLOCKS = (
    block_row(
        f"{_FILE}:QwenImageTransformerBlock", GATES, qwen_block,
        sources=(f"{_FILE}:QwenImageTransformerBlock._modulate",),
    ),
    QWEN_ATTENTION,
    GELU_TANH,
    ADA_LAYER_NORM_CONTINUOUS,
)
FAMILIES = (
    Family(f"{_FILE}:QwenImageTransformer2DModel", _BLOCKS, example),
    Family(
        "diffusers.models.controlnets.controlnet_qwenimage:QwenImageControlNetModel", _BLOCKS, controlnet_example
    ),
)

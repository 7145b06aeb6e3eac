"""Wan 2.1 and 2.2, text and image to video, and what is made of its blocks: VACE, Animate, ChronoEdit, SkyReels V2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.patching.blocks import Block, drop
from fastdiff.patching.blocks.adaln import GATES, block_row, gated, guarded
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import (
    AttentionRow,
    attend,
    attention_block,
    heads_of,
    joint_attention,
    prepare,
    row_of,
    why_not,
)
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILES = "diffusers.models.transformers.transformer_"


def _block(block: Any, x: Tensor, text: Tensor, modulation: Any, rotary_emb: Any, mask: Tensor | None = None) -> Tensor:
    """A block, given its six modulations. These stay in fp32, per sample or per token."""
    site = block._fastdiff_site
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    h = modulated(site, "norm1", block.norm1, x, scale, shift)
    out = block.attn1(h, None, mask, rotary_emb)
    if type(block.norm2) is nn.Identity:
        x = h = gated(site, "gate", out, gate, x)
    else:
        x, h = gated_then_modulated(site, "norm2", out, gate, x, block.norm2)
    out = block.attn2(h, text, None, None)
    x, h = gated_then_modulated(site, "norm3", out, None, x, block.norm3, scale_mlp, shift_mlp)
    return gated(site, "feed-forward gate", block.ffn(h), gate_mlp, x)


@guarded("norm1", "norm3", or_identity="norm2")
def wan_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
) -> Tensor:
    """Replaces ``WanTransformerBlock.forward``."""
    hidden_states = hidden_states.contiguous()  # some versions' patch embedding gives a transposed view
    if temb.ndim == 4:
        modulation = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    else:
        modulation = (self.scale_shift_table + temb.float()).unbind(1)
    return _block(self, hidden_states, encoder_hidden_states, modulation, rotary_emb)


@guarded("norm1", "norm3", or_identity="norm2")
def skyreels_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any, attention_mask: Any
) -> Tensor:
    """Replaces ``SkyReelsV2TransformerBlock.forward``: frames may have times of their own, and see no later ones."""
    hidden_states = hidden_states.contiguous()
    table = self.scale_shift_table.unsqueeze(2) if temb.dim() == 4 else self.scale_shift_table
    modulation = (table + temb.float()).unbind(1)
    return _block(self, hidden_states, encoder_hidden_states, modulation, rotary_emb, attention_mask)


@guarded("norm1", "norm3", or_identity="norm2")
def vace_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """Replaces ``WanVACETransformerBlock.forward``."""
    if self.proj_in is not None:
        control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
    modulation = (self.scale_shift_table.to(temb.device) + temb.float()).unbind(1)
    control = _block(self, control_hidden_states.contiguous(), encoder_hidden_states, modulation, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control), control


def wan_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replaces ``WanAttention.forward``; in image to video, cross-attention is to the text and to an image."""
    if self.add_k_proj is None:
        return joint_attention(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
    site, row = self._fastdiff_site, row_of(self)
    norms = self.norm_q, self.norm_k, None, self.norm_added_k
    reason = why_not_norms(hidden_states, *norms) or why_not(self)
    if kwargs or rotary_emb is not None or encoder_hidden_states is None:
        reason = "called in an unusual way"
    elif self.fused_projections:
        reason = "its projections are fused"
    if reason is not None or encoder_hidden_states is None or row is None:
        return stock_attention(
            site, reason or "", self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
        )
    tokens = encoder_hidden_states.shape[1] - 512  # the text's, in Diffusers too
    image, text = encoder_hidden_states[:, :tokens], encoder_hidden_states[:, tokens:]
    query, key, value = (
        heads_of(self, t) for t in (self.to_q(hidden_states), self.to_k(text), self.to_v(text))
    )
    query, key = prepare(site, row, norms, query, key, None, None, None, None, 0)
    image_key = modulated(site, "norm of the image's keys", self.norm_added_k, self.add_k_proj(image))
    image_value = heads_of(self, self.add_v_proj(image))
    parallel = row.cross_parallel
    out = attend(site, self.processor, query, key, value, attention_mask, parallel=parallel)
    image_out = attend(
        site, self.processor, query, heads_of(self, image_key), image_value, parallel=parallel, slot="image attention"
    )
    out = self.to_out[0](out.flatten(2) + image_out.flatten(2))
    return drop(self.to_out[1], out)


def _rows(name: str, prefix: str, block: Any, *, cross_parallel: bool = False) -> tuple[Block, ...]:
    """The blocks and attentions of a file, whose classes' names begin with ``prefix``."""
    file = f"{_FILES}{name}"
    row = AttentionRow(
        processor=f"{file}:{prefix}AttnProcessor",
        rope="rotary_emb",
        across_heads=True,
        cross_parallel=cross_parallel,
        sources=(f"{file}:_get_qkv_projections", f"{file}:_get_added_kv_projections"),
    )
    return (
        block_row(f"{file}:{prefix}TransformerBlock", GATES, block),
        attention_block(f"{file}:{prefix}Attention", row, function=wan_attention),
    )


def example(model: Any) -> dict[str, Any]:
    """3 small frames; 512 text tokens where an image's come with them, because the model counts them off."""
    config, inputs = model.config, Inputs(model)
    found = {
        "hidden_states": inputs.noise(1, config.in_channels, 3, 4, 6),
        "encoder_hidden_states": inputs.noise(1, 512 if config.image_dim else 9, config.text_dim),
        "timestep": inputs.timestep(500),
    }
    if config.image_dim:
        tokens = config.pos_embed_seq_len or 11
        found["encoder_hidden_states_image"] = inputs.noise(1, tokens, config.image_dim)
    return found


def vace_example(model: Any) -> dict[str, Any]:
    """The same with a control video."""
    inputs = Inputs(model)
    return example(model) | {
        "control_hidden_states": inputs.noise(1, model.config.vace_in_channels, 3, 4, 6),
        "control_hidden_states_scale": torch.linspace(0.5, 1.0, len(model.config.vace_layers), **inputs.like),
    }


def skyreels_example(model: Any) -> dict[str, Any]:
    """3 small frames of one time; with diffusion forcing 4, each of its own."""
    found, config, inputs = example(model), model.config, Inputs(model)
    if config.inject_sample_info:
        found["hidden_states"] = inputs.noise(1, config.in_channels, 4, 4, 6)
        found["timestep"] = inputs.positions(4).T * 100 + 500
        found |= {"enable_diffusion_forcing": True, "fps": [1]}
    return found


BLOCKS = (
    *_rows("wan", "Wan", wan_block),
    *_rows("wan_animate", "Wan", wan_block),
    *_rows("chronoedit", "Wan", wan_block),
    *_rows("skyreels_v2", "SkyReelsV2", skyreels_block, cross_parallel=True),
    block_row(f"{_FILES}wan_vace:WanVACETransformerBlock", GATES, vace_block),
    GELU_TANH,
)

FAMILIES = (
    Family(f"{_FILES}wan:WanTransformer3DModel", BLOCKS, example),
    Family(f"{_FILES}wan_vace:WanVACETransformer3DModel", BLOCKS, vace_example),
    Family(f"{_FILES}chronoedit:ChronoEditTransformer3DModel", BLOCKS, example),
    Family(f"{_FILES}skyreels_v2:SkyReelsV2Transformer3DModel", BLOCKS, skyreels_example),
)

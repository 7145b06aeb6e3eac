"""``Flux2Transformer2DModel``: Flux 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks import Block, activated_once, forward
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    GATES,
    MODULATED,
    block_row,
    clip_half,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import silu_product
from fastdiff.patching.blocks.joint_attention import AttentionRow, attend, attention_block, heads_of, prepare, why_not
from fastdiff.patching.blocks.token_norms import modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families._savings import FLUX2_TABLES, replacing

_FILE = "diffusers.models.transformers.transformer_flux2"


def _split(mod: Tensor, sets: int) -> tuple[Tensor, ...]:
    """shift, scale, gate of every set, per sample or per token."""
    return (mod.unsqueeze(1) if mod.ndim == 2 else mod).chunk(3 * sets, dim=-1)


@guarded("norm1", "norm1_context", "norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``Flux2TransformerBlock.forward``."""
    site = self._fastdiff_site
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _split(temb_mod_img, 2)
    text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = _split(temb_mod_txt, 2)
    h = modulated(site, "image norm1", self.norm1, hidden_states, scale, shift)
    text = modulated(site, "text norm1", self.norm1_context, encoder_hidden_states, text_scale, text_shift)
    out, text_out = self.attn(
        hidden_states=h, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {}
    )
    h = gated_feed_forward(
        site, "image", hidden_states, out, gate, self.norm2, scale_mlp, shift_mlp, self.ff, gate_mlp
    )
    text = gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.norm2_context, text_scale_mlp, text_shift_mlp,
        self.ff_context, text_gate_mlp,
    )  # fmt: skip
    return clip_half(text), h


@guarded("norm")
def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """Replaces ``Flux2SingleTransformerBlock.forward``."""
    site = self._fastdiff_site
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _split(temb_mod, 1)
    h = modulated(site, "norm", self.norm, hidden_states, scale, shift)
    out = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {})
    hidden_states = clip_half(gated(site, "gate", out, gate, hidden_states))
    if split_hidden_states:
        return hidden_states[:, :text_seq_len], hidden_states[:, text_seq_len:]
    return hidden_states


def parallel_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replaces ``Flux2ParallelSelfAttention.forward``: attention and feed-forward from one projection to one."""
    site = self._fastdiff_site
    reason = why_not_norms(hidden_states, self.norm_q, self.norm_k) or why_not(self)
    if kwargs:
        reason = f"called with {', '.join(kwargs)}"
    if reason is not None:
        return stock_attention(site, reason, self, hidden_states, attention_mask, image_rotary_emb, **kwargs)
    h = self.to_qkv_mlp_proj(hidden_states)
    # Under tensor parallelism both parts are narrower, by the same factor.
    qkv, mlp = 3 * self.inner_dim, self.mlp_hidden_dim * self.mlp_mult_factor
    local = h.shape[-1] * qkv // (qkv + mlp)
    query, key, value = (heads_of(self, t) for t in h[..., :local].chunk(3, dim=-1))
    tables = (None, None, 0) if image_rotary_emb is None else (*image_rotary_emb, 0)
    query, key = prepare(site, _PARALLEL, (self.norm_q, self.norm_k, None, None), query, key, None, None, *tables)
    out = attend(site, self.processor, query, key, value, attention_mask).flatten(2)
    return self.to_out(torch.cat([out, self.mlp_act_fn(h[..., local:])], dim=-1))


def flux2_swiglu(self: Any, x: Tensor) -> Tensor:
    """Replaces ``Flux2SwiGLU.forward``."""
    half = x.shape[-1] // 2
    return silu_product(self._fastdiff_site, self.gate_fn, x[..., :half], x[..., half:])


def modulation(self: Any, temb: Tensor) -> Tensor:
    """Replaces ``Flux2Modulation.forward``, of which there are three, and a fourth in the last norm."""
    result: Tensor = self.linear(activated_once(self.act_fn, temb))
    return result


_PARALLEL = AttentionRow(processor=f"{_FILE}:Flux2ParallelSelfAttnProcessor", rope="image_rotary_emb")


def example(model: Any) -> dict[str, Any]:
    """4 by 6 latent patches and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    axes = len(config.axes_dims_rope)
    text = inputs.noise(7, axes) * 0
    text[:, -1] += torch.arange(7, device=inputs.device)
    found = {
        "hidden_states": inputs.noise(1, 24, config.in_channels),
        "encoder_hidden_states": inputs.noise(1, 7, config.joint_attention_dim),
        "timestep": inputs.timestep(),
        "img_ids": inputs.positions(*(1,) * (axes - 3), 4, 6, 1),
        "txt_ids": text,
    }
    if config.guidance_embeds:
        found["guidance"] = inputs.timestep(4.0)
    return found


FLUX2 = Family(
    model=f"{_FILE}:Flux2Transformer2DModel",
    blocks=(
        block_row(f"{_FILE}:Flux2TransformerBlock", GATES, double_block, sources=(f"{_FILE}:Flux2Modulation.split",)),
        block_row(
            f"{_FILE}:Flux2SingleTransformerBlock", f"{MODULATED}; gate + residual", single_block,
            sources=(f"{_FILE}:Flux2Modulation.split",),
        ),
        attention_block(
            f"{_FILE}:Flux2Attention",
            AttentionRow(processor=f"{_FILE}:Flux2AttnProcessor", rope="image_rotary_emb"),
        ),
        attention_block(f"{_FILE}:Flux2ParallelSelfAttention", _PARALLEL, function=parallel_attention),
        Block(
            cls=f"{_FILE}:Flux2SwiGLU", what="SiLU and product", sources=("forward",), methods=forward(flux2_swiglu)
        ),
        ADA_LAYER_NORM_CONTINUOUS,
    ),
    example=example,
    switches=(
        FLUX2_TABLES,
        replacing(f"{_FILE}:Flux2Modulation", modulation, "SiLU of the time embedding once instead of {count} times"),
    ),
)  # fmt: skip

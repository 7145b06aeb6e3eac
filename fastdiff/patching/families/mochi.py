"""``MochiTransformer3DModel``: Mochi."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm
from torch import Tensor

from fastdiff.patching.blocks import activated_once, once
from fastdiff.patching.blocks.adaln import ADA_LAYER_NORM_CONTINUOUS, MODULATED, block_row, guarded, sandwich
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import SWIGLU
from fastdiff.patching.blocks.joint_attention import AttentionRow, attend, attention_block, heads_of, prepare, why_not
from fastdiff.patching.blocks.token_norms import also_rms, modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families.lumina2 import rms_zero

_FILE = "diffusers.models.transformers.transformer_mochi"
_ATTENTION = "diffusers.models.attention_processor"
also_rms(MochiModulatedRMSNorm)


@guarded("norm")
def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Replaces ``MochiLayerNormContinuous.forward``."""
    scale = self.linear_1(activated_once(self.silu, conditioning_embedding).to(x.dtype))
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale)


@guarded("norm2", "norm3", "norm4", "norm2_context", "norm3_context", "norm4_context")
def mochi_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``MochiTransformerBlock.forward``."""
    site = self._fastdiff_site
    norms = self.norm2, self.norm3, self.norm4
    text_norms = self.norm2_context, self.norm3_context, self.norm4_context
    reason = why_not_norms(hidden_states, *[norm.norm for norm in (*norms, *text_norms) if norm is not None])
    if reason is not None:
        return site.stock(
            reason, self, hidden_states, encoder_hidden_states, temb, encoder_attention_mask, image_rotary_emb
        )
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    h, *modulation = self.norm1(hidden_states, temb)
    if self.context_pre_only:
        text = self.norm1_context(encoder_hidden_states, temb)
    else:
        text, *text_modulation = self.norm1_context(encoder_hidden_states, temb)
    out, text_out = self.attn1(
        hidden_states=h,
        encoder_hidden_states=text,
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    hidden_states = sandwich(site, hidden_states, out, norms, self.ff, *modulation, stream="image: ")
    if self.context_pre_only:
        return hidden_states, encoder_hidden_states
    return hidden_states, sandwich(
        site, encoder_hidden_states, text_out, text_norms, self.ff_context, *text_modulation, stream="text: "
    )


def _text_lengths(mask: Tensor) -> Tensor:
    """How many of each sample's text tokens count; -1 where these are not the first ones."""
    counts = mask.bool().sum(1)
    first = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    return torch.where((mask.bool() == first).all(1), counts, -1).cpu()


def _pairs(cos: Tensor, sin: Tensor) -> Tensor:
    return once(cos, ("pairs with", sin), lambda cos: torch.stack((cos, sin), dim=-1)[None])


def mochi_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    attention_mask: Any = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces ``MochiAttention.forward``: every sample attends to the text that it has, and to no padding."""
    site = self._fastdiff_site
    norms = self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k
    reason = why_not_norms(hidden_states, *norms) or why_not(self)
    if reason is None and kwargs:
        reason = f"called with {', '.join(kwargs)}"
    lengths: list[int] = []
    if reason is None:
        lengths = once(attention_mask, "lengths of text", _text_lengths).tolist()
        reason = "a sample's text is padded at the front" if -1 in lengths else None
    if reason is not None:
        kwargs["image_rotary_emb"] = image_rotary_emb
        return stock_attention(site, reason, self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    image, text = hidden_states, encoder_hidden_states
    query, key, value = (heads_of(self, layer(image)) for layer in (self.to_q, self.to_k, self.to_v))
    added = self.add_q_proj, self.add_k_proj, self.add_v_proj
    text_query, text_key, text_value = (heads_of(self, layer(text)) for layer in added)
    tables = (None, None, 0) if image_rotary_emb is None else (_pairs(*image_rotary_emb), None, 0)
    query, key = prepare(site, _ROW, norms, query, key, text_query, text_key, *tables)
    value = torch.cat([value, text_value], dim=1)
    parts = []
    for index, length in enumerate(lengths):
        query_i, key_i, value_i = (t[index : index + 1, : image.shape[1] + length] for t in (query, key, value))
        out = attend(site, self.processor, query_i, key_i, value_i).flatten(2)
        missing = text.shape[1] - length
        parts.append(torch.nn.functional.pad(out, (0, 0, 0, missing)) if missing else out)
    out, text_out = torch.cat(parts).split([image.shape[1], text.shape[1]], dim=1)
    out = self.to_out[1](self.to_out[0](out))
    return out, self.to_add_out(text_out) if hasattr(self, "to_add_out") else text_out


_ROW = AttentionRow(
    processor=f"{_ATTENTION}:MochiAttnProcessor2_0", rope="image_rotary_emb", text_first=False, pair=True, sources=()
)


def example(model: Any) -> dict[str, Any]:
    """2 small frames, 7 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(2, 7, dtype=torch.bool, device=inputs.device)
    mask[0, 5:] = False
    return {
        "hidden_states": inputs.noise(2, config.in_channels, 2, 4 * config.patch_size, 3 * config.patch_size),
        "encoder_hidden_states": inputs.noise(2, 7, config.text_embed_dim),
        "timestep": inputs.timestep(500, batch=2),
        "encoder_attention_mask": mask,
    }


MOCHI = Family(
    model=f"{_FILE}:MochiTransformer3DModel",
    blocks=(
        block_row(
            f"{_FILE}:MochiTransformerBlock", "norms around attention and feed-forward", mochi_block,
            sources=(f"{_FILE}:MochiModulatedRMSNorm.forward",),
        ),
        block_row(f"{_FILE}:MochiRMSNormZero", MODULATED, rms_zero),
        block_row(
            f"{_FILE}:MochiLayerNormContinuous", MODULATED, continuous,
            sources=(f"{_FILE}:MochiModulatedRMSNorm.forward",),
        ),
        attention_block(f"{_ATTENTION}:MochiAttention", _ROW, function=mochi_attention),
        ADA_LAYER_NORM_CONTINUOUS,
        SWIGLU,
    ),
    example=example,
)  # fmt: skip

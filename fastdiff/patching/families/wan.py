"""``WanTransformer3DModel``: Wan 2.1 and 2.2, text and image to video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff.patching.blocks import drop
from fastdiff.patching.blocks.adaln import GATES, block_row, gated, guarded
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import (
    AttentionRow,
    attend,
    attention_block,
    heads_of,
    joint_attention,
    prepare,
    why_not,
)
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated, why_not_norms
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_wan"


@guarded("norm1", "norm2", "norm3")
def wan_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
) -> Tensor:
    """Replaces ``WanTransformerBlock.forward``. The modulation stays in fp32, per sample or per token."""
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # some versions' patch embedding gives a transposed view
    if temb.ndim == 4:
        table = (self.scale_shift_table.unsqueeze(0) + temb.float()).unbind(2)
    else:
        table = (self.scale_shift_table + temb.float()).unbind(1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table
    h = modulated(site, "norm1", self.norm1, hidden_states, scale, shift)
    out = self.attn1(h, None, None, rotary_emb)
    if type(self.norm2) is nn.Identity:
        hidden_states = h = gated(site, "gate", out, gate, hidden_states)
    else:
        hidden_states, h = gated_then_modulated(site, "norm2", out, gate, hidden_states, self.norm2)
    hidden_states = hidden_states + self.attn2(h, encoder_hidden_states, None, None)
    h = modulated(site, "norm3", self.norm3, hidden_states, scale_mlp, shift_mlp)
    return gated(site, "feed-forward gate", self.ffn(h), gate_mlp, hidden_states)


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
    site = self._fastdiff_site
    norms = self.norm_q, self.norm_k, None, self.norm_added_k
    reason = why_not_norms(hidden_states, *norms) or why_not(self)
    if kwargs or rotary_emb is not None or encoder_hidden_states is None:
        reason = "called in an unusual way"
    elif self.fused_projections:
        reason = "its projections are fused"
    if reason is not None or encoder_hidden_states is None:
        return site.stock(reason, self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
    tokens = encoder_hidden_states.shape[1] - 512  # the text's, in Diffusers too
    image, text = encoder_hidden_states[:, :tokens], encoder_hidden_states[:, tokens:]
    query, key, value = (
        heads_of(self, t) for t in (self.to_q(hidden_states), self.to_k(text), self.to_v(text))
    )
    query, key = prepare(site, _ROW, norms, query, key, None, None, None, None, 0)
    image_key = modulated(site, "norm of the image's keys", self.norm_added_k, self.add_k_proj(image))
    image_value = heads_of(self, self.add_v_proj(image))
    out = attend(site, self.processor, query, key, value, attention_mask, parallel=False)
    image_out = attend(
        site, self.processor, query, heads_of(self, image_key), image_value, parallel=False, slot="image attention"
    )
    out = self.to_out[0](out.flatten(2) + image_out.flatten(2))
    return drop(self.to_out[1], out)


_ROW = AttentionRow(
    processor=f"{_FILE}:WanAttnProcessor",
    rope="rotary_emb",
    across_heads=True,
    cross_parallel=False,
    sources=(f"{_FILE}:_get_qkv_projections", f"{_FILE}:_get_added_kv_projections"),
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


WAN = Family(
    model=f"{_FILE}:WanTransformer3DModel",
    blocks=(
        block_row(f"{_FILE}:WanTransformerBlock", GATES, wan_block),
        attention_block(f"{_FILE}:WanAttention", _ROW, function=wan_attention),
        GELU_TANH,
    ),
    example=example,
)

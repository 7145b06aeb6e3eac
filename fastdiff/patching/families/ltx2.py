"""``LTX2VideoTransformer3DModel``: LTX-2, video and sound together, each in a stream that attends to the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import qk_norm_rope
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import drop, once
from fastdiff.patching.blocks.adaln import MODULATED, block_row, gated, guarded
from fastdiff.patching.blocks.dispatched import stock_attention
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.joint_attention import (
    AttentionRow,
    Tables,
    attend,
    attention_block,
    head_mask,
    heads_of,
    why_not,
)
from fastdiff.patching.blocks.token_norms import (
    gated_then_modulated,
    modulated,
    modulated_twice,
    parameters_of,
    why_not_norms,
)
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families.ltx import tables_by_head

_FILE = "diffusers.models.transformers.transformer_ltx2"


def _stream(
    block: Any,
    prefix: str,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    temb_text: Tensor | None,
    rotary: Any,
    mask: Any,
    text_mask: Any,
    **perturbation: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stream after attention to itself and to its text, and its shift, scale and gate for the feed-forward."""
    site, prompt = block._fastdiff_site, getattr(block, f"{prefix}prompt_scale_shift_table", None)
    norm1, norm2, attn1, attn2, table = (
        getattr(block, prefix + name) for name in ("norm1", "norm2", "attn1", "attn2", "scale_shift_table")
    )
    shift, scale, gate, *rest = block.get_mod_params(table, temb, x.shape[0])
    h = modulated(site, f"{prefix}norm1", norm1, x, scale, shift)
    out = attn1(
        hidden_states=h, encoder_hidden_states=None, query_rotary_emb=rotary, attention_mask=mask, **perturbation
    )
    # With modulation of its own for the text, the table has three rows more.
    text_shift, text_scale, text_gate = rest[3:] or (None, None, None)
    x, h = gated_then_modulated(site, f"{prefix}norm2", out, gate, x, norm2, text_scale, text_shift)
    if block.cross_attn_adaln and prompt is not None:
        if temb_text is not None:
            shift, scale = block.get_mod_params(prompt, temb_text, x.shape[0])
        else:
            shift, scale = prompt[None, None].to(device=x.device, dtype=x.dtype).unbind(dim=2)
        text = text * (1 + scale) + shift
    out = attn2(h, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=text_mask)
    x = x + out if text_gate is None else gated(site, f"{prefix}text gate", out, text_gate, x)
    return x, tuple(rest[:3])


def _crossing(block: Any, prefix: str, temb: Tensor, temb_gate: Tensor) -> tuple[Tensor, ...]:
    """Scale and shift of a stream towards the video's attention, and towards the sound's, and its own gate."""
    table = getattr(block, f"{prefix}_a2v_cross_attn_scale_shift_table")
    modulations = block.get_mod_params(table[:4], temb, temb.shape[0])
    return *modulations, *block.get_mod_params(table[4:], temb_gate, temb.shape[0])


@guarded(
    "norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3", "audio_to_video_norm", "video_to_audio_norm"
)
def ltx2_block(
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: Any = None,
    audio_rotary_emb: Any = None,
    ca_video_rotary_emb: Any = None,
    ca_audio_rotary_emb: Any = None,
    encoder_attention_mask: Any = None,
    audio_encoder_attention_mask: Any = None,
    self_attention_mask: Any = None,
    audio_self_attention_mask: Any = None,
    a2v_cross_attention_mask: Any = None,
    v2a_cross_attention_mask: Any = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Any = None,
    all_perturbed: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``LTX2VideoTransformerBlock.forward``. Modulations are per sample or per token."""
    site = self._fastdiff_site
    perturbation = {}
    if self.perturbed_attn:
        perturbation = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
    x, (shift, scale, gate) = _stream(
        self, "", hidden_states, encoder_hidden_states, temb, temb_prompt, video_rotary_emb, self_attention_mask,
        encoder_attention_mask, **perturbation,
    )  # fmt: skip
    audio, (audio_shift, audio_scale, audio_gate) = _stream(
        self, "audio_", audio_hidden_states, audio_encoder_hidden_states, temb_audio, temb_prompt_audio,
        audio_rotary_emb, audio_self_attention_mask, audio_encoder_attention_mask, **perturbation,
    )  # fmt: skip
    if use_a2v_cross_attention or use_v2a_cross_attention:

        def normed(stream: str, norm: Any, h: Tensor, modulations: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            """A stream for the video's attention, and for the sound's; both start from here."""
            slot, pairs = f"{stream} norm of cross-attention", (modulations[:2], modulations[2:4])
            if use_a2v_cross_attention and use_v2a_cross_attention:
                return modulated_twice(site, slot, norm, h, *pairs)
            h = modulated(site, slot, norm, h, *pairs[0 if use_a2v_cross_attention else 1])
            return h, h

        to_video = _crossing(self, "video", temb_ca_scale_shift, temb_ca_gate)
        to_audio = _crossing(self, "audio", temb_ca_audio_scale_shift, temb_ca_audio_gate)
        videos = normed("video", self.audio_to_video_norm, x, to_video)
        sounds = normed("audio", self.video_to_audio_norm, audio, to_audio)
    if use_a2v_cross_attention:
        out = self.audio_to_video_attn(
            videos[0], encoder_hidden_states=sounds[0], query_rotary_emb=ca_video_rotary_emb,
            key_rotary_emb=ca_audio_rotary_emb, attention_mask=a2v_cross_attention_mask,
        )  # fmt: skip
    if use_v2a_cross_attention:
        audio_out = self.video_to_audio_attn(
            sounds[1], encoder_hidden_states=videos[1], query_rotary_emb=ca_audio_rotary_emb,
            key_rotary_emb=ca_video_rotary_emb, attention_mask=v2a_cross_attention_mask,
        )  # fmt: skip
    if use_a2v_cross_attention:
        x, h = gated_then_modulated(site, "norm3", out, to_video[4], x, self.norm3, scale, shift)
    else:
        h = modulated(site, "norm3", self.norm3, x, scale, shift)
    x = gated(site, "feed-forward gate", self.ff(h), gate, x)
    if use_v2a_cross_attention:
        audio, h = gated_then_modulated(
            site, "audio_norm3", audio_out, to_audio[4], audio, self.audio_norm3, audio_scale, audio_shift
        )
    else:
        h = modulated(site, "audio_norm3", self.audio_norm3, audio, audio_scale, audio_shift)
    return x, gated(site, "audio feed-forward gate", self.audio_ff(h), audio_gate, audio)


def _tables(attn: Any, value: tuple[Tensor, Tensor]) -> Tables:
    if attn.rope_type == "interleaved":
        return tables_by_head(value, attn, 0, 0)
    cos, sin = value  # (B, H, S, D/2)
    pairs = once(cos, ("pairs with", sin), lambda cos: torch.stack((cos, sin), dim=-1).transpose(1, 2))
    return pairs, None, 0


def ltx2_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    query_rotary_emb: tuple[Tensor, Tensor] | None = None,
    key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    perturbation_mask: Any = None,
    all_perturbed: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Replaces ``LTX2Attention.forward``; keys may have rotary tables of their own, and heads gates."""
    site = self._fastdiff_site
    reason = why_not_norms(hidden_states, self.norm_q, self.norm_k) or why_not(self)
    if kwargs:
        reason = f"called with {', '.join(kwargs)}"
    elif perturbation_mask is not None or not (all_perturbed is None or all_perturbed is False):
        reason = "some samples skip attention"
    elif query_rotary_emb is not None and self.rope_type == "split" and query_rotary_emb[0].shape[1] != self.heads:
        reason = "its rotary tables are for another number of heads"
    if reason is not None:
        if perturbation_mask is not None or all_perturbed is not None:
            kwargs |= {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        return stock_attention(
            site, reason, self, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb,
            **kwargs,
        )  # fmt: skip
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (
        heads_of(self, t) for t in (self.to_q(hidden_states), self.to_k(context), self.to_v(context))
    )
    tables: Tables | tuple[None, None, int] = (None, None, 0)
    if query_rotary_emb is not None:
        tables = _tables(self, query_rotary_emb)
    if key_rotary_emb is None or query_rotary_emb is None:
        query, key = _normed(self, site, "norm and rotation", (query, key), (self.norm_q, self.norm_k), tables)
    else:
        query, _ = _normed(self, site, "norm and rotation of queries", (query, None), (self.norm_q, None), tables)
        tables = _tables(self, key_rotary_emb)
        key, _ = _normed(self, site, "norm and rotation of keys", (key, None), (self.norm_k, None), tables)
    mask = head_mask(self, attention_mask, hidden_states, encoder_hidden_states)
    out = attend(site, self.processor, query, key, value, mask)
    if self.to_gate_logits is not None:
        out = out * (2.0 * torch.sigmoid(self.to_gate_logits(hidden_states))).unsqueeze(-1)
    return drop(self.to_out[1], self.to_out[0](out.flatten(2)))


def _normed(attn: Any, site: Site, slot: str, heads: Any, norms: Any, tables: Any) -> tuple[Tensor, Tensor]:
    """Normalised over all heads and rotated; of two, or of one, with ``None`` for the other."""
    first, second = heads
    weight, _, eps = parameters_of(norms[0], first)
    other = None if second is None else parameters_of(norms[1], second)[0]
    second = first[:, :, :0] if second is None else second
    cos, sin, _ = tables
    result: tuple[Tensor, Tensor] = site.serve(
        slot, qk_norm_rope, first, second, weight, other, None, None, cos, sin, eps=eps, across_heads=True,
        interleaved=attn.rope_type == "interleaved",
    )  # fmt: skip
    return result


def _row(processor: str) -> AttentionRow:
    sources = tuple(f"{_FILE}:apply_{kind}_rotary_emb" for kind in ("interleaved", "split"))
    return AttentionRow(f"{_FILE}:{processor}", across_heads=True, mask=head_mask, sources=sources)


def example(model: Any) -> dict[str, Any]:
    """2 frames of 3 by 4, 5 steps of sound, 9 text tokens of which the first sample has 5."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(2, 9, device=inputs.device)
    mask[0, 5:] = 0
    text = [config.caption_channels] * 2
    if not config.use_prompt_embeddings:
        text = [config.cross_attention_dim, config.audio_cross_attention_dim]
    return {
        "hidden_states": inputs.noise(2, 24, config.in_channels),
        "audio_hidden_states": inputs.noise(2, 5, config.audio_in_channels),
        "encoder_hidden_states": inputs.noise(2, 9, text[0]),
        "audio_encoder_hidden_states": inputs.noise(2, 9, text[1]),
        "timestep": inputs.timestep(500, batch=2),
        "sigma": inputs.timestep(500, batch=2),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 5,
    }


LTX2 = Family(
    model=f"{_FILE}:LTX2VideoTransformer3DModel",
    blocks=(
        block_row(
            f"{_FILE}:LTX2VideoTransformerBlock", f"{MODULATED}; gate + residual (+ norm + modulation)", ltx2_block,
            sources=(f"{_FILE}:LTX2VideoTransformerBlock.get_mod_params",),
        ),
        attention_block(
            f"{_FILE}:LTX2Attention", _row("LTX2AudioVideoAttnProcessor"), _row("LTX2PerturbedAttnProcessor"),
            function=ltx2_attention,
        ),
        GELU_TANH,
    ),
    example=example,
)  # fmt: skip

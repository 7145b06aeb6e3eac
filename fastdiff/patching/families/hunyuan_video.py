"""HunyuanVideo, with and without token replacement (image to video), FramePack, HunyuanVideo 1.5, HunyuanImage 2.1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoTokenReplaceAdaLayerNormZero,
    HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
)
from torch import Tensor

from fastdiff.patching.blocks import Block, activated_once, halves, once, rejoined
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    MODULATED,
    block_row,
    gated,
    gated_feed_forward,
    guarded,
)
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GELU_TANH, activated
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, plain_mask
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_hunyuan_video"


def _parts(first: int | None, *columns: Any) -> Iterator[tuple[Any, ...]]:
    """Rows of the image's parts that have a modulation of their own: the part's name, and its share of each column, of
    a tensor its tokens.

    With token replacement these are the ``first`` tokens, of the frame that is known, and the rest; else there is one.
    """

    def shares(column: Any) -> Any:
        if not isinstance(column, Tensor):
            return column
        return (column,) if first is None else (column[:, :first], column[:, first:])

    names = ("image",) if first is None else ("first frame", "rest")
    return zip(names, *map(shares, columns), strict=True)


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _normed(
    norm: Any, x: Tensor, temb: Tensor, token_replace_emb: Any, num_tokens: Any
) -> tuple[int | None, Tensor, list[list[Tensor]]]:
    """What :func:`_parts` takes for ``first``, the normalised and modulated x, and each part's other modulations."""
    if not isinstance(norm, (HunyuanVideoTokenReplaceAdaLayerNormZero, HunyuanVideoTokenReplaceAdaLayerNormZeroSingle)):
        x, *modulation = norm(x, emb=temb)
        return None, x, [modulation]
    x, *both = norm(x, temb, token_replace_emb, num_tokens)  # of the rest first
    count = len(both) // 2
    return num_tokens, x, [both[count:], both[:count]]


@guarded("norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces the forwards of ``HunyuanVideoTransformerBlock`` and ``HunyuanVideoTokenReplaceTransformerBlock``."""
    return _double(
        self, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, token_replace_emb, num_tokens
    )


def _double(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    site = self._fastdiff_site
    hidden_states = hidden_states.contiguous()  # the first block gets a transposed view of the patch embedding
    first, h, modulations = _normed(self.norm1, hidden_states, temb, token_replace_emb, num_tokens)
    text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out = self.attn(
        hidden_states=h, encoder_hidden_states=text, attention_mask=attention_mask, image_rotary_emb=rope
    )
    residuals, normed = [], []
    for name, x, branch, (gate, shift, scale, _) in _parts(first, hidden_states, out, modulations):
        x, h = gated_then_modulated(site, f"{name} norm", branch, gate, x, self.norm2, scale, shift)
        residuals.append(x)
        normed.append(h)
    rows = _parts(first, self.ff(_whole(normed)), residuals, modulations)
    parts = [gated(site, f"{name} gate", x, gate, residual) for name, x, residual, (*_, gate) in rows]
    return _whole(parts), gated_feed_forward(
        site, "text", encoder_hidden_states, text_out, text_gate, self.norm2_context, text_scale, text_shift,
        self.ff_context, text_gate_mlp,
    )  # fmt: skip


@guarded("norm2", "norm2_context")
def image_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces ``HunyuanImageTransformerBlock.forward``: the same, with another argument's name."""
    return _double(self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


@guarded()
def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Replaces the forwards of ``HunyuanVideoSingleTransformerBlock``, of the one with token replacement, and of
    ``HunyuanImageSingleTransformerBlock``."""
    site, image = self._fastdiff_site, hidden_states.shape[1]
    joint = rejoined(hidden_states, encoder_hidden_states)
    first, h, gates = _normed(self.norm, joint, temb, token_replace_emb, num_tokens)
    mlp = activated(site, self.act_mlp, self.proj_mlp(h))
    tokens, text = halves(h, image)
    out = rejoined(
        *self.attn(
            hidden_states=tokens,
            encoder_hidden_states=text,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
    )
    rows = _parts(first, self.proj_out(torch.cat([out, mlp], dim=2)), joint, gates)
    return halves(_whole([gated(site, f"{name} gate", x, g, residual) for name, x, residual, (g,) in rows]), image)


@guarded("norm")
def replaced_norm(
    self: Any, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int
) -> tuple[Tensor, ...]:
    """Replaces the forward of ``HunyuanVideoTokenReplaceAdaLayerNormZero`` and of the one for single blocks."""
    site = self._fastdiff_site
    parts, others = [], []
    for name, x, e in _parts(first_frame_num_tokens, hidden_states, (token_replace_emb, emb)):
        modulation = self.linear(activated_once(self.silu, e))
        shift, scale, *other = modulation.chunk(modulation.shape[-1] // x.shape[-1], dim=1)
        parts.append(modulated(site, f"{name} norm", self.norm, x, scale, shift))
        others.append(other)
    return _whole(parts), *others[1], *others[0]


@guarded("norm1", "norm2")
def refiner_block(self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Replaces ``HunyuanVideoIndividualTokenRefinerBlock.forward``."""
    site = self._fastdiff_site
    h = modulated(site, "norm1", self.norm1, hidden_states)
    out = self.attn(hidden_states=h, encoder_hidden_states=None, attention_mask=attention_mask)
    gate, gate_mlp = self.norm_out(temb)
    hidden_states, h = gated_then_modulated(site, "norm2", out, gate, hidden_states, self.norm2)
    return gated(site, "gate", self.ff(h), gate_mlp, hidden_states)


def example(model: Any) -> dict[str, Any]:
    """2 small frames, 9 text tokens of which 6 count."""
    config, inputs = model.config, Inputs(model)
    size = 4 * config.patch_size
    mask = torch.ones(1, 9, dtype=torch.long, device=inputs.device)
    mask[:, 6:] = 0
    found = {
        "hidden_states": inputs.noise(1, config.in_channels, 2 * config.patch_size_t, size, size),
        "timestep": inputs.timestep(500),
        "encoder_hidden_states": inputs.noise(1, 9, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": inputs.noise(1, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        found["guidance"] = inputs.timestep(4000.0)
    return found


def mutual_mask(attn: Any, mask: Tensor, image: Tensor, text: Tensor, **arguments: Any) -> Tensor:
    """(B, 1, S, S) of a mask of the text's tokens (B, S_text), made once a forward: those that count and the image's
    attend to one another."""

    def pairs(mask: Tensor) -> Tensor:
        counts = torch.nn.functional.pad(mask, (image.shape[1], 0), value=True).bool()
        return counts[:, None, :, None] & counts[:, None, None, :]

    return once(mask, ("mutual", image.shape[1]), pairs)


def framepack_example(model: Any) -> dict[str, Any]:
    """2 frames after 3 earlier ones at full size, and 2 and 4 at a half and a quarter of it."""
    inputs = Inputs(model)
    found = example(model) | {
        "image_embeds": inputs.noise(1, 3, model.config.image_proj_dim),
        "indices_latents": torch.arange(9, 11, device=inputs.device),
    }
    size = found["hidden_states"].shape[-1]
    for name, first, frames in (("clean", 6, 3), ("history_2x", 4, 2), ("history_4x", 0, 4)):
        found[f"latents_{name}"] = inputs.noise(1, model.config.in_channels, frames, size, size)
        found[f"indices_latents_{name}"] = torch.arange(first, first + frames, device=inputs.device)
    return found


def second_example(model: Any) -> dict[str, Any]:
    """For HunyuanVideo 1.5: 2 small frames, 9 text tokens of which 6 count, 5 of another encoder, 3 of a picture."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(1, 9, dtype=torch.long, device=inputs.device)
    mask[:, 6:] = 0
    size = 4 * config.patch_size
    return {
        "hidden_states": inputs.noise(1, config.in_channels, 2 * config.patch_size_t, size, size),
        "timestep": inputs.timestep(500),
        "encoder_hidden_states": inputs.noise(1, 9, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": inputs.noise(1, 5, config.text_embed_2_dim),
        "encoder_attention_mask_2": mask[:, 3:8],
        "image_embeds": inputs.noise(1, 3, config.image_embed_dim),
    }


def image_example(model: Any) -> dict[str, Any]:
    """A small picture, 9 text tokens of which 6 count."""
    config, inputs = model.config, Inputs(model)
    mask = torch.ones(1, 9, dtype=torch.long, device=inputs.device)
    mask[:, 6:] = 0
    found = {
        "hidden_states": inputs.noise(1, config.in_channels, *(4 * patch for patch in config.patch_size)),
        "timestep": inputs.timestep(500),
        "encoder_hidden_states": inputs.noise(1, 9, config.text_embed_dim),
        "encoder_attention_mask": mask,
    }
    if config.guidance_embeds:
        found["guidance"] = inputs.timestep(4000.0)
    if config.use_meanflow:
        found["timestep_r"] = inputs.timestep(400)
    return found


_IMAGE = "diffusers.models.transformers.transformer_hunyuanimage"
_VIDEO15 = "diffusers.models.transformers.transformer_hunyuan_video15"
_SINGLE = "GELU; gate + residual"
_SHARED = (ATTENTION, ADA_LAYER_NORM_ZERO, ADA_LAYER_NORM_ZERO_SINGLE, ADA_LAYER_NORM_CONTINUOUS, GELU_TANH)


def _attention(processor: str, joined: bool = True, mask: Callable[..., Tensor | None] = plain_mask) -> Block:
    row = AttentionRow(processor, rope="image_rotary_emb", text_first=False, joined=joined, pair=True, mask=mask)
    return attention_block(LEGACY, row)


_BLOCKS = (
    block_row(f"{_FILE}:HunyuanVideoTransformerBlock", GATES, double_block),
    block_row(f"{_FILE}:HunyuanVideoSingleTransformerBlock", _SINGLE, single_block),
    block_row(f"{_FILE}:HunyuanVideoIndividualTokenRefinerBlock", GATES, refiner_block),
    block_row(f"{_FILE}:HunyuanVideoTokenReplaceTransformerBlock", GATES, double_block),
    block_row(f"{_FILE}:HunyuanVideoTokenReplaceSingleTransformerBlock", _SINGLE, single_block),
    block_row(f"{_FILE}:HunyuanVideoTokenReplaceAdaLayerNormZero", MODULATED, replaced_norm),
    block_row(f"{_FILE}:HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", MODULATED, replaced_norm),
    _attention(f"{_FILE}:HunyuanVideoAttnProcessor2_0"),
    *_SHARED,
)
_BLOCKS15 = (
    block_row(f"{_VIDEO15}:HunyuanVideo15TransformerBlock", GATES, double_block),
    block_row(f"{_VIDEO15}:HunyuanVideo15IndividualTokenRefinerBlock", GATES, refiner_block),
    _attention(f"{_VIDEO15}:HunyuanVideo15AttnProcessor2_0", joined=False, mask=mutual_mask),
    *_SHARED,
)
_IMAGE_BLOCKS = (
    block_row(f"{_IMAGE}:HunyuanImageTransformerBlock", GATES, image_double_block),
    block_row(f"{_IMAGE}:HunyuanImageSingleTransformerBlock", _SINGLE, single_block),
    block_row(f"{_IMAGE}:HunyuanImageIndividualTokenRefinerBlock", GATES, refiner_block),
    _attention(f"{_IMAGE}:HunyuanImageAttnProcessor"),
    *_SHARED,
)
FAMILIES = (
    Family(f"{_FILE}:HunyuanVideoTransformer3DModel", _BLOCKS, example),
    Family(f"{_FILE}_framepack:HunyuanVideoFramepackTransformer3DModel", _BLOCKS, framepack_example),
    Family(f"{_VIDEO15}:HunyuanVideo15Transformer3DModel", _BLOCKS15, second_example),
    Family(f"{_IMAGE}:HunyuanImageTransformer2DModel", _IMAGE_BLOCKS, image_example),
)

"""``ChromaTransformer2DModel``: Chroma, a Flux whose modulations come from one small network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.patching.blocks.adaln import GATES, MODULATED, block_row, guarded
from fastdiff.patching.blocks.feed_forward import GELU_TANH
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families._savings import FLUX_TABLES
from fastdiff.patching.families.flux import FLUX_ATTENTION, double, joint_single

_FILE = "diffusers.models.transformers.transformer_chroma"


def _square(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


@guarded("norm")
def zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Replaces ``ChromaAdaLayerNormZeroPruned.forward``."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    assert emb is not None
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = emb.unbind(1)
    x = modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift)
    return x, gate, shift_mlp, scale_mlp, gate_mlp


@guarded("norm")
def zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replaces ``ChromaAdaLayerNormZeroSinglePruned.forward``."""
    assert emb is not None
    shift, scale, gate = emb.unbind(1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift), gate


@guarded("norm")
def continuous(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Replaces ``ChromaAdaLayerNormContinuousPruned.forward``."""
    shift, scale = emb.to(x.dtype).unbind(1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift)


@guarded("norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``ChromaTransformerBlock.forward``."""
    return double(
        self, hidden_states, encoder_hidden_states, temb[:, :6], temb[:, 6:], image_rotary_emb=image_rotary_emb,
        attention_mask=_square(attention_mask), **joint_attention_kwargs or {},
    )  # fmt: skip


@guarded()
def single_block(
    self: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Replaces ``ChromaSingleTransformerBlock.forward``."""
    return joint_single(
        self, hidden_states, temb, image_rotary_emb=image_rotary_emb, attention_mask=_square(attention_mask),
        **joint_attention_kwargs or {},
    )  # fmt: skip


def example(model: Any) -> dict[str, Any]:
    """4 by 6 latent patches and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    return {
        "hidden_states": inputs.noise(1, 24, config.in_channels),
        "encoder_hidden_states": inputs.noise(1, 7, config.joint_attention_dim),
        "timestep": inputs.timestep(),
        "img_ids": inputs.positions(1, 4, 6),
        "txt_ids": inputs.noise(7, 3) * 0,
    }


CHROMA = Family(
    model=f"{_FILE}:ChromaTransformer2DModel",
    blocks=(
        block_row(f"{_FILE}:ChromaTransformerBlock", GATES, double_block),
        block_row(f"{_FILE}:ChromaSingleTransformerBlock", "GELU; gate + residual", single_block),
        block_row(f"{_FILE}:ChromaAdaLayerNormZeroPruned", MODULATED, zero),
        block_row(f"{_FILE}:ChromaAdaLayerNormZeroSinglePruned", MODULATED, zero_single),
        block_row(f"{_FILE}:ChromaAdaLayerNormContinuousPruned", MODULATED, continuous),
        FLUX_ATTENTION,
        GELU_TANH,
    ),
    example=example,
    switches=(FLUX_TABLES,),
)

"""LongCat-Image and Ovis-Image: Flux's blocks, under other names, and without pooled text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff.ops import swiglu
from fastdiff.patching.blocks import Block, is_plain
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    block_row,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH, SWIGLU
from fastdiff.patching.blocks.joint_attention import AttentionRow, attention_block
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families._savings import rotary_tables
from fastdiff.patching.families.flux import double_block, single, single_block

_FILES = "diffusers.models.transformers.transformer_"


@guarded()
def gated_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces ``OvisImageSingleTransformerBlock.forward``, whose feed-forward has a gate."""
    site, activation = self._fastdiff_site, self.act_mlp

    def feed_forward(h: Tensor) -> Tensor:
        x, gate = self.proj_mlp(h).chunk(2, dim=-1)
        return site.serve("swiglu", swiglu, gate, x) if is_plain(activation, nn.SiLU) else activation(gate) * x

    return single(
        self, feed_forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb=image_rotary_emb,
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


def _family(file: str, prefix: str, what: str, block: Any, activation: Block) -> Family:
    name = f"{_FILES}{file}:{prefix}"
    return Family(
        model=f"{name}Transformer2DModel",
        blocks=(
            block_row(f"{name}TransformerBlock", GATES, double_block),
            block_row(f"{name}SingleTransformerBlock", what, block),
            attention_block(
                f"{name}Attention", AttentionRow(processor=f"{name}AttnProcessor", rope="image_rotary_emb")
            ),
            ADA_LAYER_NORM_ZERO,
            ADA_LAYER_NORM_ZERO_SINGLE,
            ADA_LAYER_NORM_CONTINUOUS,
            activation,
        ),
        example=example,
        switches=(rotary_tables(f"{name}PosEmbed"),),
    )


FAMILIES = (
    _family("longcat_image", "LongCatImage", "GELU; gate + residual", single_block, GELU_TANH),
    _family("ovis_image", "OvisImage", "SiLU and product; gate + residual", gated_single_block, SWIGLU),
)

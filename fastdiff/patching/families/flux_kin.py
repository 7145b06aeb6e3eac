"""LongCat-Image, Ovis-Image and Bria: Flux's blocks, under other names, and without pooled text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks import Block
from fastdiff.patching.blocks.adaln import (
    ADA_LAYER_NORM_CONTINUOUS,
    ADA_LAYER_NORM_ZERO_SINGLE,
    GATES,
    block_row,
    guarded,
)
from fastdiff.patching.blocks.feed_forward import GELU_TANH, SWIGLU, silu_product
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs
from fastdiff.patching.families._savings import rotary_tables
from fastdiff.patching.families.flux import double, double_block, joint_single, single, single_block

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
    return single(
        self, hidden_states, encoder_hidden_states, temb, _gated_silu, image_rotary_emb=image_rotary_emb,
        **joint_attention_kwargs or {},
    )  # fmt: skip


def _gated_silu(block: Any, h: Tensor) -> Tensor:
    x, gate = block.proj_mlp(h).chunk(2, dim=-1)
    return silu_product(block._fastdiff_site, block.act_mlp, gate, x)


@guarded("norm2", "norm2_context")
def bria_double_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replaces ``BriaTransformerBlock.forward``."""
    return double(
        self, hidden_states, encoder_hidden_states, temb, temb, image_rotary_emb=image_rotary_emb,
        **attention_kwargs or {},
    )  # fmt: skip


@guarded()
def bria_single_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replaces ``BriaSingleTransformerBlock.forward``."""
    return single(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=image_rotary_emb, **attention_kwargs or {}
    )


@guarded()
def fibo_single_block(
    self: Any, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Replaces ``BriaFiboSingleTransformerBlock.forward``, whose input is text and picture in one sequence already."""
    return joint_single(
        self, hidden_states, temb, image_rotary_emb=image_rotary_emb, **joint_attention_kwargs or {}
    )


def example(model: Any) -> dict[str, Any]:
    """4 by 6 latent patches and 7 text tokens."""
    config, inputs = model.config, Inputs(model)
    found: dict[str, Any] = {
        "hidden_states": inputs.noise(1, 24, config.in_channels),
        "encoder_hidden_states": inputs.noise(1, 7, config.joint_attention_dim),
        "timestep": inputs.timestep(),
        "img_ids": inputs.positions(1, 4, 6),
        "txt_ids": inputs.noise(7, 3) * 0,
    }
    if "text_encoder_dim" in config:
        blocks = config.num_layers + config.num_single_layers
        found["text_encoder_layers"] = [inputs.noise(1, 7, config.text_encoder_dim) for _ in range(blocks)]
    return found


def _family(
    file: str,
    prefix: str,
    single: tuple[str, Any],
    *attention: Block,
    double: Any = double_block,
    activation: Block = GELU_TANH,
    tables: str = "PosEmbed",
    angles: str = "diffusers.models.embeddings:get_1d_rotary_pos_embed",
) -> Family:
    """A family of a file, whose classes' names begin with ``prefix``.

    Args:
        single: what the single block computes besides, and the function that replaces its forward.
        attention: further rows of attention.
        tables: the rest of the name of the class that makes rotary tables, and ``angles`` the function it uses.
    """
    name = f"{_FILES}{file}:{prefix}"
    return Family(
        model=f"{name}Transformer2DModel",
        blocks=(
            block_row(f"{name}TransformerBlock", GATES, double),
            block_row(f"{name}SingleTransformerBlock", *single),
            attention_block(
                f"{name}Attention", AttentionRow(processor=f"{name}AttnProcessor", rope="image_rotary_emb")
            ),
            *attention,
            ADA_LAYER_NORM_ZERO,
            ADA_LAYER_NORM_ZERO_SINGLE,
            ADA_LAYER_NORM_CONTINUOUS,
            activation,
        ),
        example=example,
        switches=(rotary_tables(f"{name}{tables}", angles),),
    )


_BRIA_ROW = AttentionRow(processor=f"{_FILES}bria:BriaAttnProcessor", rope="image_rotary_emb")
_GELU = "GELU; gate + residual"
_GATED = "SiLU and product; gate + residual"

FAMILIES = (
    _family("longcat_image", "LongCatImage", (_GELU, single_block)),
    _family("ovis_image", "OvisImage", (_GATED, gated_single_block), activation=SWIGLU),
    _family(
        "bria", "Bria", (_GELU, bria_single_block), double=bria_double_block, tables="EmbedND",
        angles=f"{_FILES}bria:get_1d_rotary_pos_embed",
    ),
    _family(
        "bria_fibo", "BriaFibo", (_GELU, fibo_single_block), attention_block(LEGACY, _BRIA_ROW), tables="EmbedND"
    ),
)

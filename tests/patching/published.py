"""What decides on the blocks of published models: configurations from their config.json or conversion scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
SD2 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
REFINER = {
    "sample_size": 128,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
}
KANDINSKY2 = SIMPLE | {"block_out_channels": (384, 768, 1152, 1536), "out_channels": 8, "cross_attention_dim": 768}
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
KL_UP = {"up_block_types": ("UpDecoderBlock2D",) * 4}


@dataclass(frozen=True)
class Plain:
    """A model of a pipeline with nothing to fuse, convolutions and ReLUs; as published by default.

    Attributes:
        pipelines: what README's table says it is.
        cls: name of the class in Diffusers.
        input: name of its forward's argument.
        tiny: a small configuration.
    """

    pipelines: str
    cls: str
    input: str
    tiny: Mapping[str, Any]


PLAIN = (
    Plain("tiny VAE (TAESD)", "AutoencoderTiny", "sample",
          {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
           "num_decoder_blocks": (1, 1)}),
    Plain("T2I adapter", "T2IAdapter", "x", {"channels": (8, 8), "num_res_blocks": 1, "downscale_factor": 2}),
)  # fmt: skip

"""The VAEs of the transformers: tiny and published configurations, what patching does to them; rows of ``zoo``."""

from __future__ import annotations

from typing import Any, NamedTuple


class Vae(NamedTuple):
    """A row of the table of models, see ``zoo.Entry`` and ``models.Case``."""

    pipelines: str
    cls: str
    sites: dict[str, int]
    saved: float
    tiny: dict[str, Any]
    public: dict[str, Any]
    source: str


_GROUPS = {"norm_num_groups": 4}
_WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
_LTX095 = {
    "block_out_channels": (128, 256, 512, 1024, 2048), "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024), "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5), "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True), "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2), "timestep_conditioning": True,
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
_DC = {
    "latent_channels": 32,
    "encoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "decoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
}

VAES = (
    Vae("Wan 2.1", "AutoencoderKLWan", {"WanRMS_norm": 24}, 0.45,
        {"base_dim": 10, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
         "scale_factor_spatial": 2, "scale_factor_temporal": 2},
        {}, "Wan-AI/Wan2.1-T2V-1.3B"),
    Vae("Wan 2.2", "AutoencoderKLWan", {"WanRMS_norm": 24}, 0.43,
        {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
         "temperal_downsample": [True], "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
         "scale_factor_spatial": 4, "scale_factor_temporal": 2},
        _WAN22, "Wan-AI/Wan2.2-TI2V-5B"),
    Vae("Qwen-Image", "AutoencoderKLQwenImage", {"QwenImageRMS_norm": 24}, 0.5,
        {"base_dim": 10, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        {}, "Qwen/Qwen-Image"),
    Vae("HunyuanVideo", "AutoencoderKLHunyuanVideo", {"GroupNorm": 34, "Attention": 2}, 0.16,
        _GROUPS | {"latent_channels": 4, "block_out_channels": (16, 16, 24, 32), "layers_per_block": 1,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4},
        {}, "hunyuanvideo-community/HunyuanVideo"),
    Vae("HunyuanVideo 1.5", "AutoencoderKLHunyuanVideo15", {"HunyuanVideo15RMS_norm": 30}, 0.26,
        {"latent_channels": 4, "block_out_channels": (8, 16, 16), "layers_per_block": 1,
         "spatial_compression_ratio": 4},
        {}, "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"),
    Vae("HunyuanImage 2.1", "AutoencoderKLHunyuanImage", {"GroupNorm": 24}, 0.16,
        {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 64), "sample_size": 64,
         "layers_per_block": 1, "spatial_compression_ratio": 2},
        {"in_channels": 3, "out_channels": 3, "latent_channels": 64,
         "block_out_channels": (128, 256, 512, 512, 1024, 1024), "layers_per_block": 2,
         "spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289},
         "hunyuanvideo-community/HunyuanImage-2.1"),
    Vae("HunyuanImage 2.1 refiner", "AutoencoderKLHunyuanImageRefiner", {"HunyuanImageRefinerRMS_norm": 30}, 0.5,
        {"latent_channels": 4, "block_out_channels": (8, 16, 16), "layers_per_block": 1,
         "spatial_compression_ratio": 4},
        {}, "hunyuanvideo-community/HunyuanImage-2.1-Refiner"),
    Vae("CogVideoX", "AutoencoderKLCogVideoX", {"GroupNorm": 13, "CogVideoXSpatialNorm3D": 21}, 0.2,
        _GROUPS | {"latent_channels": 4, "block_out_channels": (8, 12, 16, 16), "layers_per_block": 1},
        {}, "THUDM/CogVideoX-5b"),
    Vae("Mochi", "AutoencoderKLMochi", {"MochiChunkedGroupNorm3D": 25, "Attention": 4}, 0.3,
        {"encoder_block_out_channels": (32, 32, 64, 64), "decoder_block_out_channels": (32, 64, 64, 96),
         "latent_channels": 4, "layers_per_block": (1, 1, 1, 1, 1)},
        {}, "genmo/mochi-1-preview"),
    Vae("LTX 0.9", "AutoencoderKLLTXVideo", {"LTXVideoResnetBlock3d": 14, "RMSNorm": 2}, 0.4,
        {"latent_channels": 8, "block_out_channels": (8, 12, 16, 16), "decoder_block_out_channels": (8, 12, 16, 16),
         "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)},
        {}, "Lightricks/LTX-Video"),
    Vae("LTX 0.9.5", "AutoencoderKLLTXVideo", {"LTXVideoResnetBlock3d": 9, "RMSNorm": 2}, 0.3,
        _LTX095 | {"latent_channels": 8, "block_out_channels": (4, 8, 16, 32, 64),
                   "decoder_block_out_channels": (8, 16, 32), "layers_per_block": (1, 1, 1, 1, 1),
                   "decoder_layers_per_block": (1, 1, 1, 1)},
        _LTX095, "Lightricks/LTX-Video-0.9.5"),
    Vae("LTX-2", "AutoencoderKLLTX2Video", {"LTX2VideoResnetBlock3d": 9, "PerChannelRMSNorm": 2}, 0.3,
        {"latent_channels": 8, "block_out_channels": (8, 16, 16, 32), "decoder_block_out_channels": (8, 16, 32),
         "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1)},
        {}, "Lightricks/LTX-2"),
    Vae("EasyAnimate", "AutoencoderKLMagvit", {"EasyAnimateResidualBlock3D": 14, "GroupNorm": 2}, 0.17,
        _GROUPS | {"latent_channels": 4, "block_out_channels": (8, 12, 16, 16), "layers_per_block": 1},
        {}, "alibaba-pai/EasyAnimateV5.1-12b-zh"),
    Vae("Sana (DC-AE)", "AutoencoderDC", {"RMSNorm": 11, "GLUMBConv": 4}, 0.34,
        {"latent_channels": 4, "attention_head_dim": 4, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 16),
         "decoder_block_out_channels": (8, 16), "encoder_qkv_multiscales": ((), (5,)),
         "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 2),
         "decoder_layers_per_block": (1, 2)},
        _DC, "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"),
    Vae("Flux 2", "AutoencoderKLFlux2", {"ResnetBlock2D": 10, "Attention": 2, "GroupNorm": 2}, 0.33,
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4},
        {}, "black-forest-labs/FLUX.2-dev"),
)  # fmt: skip

"""Published transformers: what their configurations change of the defaults, but for the number of blocks."""

from __future__ import annotations

from typing import Any

_SD3_REAL = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
_FLUX_REAL = {"num_single_layers": 2, "guidance_embeds": True}
_WAN_REAL = {"num_attention_heads": 40, "ffn_dim": 13824, "cross_attn_norm": True}
_COGVIDEOX_REAL = {"sample_width": 90, "sample_height": 60, "sample_frames": 49}

_HUNYUAN_DIT_REAL = {"in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408}

#: Name in the table of transformers -> changes.
REAL: dict[str, dict[str, Any]] = {
    "Flux dev": _FLUX_REAL,
    "Flux schnell": _FLUX_REAL | {"guidance_embeds": False},
    "Flux Fill": _FLUX_REAL | {"in_channels": 384, "out_channels": 64},
    "Flux ControlNet": _FLUX_REAL,
    "SD3": _SD3_REAL,
    "SD3.5 medium": _SD3_REAL | {"qk_norm": "rms_norm", "dual_attention_layers": (0,), "pos_embed_max_size": 384},
    "SD3.5 large": _SD3_REAL | {"qk_norm": "rms_norm", "num_attention_heads": 38, "caption_projection_dim": 2432},
    "SD3 ControlNet": _SD3_REAL,
    "SD3.5 ControlNet": _SD3_REAL | {
        "num_attention_heads": 38, "joint_attention_dim": None, "caption_projection_dim": None, "use_pos_embed": False,
    },
    "PixArt": {"caption_channels": 4096},
    "Wan T2V": {"num_attention_heads": 12, "ffn_dim": 8960, "cross_attn_norm": True},
    "Wan I2V": _WAN_REAL | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Flux2": {"num_single_layers": 2},
    "Qwen-Image": {},
    "Qwen-Image-Edit": {"zero_cond_t": True},
    "Z-Image": {"num_layers": None, "n_layers": 2},
    "LTX": {},
    "HunyuanVideo": {"num_single_layers": 2},
    "HunyuanVideo I2V": {"num_single_layers": 2, "image_condition_type": "token_replace"},
    "CogVideoX 5B": _COGVIDEOX_REAL | {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
    "CogVideoX 2B": _COGVIDEOX_REAL,
    "Chroma": {"num_single_layers": 2},
    "AuraFlow": {"num_layers": None, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "pos_embed_max_size": 9216},
    "Lumina2": {},
    "Sana": {},
    "Sana Sprint": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    "Latte": {
        "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 1152, "patch_size": 2,
        "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "caption_channels": 4096,
    },
    "Stable Audio": {},
    "CogView4": {"num_attention_heads": 32, "attention_head_dim": 128},
    "HunyuanDiT": _HUNYUAN_DIT_REAL,
    "DiT-XL/2": {"attention_head_dim": 72, "in_channels": 4, "out_channels": 8},
    "Mochi": {},
    "HunyuanDiT ControlNet": _HUNYUAN_DIT_REAL | {"num_layers": None, "transformer_num_layers": 6},
    "Wan VACE": {"vace_layers": [0, 1]},
    "ChronoEdit": _WAN_REAL | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "SkyReels V2": _WAN_REAL,
    "SkyReels V2 DF": {"num_attention_heads": 12, "ffn_dim": 8960, "inject_sample_info": True},
    "HunyuanVideo FramePack": {
        "num_single_layers": 2, "has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True,
    },
    "HunyuanVideo 1.5": {},
    "HunyuanImage 2.1": {"num_single_layers": 2, "text_embed_2_dim": 1472},
    "LTX-2": {"rope_type": "split"},
    "LTX-2.3": {
        "rope_type": "split", "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
        "audio_cross_attn_mod": True, "perturbed_attn": True,
    },
    "Qwen-Image ControlNet": {},
    "Sana ControlNet": {},
    "Cosmos": {"concat_padding_mask": False, "extra_pos_embed_type": None},  # the mask takes torchvision
    "LongCat-Image": {"num_single_layers": 2},
    "Ovis-Image": {"num_single_layers": 2},
    "ConsisID": _COGVIDEOX_REAL | {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
    "CogView3 Plus": {},
    "Bria": {"num_single_layers": 2, "axes_dims_rope": (16, 56, 56)},
    "Bria Fibo": {"num_single_layers": 2, "in_channels": 48, "text_encoder_dim": 2048},
    "HiDream-I1": {  # with 2 experts, which are all taken, of 4
        "num_single_layers": 2, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_routed_experts": 2,
        "caption_channels": [4096, 4096], "axes_dims_rope": (64, 32, 32), "llama_layers": [0, 1, 2, 3],
    },
    "Allegro": {},
    "OmniGen": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
}  # fmt: skip

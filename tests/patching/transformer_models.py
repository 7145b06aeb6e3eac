"""Tiny but structurally true transformers: every kind of block, odd sizes, gates that are not zero.

:data:`TRANSFORMERS` is the one table of them: how each is built, what is left alone in it, and how many of its
launches patching must at least remove. The inputs are the families' own examples.
"""

from __future__ import annotations

from diffusers import (
    AllegroTransformer3DModel,
    AuraFlowTransformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LongCatImageTransformer2DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    MochiTransformer3DModel,
    OmniGenTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    SkyReelsV2Transformer3DModel,
    StableAudioDiTModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from extent import ALL
from transformer_case import Transformer

_FLUX = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 20,
    "num_attention_heads": 2,
    "joint_attention_dim": 28,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 8, 8),
}
_FLUX_SITES = {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 3, "FluxAttention": 5, "AdaLayerNormZero": 4,
               "AdaLayerNormZeroSingle": 3, "GELU": 4}  # fmt: skip
_FLUX_DEPTH = {"num_layers": 19, "num_single_layers": 38}
_SD3 = {
    "sample_size": 12, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 22,
    "num_attention_heads": 2, "joint_attention_dim": 28, "caption_projection_dim": 44, "pooled_projection_dim": 36,
    "out_channels": 4, "pos_embed_max_size": 12,
}  # fmt: skip
_PIXART = {
    "num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 72, "sample_size": 12, "patch_size": 2, "caption_channels": 28,
}  # fmt: skip
_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 22, "in_channels": 4, "out_channels": 4,
    "text_dim": 28, "freq_dim": 16, "ffn_dim": 50, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
_FLUX2 = {
    "in_channels": 12, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 20, "num_attention_heads": 2,
    "joint_attention_dim": 28, "timestep_guidance_channels": 16, "mlp_ratio": 3.0, "axes_dims_rope": (4, 4, 4, 8),
}  # fmt: skip
_QWEN = {
    "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 20, "num_attention_heads": 2,
    "joint_attention_dim": 28, "axes_dims_rope": (4, 8, 8),
}  # fmt: skip
_Z_IMAGE = {
    "in_channels": 3, "dim": 60, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
    "cap_feat_dim": 28, "axes_dims": [4, 8, 8], "axes_lens": [64, 32, 32],
}  # fmt: skip
_LTX = {
    "in_channels": 6, "out_channels": 6, "num_attention_heads": 3, "attention_head_dim": 22,
    "cross_attention_dim": 66, "num_layers": 2, "caption_channels": 28,
}  # fmt: skip
_LTX2 = {
    "in_channels": 6, "out_channels": 6, "num_attention_heads": 2, "attention_head_dim": 22, "cross_attention_dim": 44,
    "audio_in_channels": 5, "audio_out_channels": 5, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 28,
}  # fmt: skip
_HUNYUAN_VIDEO = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 20, "num_layers": 2,
    "num_single_layers": 3, "num_refiner_layers": 2, "text_embed_dim": 28, "pooled_projection_dim": 24,
    "rope_axes_dim": (4, 8, 8),
}  # fmt: skip
_HUNYUAN_VIDEO_SITES = {
    "HunyuanVideoTransformerBlock": 2, "HunyuanVideoSingleTransformerBlock": 3, "Attention": 7,
    "HunyuanVideoIndividualTokenRefinerBlock": 2, "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3,
    "AdaLayerNormContinuous": 1, "GELU": 4,
}  # fmt: skip
_COGVIDEOX = {
    "num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 28, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 7,
}  # fmt: skip
_CHROMA = {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"} | {
    "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2,
}  # fmt: skip
_AURA_FLOW = {
    "sample_size": 12, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 3,
    "attention_head_dim": 22, "num_attention_heads": 2, "joint_attention_dim": 28, "caption_projection_dim": 44,
    "out_channels": 4, "pos_embed_max_size": 64,
}  # fmt: skip
_LUMINA2 = {
    "sample_size": 12, "in_channels": 4, "hidden_size": 60, "num_layers": 2, "num_refiner_layers": 2,
    "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 10, "axes_dim_rope": (4, 8, 8),
    "axes_lens": (30, 16, 16), "cap_feat_dim": 28,
}  # fmt: skip
_LATTE = {
    "num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "cross_attention_dim": 72, "sample_size": 8, "patch_size": 2, "caption_channels": 28, "video_length": 3,
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
}  # fmt: skip
_STABLE_AUDIO = {
    "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 4,
    "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 48, "time_proj_dim": 16,
    "global_states_input_dim": 20, "cross_attention_input_dim": 28,
}  # fmt: skip
_COGVIEW4 = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 20,
    "num_attention_heads": 3, "text_embed_dim": 28, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 16,
    "sample_size": 16, "rope_axes_dim": (16, 16),
}  # fmt: skip
_SANA = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 2,
    "num_cross_attention_heads": 3, "cross_attention_head_dim": 20, "cross_attention_dim": 60, "caption_channels": 28,
    "sample_size": 8,
}  # fmt: skip
_HUNYUAN_DIT = {
    "num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 72, "num_layers": 6, "cross_attention_dim": 28, "cross_attention_dim_t5": 24,
    "pooled_projection_dim": 20, "text_len": 7, "text_len_t5": 5,
}  # fmt: skip
_MOCHI = {
    "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 22, "num_layers": 3, "pooled_projection_dim": 20,
    "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 16,
}  # fmt: skip
_HIDREAM = {
    "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 20,
    "num_attention_heads": 2, "caption_channels": [28, 26], "text_emb_dim": 24, "num_routed_experts": 2,
    "axes_dims_rope": (4, 8, 8), "max_resolution": (8, 8), "llama_layers": [0, 1, 2, 3, 3],
}  # fmt: skip
_LINEAR = {("Attention", "its attention has no softmax"): 2}

TRANSFORMERS = [
    Transformer("Flux dev", FluxTransformer2DModel, _FLUX | {"guidance_embeds": True}, _FLUX_DEPTH, 0.6,
                _FLUX_SITES | {"AdaLayerNormContinuous": 1}),
    Transformer("Flux schnell", FluxTransformer2DModel, _FLUX, _FLUX_DEPTH, 0.6,
                _FLUX_SITES | {"AdaLayerNormContinuous": 1}),
    Transformer("Flux Fill", FluxTransformer2DModel, _FLUX | {"in_channels": 16, "out_channels": 12,
                "guidance_embeds": True}, _FLUX_DEPTH, 0.6, _FLUX_SITES | {"AdaLayerNormContinuous": 1}),
    Transformer("Flux ControlNet", FluxControlNetModel, _FLUX | {"num_mode": 3, "guidance_embeds": True},
                {"num_layers": 5, "num_single_layers": 10}, 0.5, _FLUX_SITES),
    Transformer("SD3", SD3Transformer2DModel, _SD3, {"num_layers": 24}, 0.3,
                {"JointTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 5, "AdaLayerNormContinuous": 2,
                 "GELU": 5}),
    Transformer("SD3.5 medium", SD3Transformer2DModel,
                _SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
                {"num_layers": 24, "dual_attention_layers": tuple(range(13))}, 0.55,
                {"JointTransformerBlock": 3, "Attention": 5, "AdaLayerNormZero": 3, "SD35AdaLayerNormZeroX": 2,
                 "AdaLayerNormContinuous": 2, "GELU": 5}),
    Transformer("SD3.5 large", SD3Transformer2DModel, _SD3 | {"qk_norm": "rms_norm"}, {"num_layers": 38}, 0.55,
                {"JointTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 5, "AdaLayerNormContinuous": 2,
                 "GELU": 5}),
    Transformer("SD3 ControlNet", SD3ControlNetModel, _SD3, {"num_layers": 6}, 0.3,
                {"JointTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 6, "GELU": 6}),
    Transformer("SD3.5 ControlNet", SD3ControlNetModel,
                _SD3 | {"joint_attention_dim": None, "caption_projection_dim": None, "use_pos_embed": False},
                {"num_layers": 19}, 0.3,
                {"SD3SingleTransformerBlock": 3, "Attention": 3, "AdaLayerNormZero": 3, "GELU": 3}),
    Transformer("PixArt", PixArtTransformer2DModel, _PIXART, {"num_layers": 28}, 0.3,
                {"BasicTransformerBlock": 2, "Attention": 4, "GELU": 2}),
    Transformer("Wan T2V", WanTransformer3DModel, _WAN | {"cross_attn_norm": True}, {"num_layers": 30}, 0.55,
                {"WanTransformerBlock": 2, "WanAttention": 4, "GELU": 2}),
    Transformer("Wan I2V", WanTransformer3DModel,
                _WAN | {"cross_attn_norm": True, "image_dim": 26, "added_kv_proj_dim": 66, "in_channels": 9},
                {"num_layers": 40}, 0.55, {"WanTransformerBlock": 2, "WanAttention": 4, "GELU": 2},
                {("GELU", "its GELU is exact: one operation already"): 1}),
    Transformer("Flux2", Flux2Transformer2DModel, _FLUX2, {"num_layers": 8, "num_single_layers": 48}, 0.6,
                {"Flux2TransformerBlock": 2, "Flux2SingleTransformerBlock": 3, "Flux2Attention": 2,
                 "Flux2ParallelSelfAttention": 3, "Flux2SwiGLU": 7, "AdaLayerNormContinuous": 1}),
    Transformer("Qwen-Image", QwenImageTransformer2DModel, _QWEN, {"num_layers": 60}, 0.65,
                {"QwenImageTransformerBlock": 2, "Attention": 2, "GELU": 4, "AdaLayerNormContinuous": 1}),
    Transformer("Qwen-Image-Edit", QwenImageTransformer2DModel, _QWEN | {"zero_cond_t": True}, {"num_layers": 60},
                0.6, {"QwenImageTransformerBlock": 2, "Attention": 2, "GELU": 4, "AdaLayerNormContinuous": 1}),
    Transformer("Z-Image", ZImageTransformer2DModel, _Z_IMAGE, {"n_layers": 30}, 0.65,
                {"ZImageTransformerBlock": 6, "Attention": 6, "FeedForward": 6, "FinalLayer": 1}),
    Transformer("LTX", LTXVideoTransformer3DModel, _LTX, {"num_layers": 28}, 0.5,
                {"LTXVideoTransformerBlock": 2, "LTXAttention": 4, "GELU": 2}),
    Transformer("HunyuanVideo", HunyuanVideoTransformer3DModel, _HUNYUAN_VIDEO,
                {"num_layers": 20, "num_single_layers": 40}, 0.6,
                _HUNYUAN_VIDEO_SITES),
    Transformer("HunyuanVideo I2V", HunyuanVideoTransformer3DModel,
                _HUNYUAN_VIDEO | {"image_condition_type": "token_replace"}, {"num_layers": 20, "num_single_layers": 40},
                0.6,
                {"HunyuanVideoTokenReplaceTransformerBlock": 2, "HunyuanVideoTokenReplaceSingleTransformerBlock": 3,
                 "HunyuanVideoTokenReplaceAdaLayerNormZero": 2, "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle": 3,
                 "Attention": 7, "HunyuanVideoIndividualTokenRefinerBlock": 2, "AdaLayerNormZero": 2,
                 "AdaLayerNormContinuous": 1, "GELU": 4}),
    Transformer("CogVideoX 5B", CogVideoXTransformer3DModel, _COGVIDEOX | {"use_rotary_positional_embeddings": True},
                {"num_layers": 42}, 0.5,
                {"CogVideoXBlock": 2, "CogVideoXLayerNormZero": 4, "AdaLayerNorm": 1, "Attention": 2, "GELU": 2}),
    Transformer("CogVideoX 2B", CogVideoXTransformer3DModel, _COGVIDEOX | {"num_attention_heads": 4},
                {"num_layers": 30}, 0.4,
                {"CogVideoXBlock": 2, "CogVideoXLayerNormZero": 4, "AdaLayerNorm": 1, "Attention": 2, "GELU": 2}),
    Transformer("Chroma", ChromaTransformer2DModel, _CHROMA, _FLUX_DEPTH, 0.6,
                {"ChromaTransformerBlock": 2, "ChromaSingleTransformerBlock": 3, "FluxAttention": 5,
                 "ChromaAdaLayerNormZeroPruned": 4, "ChromaAdaLayerNormZeroSinglePruned": 3,
                 "ChromaAdaLayerNormContinuousPruned": 1, "GELU": 4}),
    Transformer("AuraFlow", AuraFlowTransformer2DModel, _AURA_FLOW,
                {"num_mmdit_layers": 4, "num_single_dit_layers": 32}, 0.4,
                {"AuraFlowJointTransformerBlock": 2, "AuraFlowSingleTransformerBlock": 3, "Attention": 5,
                 "AdaLayerNormZero": 7, "AuraFlowFeedForward": 7}),
    Transformer("Lumina2", Lumina2Transformer2DModel, _LUMINA2, {"num_layers": 26}, 0.5,
                {"Lumina2TransformerBlock": 6, "LuminaRMSNormZero": 4, "LuminaLayerNormContinuous": 1, "Attention": 6,
                 "LuminaFeedForward": 6}),
    Transformer("Sana", SanaTransformer2DModel, _SANA, {"num_layers": 20}, 0.2,
                {"SanaTransformerBlock": 2, "GLUMBConv": 2, "SanaModulatedNorm": 1, "Attention": 2}, _LINEAR),
    Transformer("Sana Sprint", SanaTransformer2DModel,
                _SANA | {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}, {"num_layers": 20}, 0.2,
                {"SanaTransformerBlock": 2, "GLUMBConv": 2, "SanaModulatedNorm": 1, "Attention": 2}, _LINEAR),
    Transformer("Latte", LatteTransformer3DModel, _LATTE, {"num_layers": 28}, 0.3,
                {"BasicTransformerBlock": 4, "Attention": 6, "GELU": 4}),
    Transformer("Stable Audio", StableAudioDiTModel, _STABLE_AUDIO, {"num_layers": 24}, 0.35,
                {"StableAudioDiTBlock": 2, "Attention": 4, "SwiGLU": 2}),
    Transformer("CogView4", CogView4Transformer2DModel, _COGVIEW4, {"num_layers": 28}, 0.5,
                {"CogView4TransformerBlock": 2, "CogView4AdaLayerNormZero": 2, "Attention": 2, "GELU": 2,
                 "CogView4AdaLayerNormContinuous": 1}),
    Transformer("HunyuanDiT", HunyuanDiT2DModel, _HUNYUAN_DIT, {"num_layers": 40}, 0.4,
                {"HunyuanDiTBlock": 6, "AdaLayerNormShift": 6, "Attention": 12, "AdaLayerNormContinuous": 1,
                 "GELU": 6}),
    Transformer("HunyuanDiT ControlNet", HunyuanDiT2DControlNetModel,
                {k: v for k, v in _HUNYUAN_DIT.items() if k != "num_layers"} | {"transformer_num_layers": 6},
                {"transformer_num_layers": 40}, 0.4,
                {"HunyuanDiTBlock": 2, "AdaLayerNormShift": 2, "Attention": 4, "GELU": 2}),
    Transformer("DiT-XL/2", DiTTransformer2DModel,
                {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "sample_size": 8,
                 "num_embeds_ada_norm": 10}, {"num_layers": 28}, 0.4,
                {"BasicTransformerBlock": 3, "AdaLayerNormZero": 3, "Attention": 3, "GELU": 3}),
    Transformer("Mochi", MochiTransformer3DModel, _MOCHI, {"num_layers": 48}, 0.5,
                {"MochiTransformerBlock": 3, "MochiRMSNormZero": 5, "MochiLayerNormContinuous": 1, "MochiAttention": 3,
                 "SwiGLU": 5, "AdaLayerNormContinuous": 1}),
    Transformer("Wan VACE", WanVACETransformer3DModel,
                _WAN | {"cross_attn_norm": True, "vace_layers": [0, 1], "vace_in_channels": 7},
                {"num_layers": 40, "vace_layers": list(range(0, 40, 5))}, 0.55,
                {"WanTransformerBlock": 2, "WanVACETransformerBlock": 2, "WanAttention": 8, "GELU": 4}),
    Transformer("ChronoEdit", ChronoEditTransformer3DModel,  # its tables want heads of a multiple of 6
                _WAN | {"attention_head_dim": 24, "image_dim": 26, "added_kv_proj_dim": 72, "in_channels": 9},
                {"num_layers": 40}, 0.55, {"WanTransformerBlock": 2, "WanAttention": 4, "GELU": 2},
                {("GELU", "its GELU is exact: one operation already"): 1}),
    Transformer("SkyReels V2", SkyReelsV2Transformer3DModel, _WAN, {"num_layers": 40}, 0.55,
                {"SkyReelsV2TransformerBlock": 2, "SkyReelsV2Attention": 4, "GELU": 2}),
    Transformer("SkyReels V2 DF", SkyReelsV2Transformer3DModel,
                _WAN | {"inject_sample_info": True, "num_frame_per_block": 2}, {"num_layers": 30}, 0.5,
                {"SkyReelsV2TransformerBlock": 2, "SkyReelsV2Attention": 4, "GELU": 2}),
    Transformer("HunyuanVideo FramePack", HunyuanVideoFramepackTransformer3DModel,
                _HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": 26, "has_clean_x_embedder": True},
                {"num_layers": 20, "num_single_layers": 40}, 0.6, _HUNYUAN_VIDEO_SITES),
    Transformer("HunyuanVideo 1.5", HunyuanVideo15Transformer3DModel,
                {k: v for k, v in _HUNYUAN_VIDEO.items() if k not in ("num_single_layers", "pooled_projection_dim")}
                | {"text_embed_2_dim": 26, "image_embed_dim": 24}, {"num_layers": 54}, 0.6,
                {"HunyuanVideo15TransformerBlock": 2, "HunyuanVideo15IndividualTokenRefinerBlock": 2, "Attention": 4,
                 "AdaLayerNormZero": 4, "AdaLayerNormContinuous": 1, "GELU": 4}),
    Transformer("HunyuanImage 2.1", HunyuanImageTransformer2DModel,
                {k: v for k, v in _HUNYUAN_VIDEO.items() if k != "pooled_projection_dim"}
                | {"text_embed_2_dim": 26, "rope_axes_dim": (8, 12)}, {"num_layers": 20, "num_single_layers": 40}, 0.6,
                {"HunyuanImageTransformerBlock": 2, "HunyuanImageSingleTransformerBlock": 3, "Attention": 7,
                 "HunyuanImageIndividualTokenRefinerBlock": 2, "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3,
                 "AdaLayerNormContinuous": 1, "GELU": 4}),
    Transformer("LTX-2", LTX2VideoTransformer3DModel, _LTX2, {"num_layers": 48}, 0.5,
                {"LTX2VideoTransformerBlock": 2, "LTX2Attention": 12, "GELU": 4}),
    Transformer("LTX-2.3", LTX2VideoTransformer3DModel,
                _LTX2 | {"rope_type": "split", "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
                         "audio_cross_attn_mod": True, "perturbed_attn": True}, {"num_layers": 48}, 0.5,
                {"LTX2VideoTransformerBlock": 2, "LTX2Attention": 12, "GELU": 4}),
    Transformer("Qwen-Image ControlNet", QwenImageControlNetModel, _QWEN, {"num_layers": 5}, 0.6,
                {"QwenImageTransformerBlock": 2, "Attention": 2, "GELU": 4}),
    Transformer("Sana ControlNet", SanaControlNetModel, _SANA, {"num_layers": 7}, 0.2,
                {"SanaTransformerBlock": 2, "GLUMBConv": 2, "Attention": 2}, _LINEAR),
    Transformer("Cosmos", CosmosTransformer3DModel,
                {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 20,
                 "num_layers": 2, "text_embed_dim": 28, "adaln_lora_dim": 10, "max_size": (8, 16, 16),
                 "concat_padding_mask": False, "extra_pos_embed_type": None}, {"num_layers": 28}, 0.5,
                {"CosmosTransformerBlock": 2, "CosmosAdaLayerNormZero": 6, "CosmosAdaLayerNorm": 1, "Attention": 4},
                {("GELU", "its GELU is exact: one operation already"): 2}),
    Transformer("LongCat-Image", LongCatImageTransformer2DModel,
                _FLUX, _FLUX_DEPTH, 0.6,
                {"LongCatImageTransformerBlock": 2, "LongCatImageSingleTransformerBlock": 3, "LongCatImageAttention": 5,
                 "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3, "AdaLayerNormContinuous": 1, "GELU": 4}),
    Transformer("Ovis-Image", OvisImageTransformer2DModel,
                {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"},
                {"num_layers": 6, "num_single_layers": 27}, 0.6,
                {"OvisImageTransformerBlock": 2, "OvisImageSingleTransformerBlock": 3, "OvisImageAttention": 5,
                 "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3, "AdaLayerNormContinuous": 1, "SwiGLU": 4}),
    Transformer("ConsisID", ConsisIDTransformer3DModel, _COGVIDEOX | {"use_rotary_positional_embeddings": True},
                {"num_layers": 42}, 0.5,
                {"ConsisIDBlock": 2, "CogVideoXLayerNormZero": 4, "AdaLayerNorm": 1, "Attention": 2, "GELU": 2}),
    Transformer("CogView3 Plus", CogView3PlusTransformer2DModel,
                {k: v for k, v in _COGVIEW4.items() if k != "rope_axes_dim"}, {"num_layers": 30}, 0.5,
                {"CogView3PlusTransformerBlock": 2, "CogView3PlusAdaLayerNormZeroTextImage": 2, "Attention": 2,
                 "GELU": 2, "AdaLayerNormContinuous": 1}),
    Transformer("Bria", BriaTransformer2DModel,
                {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"}, _FLUX_DEPTH, 0.6,
                {"BriaTransformerBlock": 2, "BriaSingleTransformerBlock": 3, "BriaAttention": 5,
                 "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3, "AdaLayerNormContinuous": 1, "GELU": 4}),
    Transformer("Bria Fibo", BriaFiboTransformer2DModel,
                {k: v for k, v in _FLUX.items() if k != "pooled_projection_dim"} | {"text_encoder_dim": 26},
                {"num_layers": 8, "num_single_layers": 38}, 0.6,
                {"BriaFiboTransformerBlock": 2, "BriaFiboSingleTransformerBlock": 3, "BriaFiboAttention": 2,
                 "Attention": 3, "AdaLayerNormZero": 4, "AdaLayerNormZeroSingle": 3, "AdaLayerNormContinuous": 1,
                 "GELU": 4}),
    Transformer("HiDream-I1", HiDreamImageTransformer2DModel, _HIDREAM,  # all experts: a choice may be a close call
                {"num_layers": 16, "num_single_layers": 32, "llama_layers": [0, 1, 2, 3] * 12}, 0.4,
                {"HiDreamImageTransformerBlock": 2, "HiDreamImageSingleTransformerBlock": 3, "HiDreamAttention": 5,
                 "HiDreamImageFeedForwardSwiGLU": 17, "HiDreamImageOutEmbed": 1}),
    Transformer("OmniGen", OmniGenTransformer2DModel,
                {"in_channels": 4, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3,
                 "intermediate_size": 50, "num_layers": 2, "pad_token_id": 0, "vocab_size": 20, "pos_embed_max_size": 8,
                 "rope_scaling": {"short_factor": [1.0] * 10, "long_factor": [2.0] * 10}, "time_step_dim": 16},
                {"num_layers": 32}, 0.4,
                {"OmniGenBlock": 2, "OmniGenFeedForward": 2, "Attention": 2, "AdaLayerNorm": 1}),
    Transformer("Allegro", AllegroTransformer3DModel,
                {"num_attention_heads": 3, "attention_head_dim": 24, "in_channels": 4, "num_layers": 2,
                 "cross_attention_dim": 72, "sample_height": 8, "sample_width": 8, "caption_channels": 28},
                {"num_layers": 32}, 0.4, {"AllegroTransformerBlock": 2, "Attention": 4, "GELU": 2}),
]  # fmt: skip

#: Those whose blocks are replaced by another family's functions, and what these are tested for there is not repeated.
_KIN = {
    "ChronoEdit", "SkyReels V2 DF", "HunyuanVideo FramePack", "HunyuanImage 2.1", "LTX-2.3", "Qwen-Image ControlNet",
    "Sana ControlNet", "LongCat-Image", "ConsisID", "Bria", "Bria Fibo",
}  # fmt: skip
#: All others; with ``FASTDIFF_TEST_ALL=1`` all.
OWN_BLOCKS = [case for case in TRANSFORMERS if case.name not in _KIN or ALL]

"""Every U-Net, ControlNet and VAE of Diffusers: tiny but structurally true, and as published.

:data:`ZOO` is the one table of which models are covered. The tests build all of them; ``benchmarks/pipelines.py``
makes README's table of pipelines from it. Another model is another row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import diffusers.models
import published
import torch
from models import CASES, Case, randomized
from torch import Tensor, nn
from vaes import VAES, Vae

from fastdiff.patching.families import example_of


@dataclass(frozen=True)
class Entry:
    """A model of a pipeline.

    Attributes:
        case: the tiny model, and what patching does to it.
        pipelines: what README's table says it is.
        cls: name of the class in Diffusers.
        public: the published configuration, where it differs from the class's defaults; ``None`` without one.
        source: whose configuration that is.
        least: share of the places in the published model that patching must replace.
    """

    case: Case
    pipelines: str
    cls: str
    public: Mapping[str, Any] | None = None
    source: str = ""
    least: float = 1.0

    def without_weights(self) -> nn.Module:
        """The published model, on the meta device."""
        assert self.public is not None
        with torch.device("meta"):
            return model_class(self.cls)(**self.public)


def model_class(name: str) -> Any:
    """The class of that name."""
    return getattr(diffusers, name, None) or getattr(diffusers.models, name)


def _inputs(build: Callable[[], Any]) -> Callable[[torch.Generator, torch.dtype], dict[str, Any]]:
    """The family's own synthetic inputs."""

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            return _cast(example_of(build()), dtype)

    return inputs


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _case(
    name: str,
    cls: str,
    sites: dict[str, int],
    saved: float,
    after: Callable[[Any], Any] = lambda model: model,
    left: Mapping[str, str] | None = None,
    **config: Any,
) -> Case:
    """The tiny model of one configuration."""

    def build() -> Any:
        return randomized(after(model_class(cls)(**config)))

    return Case(name, build, _inputs(functools.cache(build)), sites, saved, left or {})


class _Unquantized(nn.Module):
    """Instead of a codebook, whose nearest entry may be another in another precision."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, None]:
        return h, h.new_zeros(()), None


def _without_codebook(model: Any) -> Any:
    model.quantize = _Unquantized()
    return model


_TINY = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_TEXT = _TINY | {"cross_attention_dim": 32}
_TEXT_UNET = {
    "sample_size": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_ADDED_KV = _TEXT | {
    "sample_size": 8,
    "attention_head_dim": 8,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
_ADDED_KV_SITES = {"ResnetBlock2D": 10, "Attention": 4, "GroupNorm": 1}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
}
_CONTROLNET = _TEXT | {
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "conditioning_embedding_out_channels": (8, 12),
}
_MOTION = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "motion_num_attention_heads": 4}
_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}



def _vae(row: Vae) -> Entry:
    """A row of the other table."""
    case = _case(f"VAE of {row.pipelines}", row.cls, row.sites, row.saved, **row.tiny)
    return Entry(case, f"VAE of {row.pipelines}", row.cls, row.public, row.source)


ZOO = (
    Entry(CASES[0], "Stable Diffusion 1.x: text to image, img2img, LCM, PAG, T2I adapter", "UNet2DConditionModel",
          public=published.SD15, source="stable-diffusion-v1-5"),
    Entry(CASES[0], "Stable Diffusion 1.x inpainting", "UNet2DConditionModel",
          public=published.SD15 | {"in_channels": 9}, source="stable-diffusion-inpainting"),
    Entry(CASES[0], "InstructPix2Pix", "UNet2DConditionModel",
          public=published.SD15 | {"in_channels": 8}, source="timbrooks/instruct-pix2pix"),
    Entry(
        _case("SD2", "UNet2DConditionModel",
              {"ResnetBlock2D": 8, "Transformer2DModel": 4, "Attention": 8,
               "BasicTransformerBlock": 4, "GEGLU": 4, "GroupNorm": 1}, 0.27,
              **_TEXT, **_TEXT_UNET, use_linear_projection=True),
        "Stable Diffusion 2.x, SD Turbo", "UNet2DConditionModel", public=published.SD2, source="stable-diffusion-2-1",
    ),
    Entry(CASES[1], "Stable Diffusion XL: base, Turbo, Lightning, PAG, T2I adapter", "UNet2DConditionModel",
          public=published.SDXL | published.SDXL_UP, source="stable-diffusion-xl-base-1.0"),
    Entry(
        _case("SDXL refiner", "UNet2DConditionModel",
              {"ResnetBlock2D": 11, "Transformer2DModel": 4, "Attention": 16,
               "BasicTransformerBlock": 8, "GEGLU": 8, "GroupNorm": 1}, 0.26,
              sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
              cross_attention_dim=32, attention_head_dim=(4, 4, 4), transformer_layers_per_block=2,
              down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
              addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72),
        "Stable Diffusion XL refiner", "UNet2DConditionModel",
        public=published.REFINER, source="stable-diffusion-xl-refiner-1.0",
    ),
    Entry(
        _case("latent upscaler", "UNet2DConditionModel", {"AdaGroupNorm": 96, "Attention": 32}, 0.30,
              sample_size=8, block_out_channels=(32, 32, 64, 64), layers_per_block=4, norm_num_groups=None,
              cross_attention_dim=32, attention_head_dim=8, in_channels=8, out_channels=5, act_fn="gelu",
              time_embedding_type="fourier", timestep_post_act="gelu", mid_block_type=None,
              conv_in_kernel=1, conv_out_kernel=1, resnet_time_scale_shift="scale_shift",
              down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
              up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D")),
        "Stable Diffusion x2 latent upscaler", "UNet2DConditionModel",
    ),
    Entry(
        _case("DeepFloyd IF", "UNet2DConditionModel", {"ResnetBlock2D": 10, "Attention": 4}, 0.29,
              **_ADDED_KV, in_channels=3, out_channels=6, encoder_hid_dim=24, encoder_hid_dim_type="text_proj",
              addition_embed_type="text", addition_embed_type_num_heads=2, cross_attention_norm="group_norm",
              act_fn="gelu", left={"conv_norm_out": "conv_act is a GELU"}),
        "DeepFloyd IF, stage 1", "UNet2DConditionModel",
        public=published.SIMPLE | {"block_out_channels": (704, 1408, 2112, 2816), "in_channels": 3, "out_channels": 6,
                          "cross_attention_dim": 2816, "cross_attention_norm": "group_norm", "act_fn": "gelu",
                          "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text"},
        source="DeepFloyd/IF-I-XL-v1.0", least=0.98,
    ),
    Entry(
        _case("Kandinsky 2.1", "UNet2DConditionModel", _ADDED_KV_SITES, 0.36,
              **_ADDED_KV, out_channels=8, encoder_hid_dim=24, encoder_hid_dim_type="text_image_proj",
              addition_embed_type="text_image"),
        "Kandinsky 2.1", "UNet2DConditionModel",
        public=published.KANDINSKY2 | {"encoder_hid_dim": 1024, "encoder_hid_dim_type": "text_image_proj",
                              "addition_embed_type": "text_image"},
        source="kandinsky-2-1",
    ),
    Entry(
        _case("Kandinsky 2.2", "UNet2DConditionModel", _ADDED_KV_SITES, 0.36,
              **_ADDED_KV, out_channels=8, encoder_hid_dim=24, encoder_hid_dim_type="image_proj",
              addition_embed_type="image"),
        "Kandinsky 2.2", "UNet2DConditionModel",
        public=published.KANDINSKY2 | {"encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj",
                              "addition_embed_type": "image"},
        source="kandinsky-2-2-decoder",
    ),
    Entry(
        _case("unCLIP", "UNet2DConditionModel", _ADDED_KV_SITES, 0.36,
              **_ADDED_KV, in_channels=3, out_channels=6, class_embed_type="identity"),
        "unCLIP (Karlo) decoder", "UNet2DConditionModel",
        public=published.SIMPLE | {"block_out_channels": (320, 640, 960, 1280), "in_channels": 3, "out_channels": 6,
                          "cross_attention_dim": 1536, "class_embed_type": "identity"},
        source="kakaobrain/karlo-v1-alpha",
    ),
    Entry(
        _case("AudioLDM", "UNet2DConditionModel",
              {"ResnetBlock2D": 8, "Transformer2DModel": 4, "Attention": 8,
               "BasicTransformerBlock": 4, "GEGLU": 4, "GroupNorm": 1}, 0.24,
              **_TINY, **_TEXT_UNET, cross_attention_dim=(32, 64), class_embed_type="simple_projection",
              projection_class_embeddings_input_dim=16, class_embeddings_concat=True),
        "AudioLDM", "UNet2DConditionModel",
        public={"block_out_channels": (128, 256, 384, 640), "cross_attention_dim": (128, 256, 384, 640),
                "in_channels": 8, "out_channels": 8, "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 512, "class_embeddings_concat": True, "sample_size": 128},
        source="audioldm-s-full-v2",
    ),
    Entry(
        _case("AudioLDM 2", "AudioLDM2UNet2DConditionModel",
              {"ResnetBlock2D": 8, "Transformer2DModel": 12, "Attention": 24,
               "BasicTransformerBlock": 12, "GEGLU": 12, "GroupNorm": 1}, 0.19,
              **_TINY, **_TEXT_UNET, cross_attention_dim=([None, 16, 24], [None, 16, 24])),
        "AudioLDM 2", "AudioLDM2UNet2DConditionModel",
        public={"block_out_channels": (128, 256, 384, 640), "cross_attention_dim": [[None, 768, 1024]] * 4,
                "in_channels": 8, "out_channels": 8, "sample_size": 128,
                "transformer_layers_per_block": 1},
        source="cvssp/audioldm2",
    ),
    Entry(CASES[2], "DDPM, DDIM, PNDM without text", "UNet2DModel",
          public={"sample_size": 32, "block_out_channels": (128, 256, 256, 256),
                  "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                  "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                  "attention_head_dim": None, "downsample_padding": 0, "norm_eps": 1e-6},
          source="google/ddpm-cifar10-32"),
    Entry(CASES[3], "improved DDPM, guided diffusion", "UNet2DModel"),
    Entry(
        _case("score SDE", "UNet2DModel", {"ResnetBlock2D": 10, "Attention": 3, "GroupNorm": 2}, 0.20,
              sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=None,
              time_embedding_type="fourier", mid_block_scale_factor=2**0.5,
              down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
              up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D")),
        "score SDE (VE)", "UNet2DModel",
        public={"sample_size": 1024, "block_out_channels": (16, 32, 64, 128, 256, 512, 512, 512),
                "layers_per_block": 1, "norm_num_groups": None, "time_embedding_type": "fourier", "freq_shift": 0,
                "down_block_types": (*("SkipDownBlock2D",) * 6, "AttnSkipDownBlock2D", "SkipDownBlock2D"),
                "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 6),
                "attention_head_dim": None, "mid_block_scale_factor": 2**0.5, "norm_eps": 1e-6},
        source="google/ncsnpp-ffhq-1024",
    ),
    Entry(
        _case("consistency model", "UNet2DModel", _ADDED_KV_SITES, 0.38,
              **_TINY, sample_size=8, attention_head_dim=8, attn_norm_num_groups=8, num_class_embeds=10,
              down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
              up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
              resnet_time_scale_shift="scale_shift", upsample_type="resnet", downsample_type="resnet"),
        "consistency models", "UNet2DModel",
        public={"sample_size": 64, "layers_per_block": 3, "num_class_embeds": 1000,
                "block_out_channels": (192, 384, 576, 768), "attention_head_dim": 64,
                "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
                "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
                "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32,
                "upsample_type": "resnet", "downsample_type": "resnet"},
        source="openai/diffusers-cd_imagenet64_l2",
    ),
    Entry(
        _case("AnimateDiff", "UNetMotionModel",
              {"ResnetBlock2D": 8, "Transformer2DModel": 4, "Attention": 22,
               "BasicTransformerBlock": 11, "GEGLU": 11, "GroupNorm": 8}, 0.23,
              **(_TEXT | {"norm_num_groups": 8}), **_MOTION, sample_size=8, num_attention_heads=4,
              up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_max_seq_length=8),
        "AnimateDiff, PIA", "UNetMotionModel",
        public={"cross_attention_dim": 768, "sample_size": 64}, source="animatediff-motion-adapter-v1-5-2",
    ),
    Entry(
        _case("SparseCtrl", "SparseControlNetModel",
              {"ResnetBlock2D": 4, "Transformer2DModel": 2, "Attention": 6,
               "BasicTransformerBlock": 4, "GEGLU": 4, "GroupNorm": 2}, 0.21,
              **(_TEXT | {"norm_num_groups": 8}), **_MOTION, num_attention_heads=4),
        "AnimateDiff SparseCtrl", "SparseControlNetModel",
        public={"cross_attention_dim": 768}, source="animatediff-sparsectrl-scribble",
    ),
    Entry(
        _case("ModelScope", "UNet3DConditionModel",
              {"ResnetBlock2D": 8, "TemporalConvLayer": 8, "Transformer2DModel": 4, "Attention": 18,
               "BasicTransformerBlock": 9, "GEGLU": 9,
               "GroupNorm": 6}, 0.28,
              **_TEXT, **_3D, sample_size=8, attention_head_dim=8),
        "ModelScope, Zeroscope text to video", "UNet3DConditionModel",
        public={"cross_attention_dim": 1024, "attention_head_dim": 64, "sample_size": 32},
        source="damo-vilab/text-to-video-ms-1.7b",
    ),
    Entry(
        _case("I2VGen-XL", "I2VGenXLUNet",
              {"ResnetBlock2D": 8, "TemporalConvLayer": 8, "Transformer2DModel": 4, "Attention": 19,
               "BasicTransformerBlock": 9, "GEGLU": 9,
               "GroupNorm": 6}, 0.26,
              **_TEXT, **_3D, sample_size=8, attention_head_dim=8),
        "I2VGen-XL", "I2VGenXLUNet", public={"sample_size": 32}, source="ali-vilab/i2vgen-xl",
    ),
    Entry(
        _case("Stable Video Diffusion", "UNetSpatioTemporalConditionModel",
              {"ResnetBlock2D": 8, "TemporalResnetBlock": 8, "Attention": 16,
               "BasicTransformerBlock": 4, "TemporalBasicTransformerBlock": 4, "GEGLU": 12, "GroupNorm": 5}, 0.24,
              sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
              num_attention_heads=4, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
              down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
              up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        "Stable Video Diffusion", "UNetSpatioTemporalConditionModel",
        public={"num_attention_heads": (5, 10, 20, 20), "sample_size": 96, "num_frames": 25},
        source="stable-video-diffusion-img2vid-xt",
    ),
    Entry(
        _case("Kandinsky 3", "Kandinsky3UNet",
              {"Kandinsky3ConditionalGroupNorm": 120, "Attention": 13, "GroupNorm": 1}, 0.44,
              block_out_channels=(32, 64), groups=8, attention_head_dim=8, time_embedding_dim=16,
              cross_attention_dim=16, encoder_hid_dim=24, layers_per_block=3),
        "Kandinsky 3", "Kandinsky3UNet", public={}, source="kandinsky-3",
    ),
    Entry(
        _case("ControlNet", "ControlNetModel",
              {"ResnetBlock2D": 4, "Transformer2DModel": 2, "Attention": 4,
               "BasicTransformerBlock": 2, "GEGLU": 2}, 0.20, **_CONTROLNET),
        "Stable Diffusion 1.x ControlNet", "ControlNetModel",
        public={"cross_attention_dim": 768}, source="lllyasviel/sd-controlnet-canny",
    ),
    Entry(
        _case("ControlNet Union", "ControlNetUnionModel",
              {"ResnetBlock2D": 4, "Transformer2DModel": 2, "Attention": 4,
               "BasicTransformerBlock": 2, "GEGLU": 2}, 0.13,
              **_CONTROLNET, num_trans_channel=32, num_trans_head=4, num_proj_channel=32,
              addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
        "Stable Diffusion XL ControlNet Union", "ControlNetUnionModel",
        public={k: v for k, v in published.SDXL.items() if k != "sample_size"},
        source="xinsir/controlnet-union-sdxl-1.0",
    ),
    Entry(
        _case("ControlNet-XS", "UNetControlNetXSModel",
              {"ResnetBlock2D": 18, "Transformer2DModel": 9, "Attention": 18,
               "BasicTransformerBlock": 9, "GEGLU": 9, "GroupNorm": 1}, 0.25,
              sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
              down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), num_attention_heads=4,
              ctrl_num_attention_heads=4, ctrl_block_out_channels=(16, 32),
              ctrl_conditioning_embedding_out_channels=(8, 12), time_embedding_mix=0.9,
              ctrl_learn_time_embedding=True),
        "ControlNet-XS", "UNetControlNetXSModel",
    ),
    Entry(CASES[4], "VAE of Stable Diffusion 1.x, 2.x and XL", "AutoencoderKL",
          public=published.KL | published.KL_UP, source="sd-vae-ft-mse"),
    Entry(
        _case("VAE of Stable Video Diffusion", "AutoencoderKLTemporalDecoder",
              {"ResnetBlock2D": 14, "TemporalResnetBlock": 8, "Attention": 2, "GroupNorm": 2}, 0.36,
              **(_VAE | {"layers_per_block": 2})),
        "VAE of Stable Video Diffusion", "AutoencoderKLTemporalDecoder",
        public=published.KL, source="stable-video-diffusion-img2vid-xt",
    ),
    Entry(
        _case("MoVQ", "VQModel", {"ResnetBlock2D": 4, "SpatialNorm": 16, "Attention": 5, "GroupNorm": 1}, 0.20,
              after=_without_codebook, block_out_channels=(32, 64), layers_per_block=1, latent_channels=4,
              norm_type="spatial", down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
              up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D")),
        "VAE of Kandinsky 2 and 3 (MoVQ)", "VQModel",
        public={"block_out_channels": (128, 256, 256, 512), "layers_per_block": 2, "latent_channels": 4,
                "norm_type": "spatial", "num_vq_embeddings": 16384, "vq_embed_dim": 4,
                "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
                "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3)},
        source="kandinsky-2-2-decoder",
    ),
    Entry(
        _case("asymmetric VAE", "AsymmetricAutoencoderKL", {"ResnetBlock2D": 10, "Attention": 2, "GroupNorm": 2}, 0.28,
              down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(32, 64),
              up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(32, 64), norm_num_groups=8),
        "asymmetric VAE for inpainting", "AsymmetricAutoencoderKL",
        public={"down_block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
                "layers_per_down_block": 2, "up_block_out_channels": (192, 384, 768, 768),
                "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_up_block": 3},
        source="asymmetric-autoencoder-kl-x-1-5",
    ),
    *map(_vae, VAES),
)  # fmt: skip

ALL_CASES = (*CASES, *(entry.case for entry in ZOO if all(entry.case is not case for case in CASES)))

"""The models' cases: denoisers, VAE decoders and whole pipelines at their published sizes, with random weights.

Weights are made on the device and in the dtype they are used in: Flux never exists in fp32 or on the host. Values
do not matter for time, only sizes do; the configurations are those of the models' config.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCase:
    """One call of one model.

    Attributes:
        build: the model on torch's default device and in its default dtype; :meth:`make` calls it.
        inputs: keyword arguments of ``call``, made alike.
        call: (model, **inputs) -> a tensor.
        targets: device type -> the eager/ours ratio that the project set itself, exact kernels only; on a CPU by dtype.
        on_cpu: whether a CPU with 16 GB gets through it in seconds.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    call: Callable[..., Tensor]
    targets: dict[str, float] = field(default_factory=dict)
    on_cpu: bool = False

    def make(self, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, dict[str, Any]]:
        """The model and its inputs."""
        torch.manual_seed(seed)
        with made_on(device, dtype):
            model = self.build()
            inputs = self.inputs()
        for part in parts_of(model):
            keep_fp32(part.eval().requires_grad_(False))
        return model, inputs


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within the block parameters and random tensors are made on the device and in the dtype."""
    saved = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(saved)


def keep_fp32(model: nn.Module) -> None:
    """Put into fp32 what ``from_pretrained`` keeps there (Wan's norms and time embedding)."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parameter in model.named_parameters():
        if kept.intersection(path.split(".")):
            parameter.data = parameter.data.float()


def parts_of(model: Any) -> list[nn.Module]:
    """A model, or the models of a pipeline."""
    if isinstance(model, nn.Module):
        return [model]
    return [part for part in model.components.values() if isinstance(part, nn.Module)]


SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}


def _model(cls: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, cls)(**config)

    return build


def _unet_inputs(batch: int, size: int, width: int) -> dict[str, Any]:
    found = {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, width),
    }
    if width == SDXL["cross_attention_dim"]:
        added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.zeros(batch, 6)}
        found["added_cond_kwargs"] = added
    return found


def _dit_inputs(size: int) -> dict[str, Any]:
    labels = {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 1000])}
    return {"hidden_states": torch.randn(2, 4, size, size), **labels}


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 128, 128),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 333, 4096),
        "pooled_projections": torch.randn(2, 2048),
    }


def _flux_inputs(side: int, text: int) -> dict[str, Any]:
    """``side`` tokens along either axis of the picture, which has 16 times as many pixels."""
    axes = torch.zeros(1), torch.arange(float(side)), torch.arange(float(side))
    return {
        "hidden_states": torch.randn(1, side * side, 64),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.randn(1, text, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(text, 3),
    }


def _wan_inputs(frames: int, height: int, width: int) -> dict[str, Any]:
    """Of latent frames."""
    return {
        "hidden_states": torch.randn(1, 16, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }


def stable_diffusion(unet: dict[str, Any], vae: dict[str, Any] = VAE) -> Any:
    """A Stable Diffusion pipeline without text encoder, which prompt embeddings stand for."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**vae), text_encoder=None, tokenizer=None, unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_pipeline() -> Any:
    """The pipeline of DiT-XL/2 256."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(_model("DiTTransformer2DModel", sample_size=32, **DIT)(), AutoencoderKL(**VAE), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **inputs: Any) -> Tensor:
    """The pictures as a tensor, always from the same noise."""
    device = parts_of(pipe)[0].device
    return pipe(generator=torch.Generator(device).manual_seed(0), output_type="pt", **inputs).images


def prompt_inputs(width: int, size: int, steps: int) -> dict[str, Any]:
    """Arguments of a Stable Diffusion pipeline without text encoder."""
    return {
        "prompt_embeds": torch.randn(1, 77, width),
        "negative_prompt_embeds": torch.randn(1, 77, width),
        "height": size, "width": size, "num_inference_steps": steps,
    }  # fmt: skip


def _dit_prompt(steps: int) -> dict[str, Any]:
    return {"class_labels": [1], "num_inference_steps": steps}


def _first(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def _decode(model: nn.Module, z: Tensor) -> Tensor:
    return model.decode(z, return_dict=False)[0]


def _case(name: str, build: Callable[[], Any], inputs: Callable[..., dict[str, Any]], *args: Any, on_cpu: bool = False,
          call: Callable[..., Tensor] = _first, **targets: float) -> ModelCase:  # fmt: skip
    return ModelCase(name, build, functools.partial(inputs, *args), call, targets, on_cpu)


def _latents(size: int) -> dict[str, Any]:
    return {"z": torch.randn(1, 4, size, size)}


def cases() -> list[ModelCase]:
    """Small ones first: what a budget cuts is at the end."""
    sd, xl, vae = _model("UNet2DConditionModel", **SD15), _model("UNet2DConditionModel", **SDXL), _model(
        "AutoencoderKL", **VAE)  # fmt: skip
    dit = lambda size: _model("DiTTransformer2DModel", sample_size=size, **DIT)  # noqa: E731
    sd_pipeline = functools.partial(stable_diffusion, SD15)
    flux, wan = functools.partial(_model, "FluxTransformer2DModel"), functools.partial(_model, "WanTransformer3DModel")
    few_flux, few_wan = FLUX | {"num_layers": 1, "num_single_layers": 2}, WAN | {"num_layers": 2}
    return [
        _case("SD1.5 U-Net 256x256 batch 2", sd, _unet_inputs, 2, 32, 768, on_cpu=True, fp32=1.05, bf16=1.12),
        _case("DiT-XL/2 256x256 batch 2", dit(32), _dit_inputs, 32, on_cpu=True, fp32=1.15, bf16=1.15, cuda=8.0),
        _case("SD VAE decode 512x512", vae, _latents, 64, call=_decode, on_cpu=True, fp32=1.25, bf16=1.25),
        _case("Flux, 3 blocks, 512x512", flux(**few_flux), _flux_inputs, 32, 128, on_cpu=True, bf16=1.15),
        _case("Wan 1.3B, 2 blocks, 17 frames 240x416", wan(**few_wan), _wan_inputs, 5, 30, 52, on_cpu=True, bf16=1.15),
        _case("SD1.5 U-Net 512x512 batch 2", sd, _unet_inputs, 2, 64, 768, on_cpu=True, cuda=3.5),
        _case("SDXL U-Net 1024x1024 batch 2", xl, _unet_inputs, 2, 128, 2048, cuda=1.35),
        _case("SD VAE decode 1024x1024", vae, _latents, 128, call=_decode, cuda=2.0),
        _case("DiT-XL/2 512x512 batch 2", dit(64), _dit_inputs, 64, on_cpu=True),
        _case("SDXL U-Net 256x256 batch 1", xl, _unet_inputs, 1, 32, 2048, on_cpu=True),
        _case("SD1.5 pipeline 512x512, 10 steps", sd_pipeline, prompt_inputs, 768, 512, 10, call=generate),
        _case("SD1.5 pipeline 256x256, 2 steps", sd_pipeline, prompt_inputs, 768, 256, 2, call=generate, on_cpu=True),
        _case("DiT-XL/2 pipeline 256x256, 10 steps", dit_pipeline, _dit_prompt, 10, call=generate),
        _case("SD3-medium 1024x1024 batch 2", _model("SD3Transformer2DModel", **SD3), _sd3_inputs, cuda=1.2),
        _case("Flux-dev 1024x1024 batch 1", flux(**FLUX), _flux_inputs, 64, 512, cuda=1.3),
        _case("Wan 1.3B 832x480, 81 frames, batch 1", wan(**WAN), _wan_inputs, 21, 60, 104),
    ]


def named(name: str) -> ModelCase:
    """The case of that name.

    Raises:
        KeyError: if there is none.
    """
    return {case.name: case for case in cases()}[name]


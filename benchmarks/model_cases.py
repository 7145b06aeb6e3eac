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
from _targets import Target, as_extra
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelCase:
    """One call of one model.

    Attributes:
        build: the model on torch's default device and in its default dtype; :meth:`make` calls it.
        inputs: keyword arguments of ``call``, made alike.
        call: (model, **inputs) -> a tensor.
        targets: the eager/ours ratios that the project set itself, exact kernels only: on a CPU by dtype, on a GPU
            "cuda", and there "compiled", the ratio to the better of torch.compile's default and max-autotune.
        on_cpu: whether a CPU with 16 GB gets through it in seconds.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    call: Callable[..., Tensor]
    targets: dict[str, float] = field(default_factory=dict)
    on_cpu: bool = False

    def target(self, device: str, dtype_name: str) -> float | None:
        """The eager/ours ratio to reach there."""
        return self.targets.get("cuda" if device == "cuda" else dtype_name)

    def further_targets(self, device: str) -> list[dict[str, Any]]:
        """What else is to be reached there, as ``extra["targets"]``."""
        compiled = self.targets.get("compiled") if device == "cuda" else None
        return as_extra(Target("speed", compiled, about="torch.compile")) if compiled else []

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


def compiled_parts(model: Any) -> list[nn.Module]:
    """What users of a model, or of a pipeline, give to torch.compile: denoisers and decoders."""
    return [getattr(part, "decoder", part) for part in parts_of(model)]


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
#: Of SD1.5, SDXL and DiT, of SD3 and Flux, of Wan.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
VAE16 = VAE | {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
WAN_VAE: dict[str, Any] = {}  # the class's defaults
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


LATENT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
#: Of the published pipelines.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5": ("DDIMScheduler", LATENT_BETAS | {"clip_sample": False, "set_alpha_to_one": False}),
    "SDXL": ("EulerDiscreteScheduler", LATENT_BETAS | {"timestep_spacing": "leading"}),
    "DiT": ("DDIMScheduler", {}),
    "SD3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "Flux": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    "Wan": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True,
                                        "flow_shift": 3.0}),
}  # fmt: skip
#: What prompt embeddings, and a switched off check, stand for.
WITHOUT: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "DiTPipeline": (),
    "StableDiffusion3Pipeline": ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
                                 "tokenizer_3"),
    "FluxPipeline": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    "WanPipeline": ("text_encoder", "tokenizer"),
}  # fmt: skip


def _pipeline(cls: str, scheduler: str, *, vae: Callable[[], nn.Module], options: dict[str, Any] | None = None,
              **denoiser: Callable[[], nn.Module]) -> Callable[[], Any]:  # fmt: skip
    """The maker of a pipeline without text encoders. ``denoiser``: its maker, by its name in the pipeline."""

    def build() -> Any:
        import diffusers

        name, config = SCHEDULERS[scheduler]
        with made_on("cpu", torch.float32):  # as from_pretrained makes them, wherever the models are
            steps = getattr(diffusers, name)(**config)
        parts = {role: make() for role, make in (("vae", vae), *denoiser.items())}
        absent = dict.fromkeys(WITHOUT[cls])
        pipe = getattr(diffusers, cls)(**parts, **absent, **(options or {}), scheduler=steps)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def stable_diffusion(unet: dict[str, Any], vae: dict[str, Any] = VAE) -> Any:
    """A Stable Diffusion pipeline of these configurations."""
    return _pipeline("StableDiffusionPipeline", "SD1.5", vae=_model("AutoencoderKL", **vae),
                     unet=_model("UNet2DConditionModel", **unet),
                     options={"requires_safety_checker": False})()  # fmt: skip


def generate(pipe: Any, **inputs: Any) -> Tensor:
    """The pictures, or frames, as a tensor, always from the same noise."""
    generator = torch.Generator(parts_of(pipe)[0].device).manual_seed(0)
    return pipe(generator=generator, output_type="pt", return_dict=False, **inputs)[0]


def prompt_inputs(width: int, size: int, steps: int, *, tokens: int = 77, pooled: int = 0,
                  guided: bool = True) -> dict[str, Any]:  # fmt: skip
    """Arguments of a pipeline without text encoder: embeddings of this width, and what is pooled of them."""
    embeddings = {"prompt_embeds": (1, tokens, width)} | ({"pooled_prompt_embeds": (1, pooled)} if pooled else {})
    if guided:
        embeddings |= {f"negative_{name}": shape for name, shape in embeddings.items()}
    sizes = {"height": size, "width": size, "num_inference_steps": steps}
    return {name: torch.randn(shape) for name, shape in embeddings.items()} | sizes


def _video_prompt(height: int, width: int, frames: int, steps: int) -> dict[str, Any]:
    return prompt_inputs(4096, height, steps, tokens=512) | {"width": width, "num_frames": frames}


def _dit_prompt(steps: int) -> dict[str, Any]:
    return {"class_labels": [1], "num_inference_steps": steps}


def _first(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def _decode(model: nn.Module, z: Tensor) -> Tensor:
    return model.decode(z, return_dict=False)[0]


def _case(name: str, build: Callable[[], Any], inputs: Callable[..., dict[str, Any]], *args: Any, on_cpu: bool = False,
          call: Callable[..., Tensor] = _first, **targets: float) -> ModelCase:  # fmt: skip
    return ModelCase(name, build, functools.partial(inputs, *args), call, targets, on_cpu)


def _latents(*shape: int) -> dict[str, Any]:
    return {"z": torch.randn(1, *shape)}


def cases() -> list[ModelCase]:
    """Small ones first: what a budget cuts is at the end."""
    sd, xl = (_model("UNet2DConditionModel", **config) for config in (SD15, SDXL))
    vae, vae16 = (_model("AutoencoderKL", **config) for config in (VAE, VAE16))
    wan_vae, sd3 = _model("AutoencoderKLWan", **WAN_VAE), _model("SD3Transformer2DModel", **SD3)
    dit = lambda size: _model("DiTTransformer2DModel", sample_size=size, **DIT)  # noqa: E731
    flux, wan = functools.partial(_model, "FluxTransformer2DModel"), functools.partial(_model, "WanTransformer3DModel")
    few_flux, few_wan = FLUX | {"num_layers": 1, "num_single_layers": 2}, WAN | {"num_layers": 2}
    flux_pair = FLUX | {"num_layers": 1, "num_single_layers": 1}
    return [
        _case("SD1.5 U-Net 256x256 batch 2", sd, _unet_inputs, 2, 32, 768, on_cpu=True, fp32=1.05, bf16=1.12),
        _case("DiT-XL/2 256x256 batch 2", dit(32), _dit_inputs, 32, on_cpu=True, fp32=1.15, bf16=1.15, cuda=8.0,
              compiled=1.1),
        _case("SD VAE decode 256x256", vae, _latents, 4, 32, 32, call=_decode, on_cpu=True),
        _case("SD VAE decode 512x512", vae, _latents, 4, 64, 64, call=_decode, on_cpu=True, fp32=1.25, bf16=1.25),
        _case("Flux, 3 blocks, 512x512", flux(**few_flux), _flux_inputs, 32, 128, on_cpu=True, bf16=1.15),
        _case("Flux, 2 blocks, 1024x1024", flux(**flux_pair), _flux_inputs, 64, 512, on_cpu=True, bf16=1.15),
        _case("Wan 1.3B, 2 blocks, 17 frames 240x416", wan(**few_wan), _wan_inputs, 5, 30, 52, on_cpu=True, bf16=1.15),
        _case("SD1.5 U-Net 512x512 batch 2", sd, _unet_inputs, 2, 64, 768, on_cpu=True, cuda=3.5, compiled=1.15),
        _case("SDXL U-Net 1024x1024 batch 2", xl, _unet_inputs, 2, 128, 2048, cuda=1.35, compiled=1.1),
        _case("SD VAE decode 1024x1024", vae, _latents, 4, 128, 128, call=_decode, cuda=2.0, compiled=1.3),
        _case("DiT-XL/2 512x512 batch 2", dit(64), _dit_inputs, 64, on_cpu=True),
        _case("SDXL U-Net 256x256 batch 1", xl, _unet_inputs, 1, 32, 2048, on_cpu=True),
        _case("SD3-medium 1024x1024 batch 2", sd3, _sd3_inputs, cuda=1.2, compiled=1.05),
        _case("Flux-dev 1024x1024 batch 1", flux(**FLUX), _flux_inputs, 64, 512, cuda=1.3, compiled=1.05),
        _case("SD3 and Flux VAE decode 1024x1024", vae16, _latents, 16, 128, 128, call=_decode),
        _case("Wan 1.3B 832x480, 81 frames, batch 1", wan(**WAN), _wan_inputs, 21, 60, 104),
        _case("Wan VAE decode 832x480, 81 frames", wan_vae, _latents, 16, 21, 60, 104, call=_decode),
        *_pipelines(),
    ]


def _pipelines() -> Iterator[ModelCase]:
    """Whole generations."""
    sd = functools.partial(stable_diffusion, SD15, VAE)
    xl = _pipeline("StableDiffusionXLPipeline", "SDXL", vae=_model("AutoencoderKL", **VAE),
                   unet=_model("UNet2DConditionModel", **SDXL), options={"add_watermarker": False})  # fmt: skip
    sd3 = _pipeline("StableDiffusion3Pipeline", "SD3", vae=_model("AutoencoderKL", **VAE16),
                    transformer=_model("SD3Transformer2DModel", **SD3))  # fmt: skip
    flux = _pipeline("FluxPipeline", "Flux", vae=_model("AutoencoderKL", **VAE16),
                     transformer=_model("FluxTransformer2DModel", **FLUX))  # fmt: skip
    wan = _pipeline("WanPipeline", "Wan", vae=_model("AutoencoderKLWan", **WAN_VAE),
                    transformer=_model("WanTransformer3DModel", **WAN))  # fmt: skip
    case, prompt = functools.partial(_case, call=generate), functools.partial(functools.partial, prompt_inputs)
    yield case("SD1.5 pipeline 256x256, 2 steps", sd, prompt(), 768, 256, 2, on_cpu=True)
    yield case("SD1.5 pipeline 512x512, 10 steps", sd, prompt(), 768, 512, 10)
    for size in (256, 512):
        dit = _pipeline("DiTPipeline", "DiT", vae=_model("AutoencoderKL", **VAE),
                        transformer=_model("DiTTransformer2DModel", sample_size=size // 8, **DIT))  # fmt: skip
        yield case(f"DiT-XL/2 pipeline {size}x{size}, 10 steps", dit, _dit_prompt, 10)
    yield case("SDXL pipeline 1024x1024, 10 steps", xl, prompt(pooled=1280), 2048, 1024, 10)
    yield case("SD3-medium pipeline 1024x1024, 10 steps", sd3, prompt(tokens=333, pooled=2048), 4096, 1024, 10)
    text = prompt(tokens=512, pooled=768, guided=False)
    yield case("Flux-dev pipeline 1024x1024, 4 steps", flux, text, 4096, 1024, 4)
    yield case("Wan 1.3B pipeline 832x480, 81 frames, 2 steps", wan, _video_prompt, 480, 832, 81, 2)


def named(name: str) -> ModelCase:
    """The case of that name.

    Raises:
        KeyError: if there is none.
    """
    return {case.name: case for case in cases()}[name]

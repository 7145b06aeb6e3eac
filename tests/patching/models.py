"""Tiny but structurally true models: every kind of block, awkward sizes, random weights that matter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of


def sd15_unet(**changes: Any) -> UNet2DConditionModel:
    """Like SD 1.x: convolutional projections, 8 heads, 77 text tokens, groups of 3 to 6 channels."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (24, 48),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 3,
        "norm_num_groups": 8,
    }
    return randomized(UNet2DConditionModel(**(config | changes)))


def sdxl_unet() -> UNet2DConditionModel:
    """Like SDXL: linear projections, several transformer layers, added text and time embedding."""
    return sd15_unet(
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=72,
    )


def ddpm_unet() -> UNet2DModel:
    """Like google/ddpm-cifar10: spatial attention with a GroupNorm inside."""
    return randomized(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )
    )


def improved_ddpm_unet() -> UNet2DModel:
    """Like the models of improved DDPM: scale and shift after norm2, ResNet blocks that resample."""
    return randomized(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
    )


def vae() -> AutoencoderKL:
    """Like the VAE of SD: one wide head in the middle, time-free ResNet blocks."""
    return randomized(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=16,
        )
    )


def dit() -> DiTTransformer2DModel:
    """Like DiT-XL/2: adaLN-Zero with gates that are not zero, tanh GELU, heads of 24."""
    return randomized(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=3, sample_size=8, num_embeds_ada_norm=10
        )
    )


def randomized(model: nn.Module) -> Any:
    """Weights such that every norm, bias and gate matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * noise)
            elif parameter.numel():
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """One family under test.

    Attributes:
        sites: class name -> how many sites of it there must be.
        saved: least share of the launches that patching must remove.
        left: path of a place that is left alone -> reason.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[torch.Generator, torch.dtype], dict[str, Any]]
    sites: dict[str, int]
    saved: float
    left: Mapping[str, str] = field(default_factory=dict)


def flat(found: Any) -> Tensor:
    """The first tensor of what a forward returns; of a ControlNet all of them, flattened."""
    if hasattr(found[0], "sample"):  # some VAEs of older versions of Diffusers wrap it whatever is asked for
        return found[0].sample
    return found[0] if isinstance(found[0], Tensor) else torch.cat([t.flatten() for t in (*found[0], *found[1:])])


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output tensor of a forward."""
    with torch.no_grad():
        return flat(model(**inputs, return_dict=False))


def assert_no_further(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Something fused ran, and over all seeds it is at most 1.05 times as far from fp64 as eager."""
    assert ours.dtype == eager.dtype and exact.dtype == torch.float64
    assert not torch.equal(ours, eager), "bitwise equal: nothing fused ran"
    error, of_eager = (((value.double() - exact).norm() / exact.norm()).item() for value in (ours, eager))
    assert error <= 1.05 * of_eager, (error, of_eager)


def _noise(channels: int, size: int) -> Callable[[torch.Generator, torch.dtype], dict[str, Any]]:
    def inputs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        sample = torch.randn(2, channels, size, size, generator=generator).to(dtype)
        return {"sample": sample, "timestep": torch.tensor([500, 20])}

    return inputs


def _text(added: bool = False) -> Callable[[torch.Generator, torch.dtype], dict[str, Any]]:
    def inputs(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
        found = _noise(4, 8)(generator, dtype)
        found["encoder_hidden_states"] = torch.randn(2, 77, 32, generator=generator).to(dtype)
        if added:
            text = torch.randn(2, 24, generator=generator).to(dtype)
            found["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.ones(2, 6, dtype=dtype)}
        return found

    return inputs


def _labels(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return {"hidden_states": sample, "timestep": torch.tensor([500, 20]), "class_labels": torch.tensor([1, 10])}


def _picture(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 16, 16, generator=generator).to(dtype)}


CASES = [
    Case("SD1.5", sd15_unet, _text(),
         {"ResnetBlock2D": 8, "Transformer2DModel": 4, "Attention": 8,
          "BasicTransformerBlock": 4, "GEGLU": 4, "GroupNorm": 1}, 0.24),
    Case("SDXL", sdxl_unet, _text(added=True),
         {"ResnetBlock2D": 8, "Transformer2DModel": 4, "Attention": 16,
          "BasicTransformerBlock": 8, "GEGLU": 8, "GroupNorm": 1}, 0.25),
    Case("DDPM", ddpm_unet, _noise(3, 8), {"ResnetBlock2D": 8, "Attention": 4, "GroupNorm": 1}, 0.34),
    Case("improved DDPM", improved_ddpm_unet, _noise(3, 8),
         {"ResnetBlock2D": 10, "Attention": 4, "GroupNorm": 1}, 0.40),
    Case("AutoencoderKL", vae, _picture, {"ResnetBlock2D": 10, "Attention": 2, "GroupNorm": 2}, 0.33),
    Case("DiT", dit, _labels,
         {"BasicTransformerBlock": 3, "AdaLayerNormZero": 3, "Attention": 3, "GELU": 3}, 0.35),
]  # fmt: skip


def inputs_of(case: Case = CASES[0], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a forward, always the same."""
    return case.inputs(torch.Generator().manual_seed(0), dtype)


def is_stock(model: nn.Module) -> bool:
    """Whether no forward is replaced, by anybody, and nothing of fastdiff is left."""
    return not any("forward" in vars(m) or site_of(m) for m in model.modules()) and patch_of(model) is None


def narrower(model: nn.Module) -> dict[str, str]:
    """Replaced forwards that take fewer positional arguments than stock's, as gradient checkpointing passes them."""

    def positional(function: Any) -> float:
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return float("inf")
        return len(kinds) - kinds.count(inspect.Parameter.KEYWORD_ONLY) - kinds.count(inspect.Parameter.VAR_KEYWORD)

    return {
        path: type(module).__name__
        for path, module in model.named_modules()
        if "forward" in vars(module)
        and positional(module.forward) < min(positional(partial(type(module).forward, module)), 99)
    }


def is_fused(x: Any) -> bool:
    """Whether kernels served every place that ran, and there was one."""
    report = fastdiff.report(x)
    return all(row.fused for row in report.rows if row.backend != "not run yet") and report.fused > 0


def sd_pipeline(unet: Any = None, scheduler: Any = None) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline without text encoder, to be called by :func:`run_sd`."""
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet if unet is not None else sd15_unet(),
        scheduler=scheduler if scheduler is not None else DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_sd(pipe: StableDiffusionPipeline, seed: int = 0, **arguments: Any) -> Tensor:
    """The latents after 2 steps with guidance."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, 77, 32, generator=generator)
    arguments = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16} | arguments
    return pipe(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=generator, **arguments
    ).images  # fmt: skip


def ddpm_pipeline() -> DDPMPipeline:
    """An unconditional pipeline."""
    pipe = DDPMPipeline(unet=ddpm_unet(), scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe

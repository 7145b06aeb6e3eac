"""Pipelines from end to end, with tiny components: kernels run, and the result is eager's but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AudioLDM2Pipeline,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    IFPipeline,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    T2IAdapter,
)
from models import randomized, sd15_unet, sdxl_unet, vae
from torch import Tensor, nn
from zoo import ZOO

import fastdiff

TINY = {entry.case.name: entry.case.build for entry in ZOO}


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def _sd(cls: type[DiffusionPipeline], unet: Any, **components: Any) -> DiffusionPipeline:
    return cls(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=_ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **components,
    )  # fmt: skip


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _text(width: int = 32, pooled: int = 0) -> dict[str, Any]:
    found = {"prompt_embeds": _randn(1, 77, width, seed=1), "negative_prompt_embeds": _randn(1, 77, width, seed=2)}
    if pooled:
        found["pooled_prompt_embeds"] = _randn(1, pooled, seed=3)
        found["negative_pooled_prompt_embeds"] = _randn(1, pooled, seed=4)
    return found


def _image(size: int = 16) -> Tensor:
    return _randn(1, 3, size, size, seed=5).sigmoid()


def _mask(size: int = 16) -> Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return mask


def _img2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return _sd(StableDiffusionImg2ImgPipeline, sd15_unet()), {"image": _image(), "strength": 0.5, **_text()}


def _inpaint() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = _sd(StableDiffusionInpaintPipeline, sd15_unet(in_channels=9))
    return pipe, {"image": _image(), "mask_image": _mask(), "height": 16, "width": 16, "strength": 1.0, **_text()}


def _pix2pix() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = _sd(StableDiffusionInstructPix2PixPipeline, sd15_unet(in_channels=8))
    return pipe, {"image": _image(), "image_guidance_scale": 1.5, **_text()}


_NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def _sdxl() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionXLPipeline(vae=vae(), unet=sdxl_unet(), scheduler=EulerDiscreteScheduler(), **_NO_TEXT)
    return pipe, {"height": 16, "width": 16, **_text(pooled=24)}


def _refiner() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=vae(), unet=TINY["SDXL refiner"](), scheduler=EulerDiscreteScheduler(), requires_aesthetics_score=True,
        **_NO_TEXT,
    )  # fmt: skip
    return pipe, {"image": _image(), "strength": 0.5, **_text(pooled=32)}


def _of_unet() -> ControlNetModel:
    return randomized(ControlNetModel.from_unet(sd15_unet(), conditioning_embedding_out_channels=(8, 12)))


def _controlnet() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = _sd(StableDiffusionControlNetPipeline, sd15_unet(), controlnet=_of_unet())
    return pipe, {"image": _image(), **_text()}


def _controlnets() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = _sd(StableDiffusionControlNetPipeline, sd15_unet(), controlnet=[_of_unet(), _of_unet()])
    return pipe, {"image": [_image(), _image()], "controlnet_conditioning_scale": [1.0, 0.5], **_text()}


def _t2i_adapter() -> tuple[DiffusionPipeline, dict[str, Any]]:
    adapter = randomized(
        T2IAdapter(channels=[24, 48], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    )
    pipe = _sd(StableDiffusionAdapterPipeline, sd15_unet(), adapter=adapter)
    return pipe, {"image": _image(), "height": 16, "width": 16, **_text()}


def _lcm() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = _sd(LatentConsistencyModelPipeline, sd15_unet(time_cond_proj_dim=8))
    pipe.scheduler = LCMScheduler(clip_sample=False)
    return pipe, {"prompt_embeds": _text()["prompt_embeds"], "height": 16, "width": 16, "original_inference_steps": 50}


def _consistency() -> tuple[DiffusionPipeline, dict[str, Any]]:
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return ConsistencyModelPipeline(unet=TINY["consistency model"](), scheduler=scheduler), {"class_labels": 3}


def _unconditional() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return DDIMPipeline(unet=TINY["DDPM"](), scheduler=DDIMScheduler(clip_sample=False)), {"eta": 0.5}


def _animatediff() -> tuple[DiffusionPipeline, dict[str, Any]]:
    adapter = randomized(
        MotionAdapter(
            block_out_channels=(24, 48), motion_layers_per_block=1, motion_norm_num_groups=8,
            motion_num_attention_heads=4, motion_max_seq_length=8,
        )
    )  # fmt: skip
    pipe = AnimateDiffPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=sd15_unet(), motion_adapter=adapter, scheduler=_ddim()
    )
    return pipe, {"num_frames": 3, "height": 16, "width": 16, **_text()}


def _video() -> tuple[DiffusionPipeline, dict[str, Any]]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, projection_dim=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=16,
        )
    )  # fmt: skip
    pipe = StableVideoDiffusionPipeline(
        vae=TINY["VAE of Stable Video Diffusion"](),
        unet=TINY["Stable Video Diffusion"](),
        image_encoder=encoder.eval(),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip
    return pipe, {"image": _image(32), "num_frames": 3, "height": 32, "width": 32, "output_type": "pt"}


def _deepfloyd() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = IFPipeline(
        tokenizer=None, text_encoder=None, unet=TINY["DeepFloyd IF"](), safety_checker=None, feature_extractor=None,
        watermarker=None, requires_safety_checker=False,
        scheduler=DDPMScheduler(variance_type="learned_range", thresholding=True),
    )  # fmt: skip
    return pipe, {"height": 8, "width": 8, **_text(24)}


def _kandinsky() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = KandinskyV22Pipeline(
        unet=TINY["Kandinsky 2.2"](), movq=TINY["MoVQ"](),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )  # fmt: skip
    embeds = {"image_embeds": _randn(1, 24, seed=1), "negative_image_embeds": _randn(1, 24, seed=2)}
    return pipe, {"height": 32, "width": 32, **embeds}


def _audioldm2() -> tuple[DiffusionPipeline, dict[str, Any]]:
    from transformers import GPT2Config, GPT2Model, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

    torch.manual_seed(0)
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5]] * 2,
            normalize_before=False,
        )
    )  # fmt: skip
    # Of these two only dtype and configuration are asked for, since the prompt is given as embeddings.
    language = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, bos_token_id=0, eos_token_id=0))
    t5 = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8))
    pipe = AudioLDM2Pipeline(
        vae=_mono_vae(), text_encoder=None, text_encoder_2=t5, projection_model=None, language_model=language,
        tokenizer=None, tokenizer_2=None, feature_extractor=None, unet=TINY["AudioLDM 2"](), scheduler=_ddim(),
        vocoder=randomized(vocoder),
    )  # fmt: skip
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, 5:] = 0
    return pipe, {
        "prompt_embeds": _randn(1, 7, 24, seed=1), "negative_prompt_embeds": _randn(1, 7, 24, seed=2),
        "generated_prompt_embeds": _randn(1, 8, 16, seed=3),
        "negative_generated_prompt_embeds": _randn(1, 8, 16, seed=4),
        "attention_mask": mask, "negative_attention_mask": torch.ones_like(mask), "audio_length_in_s": 0.016,
    }  # fmt: skip


def _mono_vae() -> Any:
    from diffusers import AutoencoderKL

    return randomized(
        AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(32, 64), norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip


PIPELINES: dict[str, tuple[Callable[[], tuple[DiffusionPipeline, dict[str, Any]]], set[str]]] = {
    # name: pipeline and call; components of which no place runs eager
    "img2img": (_img2img, {"unet", "vae"}),
    "inpaint": (_inpaint, {"unet", "vae"}),
    "InstructPix2Pix": (_pix2pix, {"unet", "vae"}),
    "SDXL": (_sdxl, {"unet", "vae"}),
    "SDXL refiner": (_refiner, {"unet", "vae"}),
    "ControlNet": (_controlnet, {"unet", "vae", "controlnet"}),
    "two ControlNets": (_controlnets, {"unet", "vae", "controlnet"}),
    "T2I adapter": (_t2i_adapter, {"unet", "vae"}),
    "LCM": (_lcm, {"unet", "vae"}),
    "consistency model": (_consistency, {"unet"}),
    "DDIM": (_unconditional, {"unet"}),
    "AnimateDiff": (_animatediff, {"unet", "vae"}),
    "Stable Video Diffusion": (_video, {"unet", "vae"}),
    "DeepFloyd IF": (_deepfloyd, {"unet"}),
    "Kandinsky 2.2": (_kandinsky, {"unet", "movq"}),
    "AudioLDM 2": (_audioldm2, {"unet", "vae"}),
}


def _run(pipe: Any, call: dict[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe(num_inference_steps=4, generator=generator, **{"output_type": "np"} | call)
    value = next(iter(result.values()))
    return torch.stack([torch.as_tensor(v) for v in value]) if isinstance(value, list) else torch.as_tensor(value)


@contextmanager
def _perturbed(model: nn.Module) -> Iterator[None]:
    """Within the block every weight is changed by a millionth, at random."""
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
        yield
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name: str) -> None:
    """Four steps in fp32: kernels served every place that was reached, and the result differs by rounding only.

    How much rounding becomes of it depends on the pipeline: weights changed by 1e-6, some ten roundings, tell.
    """
    build, components = PIPELINES[name]
    pipe, call = build()
    assert components <= {k for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    eager = _run(pipe, call)
    assert torch.isfinite(eager).all()
    assert eager.std() > 0.01, "nothing to see"
    with _perturbed(pipe.unet):
        rounding = (_run(pipe, call) - eager).norm()
    fastdiff.patch(pipe)
    ours = _run(pipe, call)
    assert not torch.equal(ours, eager), "bitwise equal: nothing fused ran"
    assert (ours - eager).norm() <= rounding
    rows = fastdiff.report(pipe).rows
    (steps,) = [row for row in rows if row.path == "scheduler"]
    assert steps.fused or (name == "DeepFloyd IF" and "thresholding" in steps.reason), steps
    for component in components:
        places = [row for row in rows if row.path.startswith(f"{component}.")]
        reached = [row for row in places if row.backend != "not run yet"]
        assert len(reached) >= len(places) / 3
        left = {row.path for row in reached if not row.fused}
        assert left <= {"unet.conv_norm_out"} if name == "DeepFloyd IF" else not left, left
    fastdiff.unpatch(pipe)
    assert torch.equal(_run(pipe, call), eager)

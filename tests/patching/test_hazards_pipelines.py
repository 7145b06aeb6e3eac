"""What pipelines do to their models: adapters loaded from state dicts, conditioning, offloading, switches.

A stock and a patched pipeline go through the same steps, and agree after each.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from actions import CONVOLUTIONS, LINEARS, skip_without_accelerator
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from models import sd15_unet, vae
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import fastdiff
from fastdiff.demo import MODEL_DIR
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of


@functools.cache
def _components() -> dict[str, Any]:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=554, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=552, eos_token_id=553, pad_token_id=553,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    return {
        "vae": vae(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer"),
        "unet": sd15_unet(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": CLIPImageProcessor(size=16, crop_size=16),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
    }


def _pipeline(cls: Any = StableDiffusionPipeline, **more: Any) -> Any:
    pipe = cls(**copy.deepcopy(_components()), requires_safety_checker=False, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _controlled() -> Any:
    control = ControlNetModel.from_unet(_components()["unet"], conditioning_embedding_out_channels=(8, 8)).eval()
    torch.manual_seed(3)
    for parameter in [*control.controlnet_down_blocks.parameters(), *control.controlnet_mid_block.parameters()]:
        nn.init.normal_(parameter, std=0.2)  # they start as zeros
    return _pipeline(StableDiffusionControlNetPipeline, controlnet=control.requires_grad_(False))


def _perturbed() -> Any:
    return _pipeline(StableDiffusionPAGPipeline, pag_applied_layers=["mid", "up_blocks.1"])


def _image() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


# weights to load


def _lora(pipe: Any, seed: int, rank: int = 2, dora: bool = False) -> dict[str, Tensor]:
    """A LoRA for linear layers and convolutions, as PEFT saves it; neither A nor B is zero."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in _components()["unet"].named_modules():
        if not name.endswith((*LINEARS, *CONVOLUTIONS)):
            continue
        rows, *columns = module.weight.shape
        found[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, *columns, generator=generator)
        up = (rows, rank, *[1 for _ in columns[1:]])
        found[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(up, generator=generator)
        if dora:
            found[f"unet.{name}.lora_magnitude_vector"] = (
                1 + torch.rand(rows if len(columns) == 1 else (1, rows, 1, 1), generator=generator)
            )
    return found


def _load_lora(pipe: Any, seed: int = 1, name: str = "first", **options: Any) -> None:
    pipe.load_lora_weights(_lora(pipe, seed, rank=options.pop("rank", 2), dora=options.pop("dora", False)),
                           adapter_name=name, **options)


def _load_second(pipe: Any) -> None:
    _load_lora(pipe, 2, "second", rank=3)
    pipe.set_adapters(["first", "second"], [0.5, 0.8])


def _load_embedding(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    pipe.load_textual_inversion({"<style>": 3 * torch.randn(2, 32, generator=generator)}, token="<style>")


def _load_ip_adapter(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(8)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 5

    processors = [n for n in pipe.unet.attn_processors if "attn2" in n]
    layers = {}
    for i, name in enumerate(processors):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{kind}.weight"] = weight(width, 32)
    projection = {
        "proj.weight": weight(4 * 32, 24), "proj.bias": weight(4 * 32),
        "norm.weight": 1 + weight(32), "norm.bias": weight(32),
    }  # fmt: skip
    pipe.load_ip_adapter(
        {"image_proj": projection, "ip_adapter": layers}, subfolder="", weight_name="", image_encoder_folder=None
    )


@dataclass(frozen=True)
class Step:
    """One thing done to a pipeline.

    Attributes:
        do: does it.
        call: arguments of the call after it.
        eager: pattern of a site's path -> of the reason why it is not fused then; all other sites are.
        changes: whether the output is another than before the step.
    """

    do: Callable[[Any], Any]
    call: dict[str, Any] = field(default_factory=dict)
    eager: dict[str, str] = field(default_factory=dict)
    changes: bool = True


def _sequential(pipe: Any) -> None:
    """By the pipeline's own method, which asks accelerate for the device "cpu:0"; that knows "cpu" only."""
    offload = accelerate.cpu_offload
    with mock.patch.object(accelerate, "cpu_offload", lambda model, _, **options: offload(model, "cpu", **options)):
        pipe.enable_sequential_cpu_offload(device="cpu")


def _group(pipe: Any) -> None:
    cpu = torch.device("cpu")
    with skip_without_accelerator():
        pipe.enable_group_offload(cpu, cpu, offload_type="leaf_level", exclude_modules=["image_encoder"])


IP = {"ip_adapter_image": _image()}
MASKED_IP = IP | {"cross_attention_kwargs": {"ip_adapter_masks": [(_image()[:, :1] > 0.5).float()]}}
IP_EAGER = {"attn2$": "^its processor is IPAdapterAttnProcessor2_0$"}
CONTROL = {"image": _image()}
PAG_EAGER = {r"^unet\.(mid_block|up_blocks\.1).*attn1$": "^its processor is PAG"}
OFFLOADED = {"resnets|attentions.[01]$|transformer_blocks.[01]$|norm_out": "hooks$"}

SEQUENCES: dict[str, tuple[Callable[[], Any], list[Step]]] = {
    "LoRA": (_pipeline, [
        Step(_load_lora),
        Step(lambda p: p.set_adapters("first", 0.5)),
        Step(lambda p: None, {"cross_attention_kwargs": {"scale": 0.3}}),
        Step(_load_second),
        Step(lambda p: p.fuse_lora(adapter_names=["first", "second"]), changes=False),
        Step(lambda p: p.unfuse_lora(), changes=False),
        Step(lambda p: p.delete_adapters("second")),
        Step(lambda p: p.disable_lora()),
        Step(lambda p: p.enable_lora()),
        Step(lambda p: p.unload_lora_weights()),
    ]),
    "LoRA, hot-swapped": (_pipeline, [
        Step(_load_lora),
        Step(functools.partial(_load_lora, seed=2, hotswap=True)),
        Step(lambda p: p.unload_lora_weights()),
    ]),
    "LoRA, hot-swapped for another rank": (_pipeline, [
        Step(lambda p: p.enable_lora_hotswap(target_rank=4), changes=False),
        Step(_load_lora),
        Step(functools.partial(_load_lora, seed=2, rank=4, hotswap=True)),
    ]),
    "DoRA": (_pipeline, [
        Step(functools.partial(_load_lora, dora=True)),
        Step(lambda p: p.fuse_lora(), changes=False),
        Step(lambda p: p.unfuse_lora(), changes=False),
        Step(lambda p: p.unload_lora_weights()),
    ]),
    "textual inversion": (_pipeline, [
        Step(lambda p: None, {"prompt": "a <style> seven"}),
        Step(_load_embedding, {"prompt": "a <style> seven"}),
        Step(lambda p: p.unload_textual_inversion(), {"prompt": "a <style> seven"}),
    ]),
    "IP-Adapter": (_pipeline, [
        Step(_load_ip_adapter, IP, IP_EAGER),
        Step(lambda p: p.set_ip_adapter_scale(0.4), IP, IP_EAGER),
        Step(lambda p: None, MASKED_IP, IP_EAGER),
        Step(lambda p: p.unload_ip_adapter()),
    ]),
    "ControlNet": (_controlled, [
        Step(lambda p: None, CONTROL),
        Step(lambda p: None, {**CONTROL, "controlnet_conditioning_scale": 0.5}),
        Step(lambda p: None, {**CONTROL, "guess_mode": True}),
    ]),
    "PAG": (_perturbed, [
        Step(lambda p: None, {"pag_scale": 3.0}, PAG_EAGER),
        Step(lambda p: None, {"pag_scale": 0.0}),
    ]),
    "FreeU": (_pipeline, [
        Step(lambda p: p.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)),
        Step(lambda p: p.disable_freeu()),
    ]),
    "attention slicing": (_pipeline, [
        Step(lambda p: p.enable_attention_slicing(1), {}, {"unet.*attn": "SlicedAttnProcessor"}, changes=False),
        Step(lambda p: p.disable_attention_slicing(), changes=False),
    ]),
    "fused projections": (_pipeline, [
        Step(lambda p: p.fuse_qkv_projections(), {}, {"unet.*attn": "FusedAttnProcessor2_0"}, changes=False),
        Step(lambda p: p.unfuse_qkv_projections(), changes=False),
    ]),
    "model offload": (_pipeline, [
        Step(lambda p: p.enable_model_cpu_offload(device="cpu"), changes=False),
        Step(lambda p: p.remove_all_hooks(), changes=False),
    ]),
    "sequential offload": (_pipeline, [
        Step(_sequential, {}, OFFLOADED, changes=False),
        Step(lambda p: p.remove_all_hooks(), changes=False),
    ]),
    "group offload": (_pipeline, [
        Step(_group, {}, OFFLOADED, changes=False),
        Step(_load_lora, {}, OFFLOADED),
    ]),
}  # fmt: skip


#: Arguments of the call before all steps.
BEFORE: dict[str, Any] = {
    "ControlNet": {**CONTROL, "controlnet_conditioning_scale": 0.0},
    "PAG": {"pag_scale": 0.0},
}


def _run(pipe: Any, **arguments: Any) -> Tensor:
    call = {"prompt": "a seven", "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(**call | arguments, generator=torch.Generator().manual_seed(0)).images


@functools.cache
def _stock(name: str) -> list[Tensor]:
    make, steps = SEQUENCES[name]
    pipe, outputs = make(), []
    outputs.append(_run(pipe, **BEFORE.get(name, {})))
    for step in steps:
        step.do(pipe)
        outputs.append(_run(pipe, **step.call))
    return outputs


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("first", ["patch", "step"])
def test_steps(first: str, name: str) -> None:
    make, steps = SEQUENCES[name]
    _, *expected = _stock(name)
    pipe = make()
    if first == "patch":
        fastdiff.patch(pipe)
    for i, step in enumerate(steps):
        step.do(pipe)
        if i == 0 and first == "step":
            fastdiff.patch(pipe)
        got, want = _run(pipe, **step.call), expected[i]
        assert (got - want).norm() <= 1e-4 * want.norm(), (i, ((got - want).norm() / want.norm()).item())
        _check_report(pipe, step)
    fastdiff.unpatch(pipe)
    assert torch.equal(_run(pipe, **steps[-1].call), expected[-1])
    assert patch_of(pipe.unet) is None
    assert not any(site_of(m) for m in pipe.unet.modules())


def _check_report(pipe: Any, step: Step) -> None:
    rows = [r for r in fastdiff.report(pipe).rows if r.path.startswith("unet.") or r.path == "scheduler"]
    assert len(rows) > 20
    for row in rows:
        reasons = [reason for path, reason in step.eager.items() if re.search(path, row.path)]
        if reasons:
            assert not row.fused, row
            assert re.search(reasons[0], row.reason), row
        else:
            assert row.fused, row


@pytest.mark.parametrize("name", SEQUENCES)
def test_steps_change_something(name: str) -> None:
    """Else the test above would compare nothing."""
    outputs = _stock(name)
    for i, step in enumerate(SEQUENCES[name][1]):
        difference = (outputs[i + 1] - outputs[i]).norm() / outputs[i].norm()
        assert (difference > 1e-3) if step.changes else (difference < 1e-4), (i, difference.item())

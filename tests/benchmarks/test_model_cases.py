"""Every model case is made and called: denoisers and decoders at their real sizes without memory, pipelines tiny."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import benchmark_scripts
import model_cases
import pytest
import torch
from _harness import Rates
from extent import ALL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.backends import kernels_of

models = benchmark_scripts.script("models")
HAS_CPU = any(k.backend == "cpu" for k in kernels_of("geglu"))

#: What a case gives, and where it is known, its 10^12 FLOPs (the estimates that the project's targets were made with).
OUTPUTS: dict[str, tuple[tuple[int, ...], float | None]] = {
    "SD1.5 U-Net 256x256 batch 2": ((2, 4, 32, 32), None),
    "DiT-XL/2 256x256 batch 2": ((2, 8, 32, 32), 0.47),
    "SD VAE decode 256x256": ((1, 3, 256, 256), None),
    "SD VAE decode 512x512": ((1, 3, 512, 512), None),
    "Flux, 3 blocks, 512x512": ((1, 1024, 64), None),
    "Flux, 2 blocks, 1024x1024": ((1, 4096, 64), None),
    "Wan 1.3B, 2 blocks, 17 frames 240x416": ((1, 16, 5, 30, 52), None),
    "SD1.5 U-Net 512x512 batch 2": ((2, 4, 64, 64), 1.61),
    "SDXL U-Net 1024x1024 batch 2": ((2, 4, 128, 128), 13.5),
    "SD VAE decode 1024x1024": ((1, 3, 1024, 1024), 10.5),
    "DiT-XL/2 512x512 batch 2": ((2, 8, 64, 64), 2.10),
    "SDXL U-Net 256x256 batch 1": ((1, 4, 32, 32), None),
    "SD3-medium 1024x1024 batch 2": ((2, 16, 128, 128), 17.8),
    "Flux-dev 1024x1024 batch 1": ((1, 4096, 64), 74.4),
    "SD3 and Flux VAE decode 1024x1024": ((1, 3, 1024, 1024), 10.5),
    "Wan 1.3B 832x480, 81 frames, batch 1": ((1, 16, 21, 60, 104), None),
    "Wan VAE decode 832x480, 81 frames": ((1, 3, 81, 480, 832), None),
}
#: Of models that other cases run too; seconds each, so with FASTDIFF_TEST_ALL=1 only.
LONG = ("SDXL U-Net 256x256 batch 1", "Wan VAE decode 832x480, 81 frames", "DiT-XL/2 pipeline 512x512, 10 steps",
        "SD1.5 pipeline 256x256, 2 steps")  # fmt: skip
#: Pipelines, and the parameters of their denoiser, 10^9.
PIPELINES = {
    "SD1.5 pipeline 256x256, 2 steps": 0.860,
    "SD1.5 pipeline 512x512, 10 steps": 0.860,
    "DiT-XL/2 pipeline 256x256, 10 steps": 0.750,
    "DiT-XL/2 pipeline 512x512, 10 steps": 0.750,  # in Diffusers every block embeds time and label
    "SDXL pipeline 1024x1024, 10 steps": 2.567,
    "SD3-medium pipeline 1024x1024, 10 steps": 2.03,
    "Flux-dev pipeline 1024x1024, 4 steps": 11.9,
    "Wan 1.3B pipeline 832x480, 81 frames, 2 steps": 1.42,
}
#: Changes that make the models tiny, but leave what their inputs must fit.
TINY: dict[str, dict[str, Any]] = {
    "SD15": {"block_out_channels": (32,) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "SDXL": {"block_out_channels": (32,) * 3, "layers_per_block": 1, "transformer_layers_per_block": 1,
             "attention_head_dim": (1, 2, 4)},
    "VAE": {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "VAE16": {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 8},
    "WAN_VAE": {"base_dim": 8, "num_res_blocks": 1},
    "DIT": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
    "SD3": {"num_attention_heads": 1, "num_layers": 2, "caption_projection_dim": 64},
    "FLUX": {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 1},
    "WAN": {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64},
}  # fmt: skip
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "num_frames": 5}


def test_all_cases_are_listed() -> None:
    names = [case.name for case in model_cases.cases()]
    assert set(names) == OUTPUTS.keys() | PIPELINES.keys() and len(names) == len(set(names))


@pytest.mark.parametrize("name", [n for n in OUTPUTS if ALL or n not in LONG])
def test_real_sizes_without_memory(name: str) -> None:
    """On the meta device: the inputs are right, the output is of the real size, and the work is what it should be."""
    case = model_cases.named(name)
    model, inputs = case.make("meta", torch.bfloat16)
    shape, work = OUTPUTS[name]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        counter = stack.enter_context(FlopCounterMode(display=False)) if work else None
        output = case.call(model, **inputs)
    assert isinstance(output, Tensor) and tuple(output.shape) == shape
    if counter is not None and work is not None:
        assert counter.get_total_flops() == pytest.approx(work * 1e12, rel=0.05)


def tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The case with a small model, and small pictures where their size is an argument."""
    for config, changes in TINY.items():
        monkeypatch.setattr(model_cases, config, getattr(model_cases, config) | changes)
    case = model_cases.named(name)

    def inputs() -> dict[str, Any]:
        found = case.inputs()
        return found | {name: value for name, value in SMALL.items() if name in found}

    return replace(case, inputs=inputs)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_have_their_published_models(name: str) -> None:
    """Made where there is no memory; the schedulers' tables are nevertheless on the CPU, in fp32."""
    pipe, _ = model_cases.named(name).make("meta", torch.bfloat16)
    denoiser = next(part for role, part in pipe.components.items() if role in ("unet", "transformer"))
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(PIPELINES[name] * 1e9, rel=0.01)
    tables = [value for value in vars(pipe.scheduler).values() if isinstance(value, Tensor)]
    assert tables and all(t.device.type == "cpu" and t.dtype != torch.bfloat16 for t in tables)


@pytest.mark.skipif(not HAS_CPU, reason="no CPU kernels")
@pytest.mark.parametrize("name", [n for n in PIPELINES if ALL or n not in LONG])
def test_pipelines_are_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark itself, on a tiny model: pictures come out, patched and stock agree."""
    case = tiny(name, monkeypatch)
    pictures: list[Tensor] = []

    def call(pipe: Any, **inputs: Any) -> Tensor:
        pictures.append(case.call(pipe, **inputs))
        return pictures[-1]

    options = argparse.Namespace(device="cpu", compile=False, rounds=1, row_s=None, allocator="stock")
    rates = Rates("cpu")
    rates._rates = {"copy": 1e9, "fp32": 1e11}
    with torch.no_grad():
        row = models.measure(replace(case, call=call), "fp32", options, rates)
    assert [t.provider for t in row.timings] == ["eager", "fastdiff"] and row.extra["wrong"] == []
    assert isinstance(pictures[0], Tensor) and pictures[0].isfinite().all() and pictures[0].std() > 0
    side = 64 if not name.startswith("DiT") else int(name.split("x")[-1].split(",")[0])
    frames = (1, 5, 3) if name.startswith("Wan") else (1, 3)
    assert tuple(pictures[0].shape) == (*frames, side, side)


def test_compiled_side_is_the_denoiser_and_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run compiled on that side, and stock on the others."""
    modes: list[tuple[str, str]] = []

    def compile_(call: Callable[..., Any], mode: str, dynamic: bool) -> Callable[..., Any]:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            modes.append((type(call.__self__).__name__, mode))  # type: ignore[attr-defined]
            return call(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    case = tiny("SD1.5 pipeline 256x256, 2 steps", monkeypatch)
    pipe, inputs = case.make("cpu", torch.float32)
    sides = models.Sides(case, pipe, inputs, "fp32", "cpu", True)
    ran = {}
    with torch.no_grad():
        for side in ("torch.compile", "eager", "torch.compile max-autotune", "fastdiff"):
            sides.prepare[side]()
            modes.clear()
            sides.call()
            ran[side] = list(dict.fromkeys(modes))
    of = ("UNet2DConditionModel", "Decoder")
    assert ran == {
        "torch.compile": [(name, "default") for name in of],
        "eager": [],
        "torch.compile max-autotune": [(name, "max-autotune") for name in of],
        "fastdiff": [],
    }

"""Whole models of the real sizes with random weights: eager and patched side by side in one process.

    python benchmarks/models.py [--filter TEXT] [--tuned-allocator] [--save]

One model object serves all sides: it is patched and unpatched between samples (outside the clock), so weights, memory
and thermal state are the same. In bf16 it is also timed with ``prepack_weights=True``. The stock and the raised
allocator thresholds need separate processes; the speed-up of "patched with thresholds raised" over "eager stock" is
computed from the two by ``report.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _harness import Row, compare, result_file, save
from rich.console import Console
from rich.table import Table

import fastdiff
from fastdiff.patching import patch_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED = "fastdiff, packed weights"


@dataclass
class ModelCase:
    """One forward of one model.

    Attributes:
        build: returns the model in fp32 on the CPU, in eval mode.
        inputs: dtype -> keyword arguments of ``call``.
        call: (model, **inputs) -> the output tensor.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    call: Callable[..., torch.Tensor]
    targets: dict[str, float]


def _sd15_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )


def _sdxl_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def _dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
    )


def _flux_blocks() -> torch.nn.Module:
    """One double and two single blocks, of the whole model's 19 and 38."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)


def _flux_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """512 x 512 pixels, 128 tokens of text."""
    axes = torch.zeros(1), torch.arange(32.0), torch.arange(32.0)
    return {
        "hidden_states": torch.randn(1, 1024, 64).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 128, 4096).to(dtype),
        "pooled_projections": torch.randn(1, 768).to(dtype),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(128, 3),
    }


def _wan_blocks() -> torch.nn.Module:
    """Two blocks of Wan 2.1 with 1.3 billion parameters."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)


def _wan_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """5 latent frames of 240 x 416 pixels: 1950 tokens, and 512 of text."""
    return {
        "hidden_states": torch.randn(1, 16, 5, 30, 52).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 4096).to(dtype),
    }


def _unet_inputs(batch: int, size: int, width: int) -> Callable[[torch.dtype], dict[str, Any]]:
    return lambda dtype: {
        "sample": torch.randn(batch, 4, size, size).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, width).to(dtype),
    }


def cases() -> list[ModelCase]:
    """The models of the README."""

    def denoise(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
        return model(**inputs, return_dict=False)[0]

    def sdxl_inputs(dtype: torch.dtype) -> dict[str, Any]:
        added = {"text_embeds": torch.randn(1, 1280).to(dtype), "time_ids": torch.zeros(1, 6)}
        return {**_unet_inputs(1, 32, 2048)(dtype), "added_cond_kwargs": added}

    return [
        ModelCase(
            "SD1.5 U-Net 256x256 batch 2",
            _sd15_unet,
            _unet_inputs(2, 32, 768),
            denoise,
            {"fp32": 1.05, "bf16": 1.12},
        ),
        ModelCase("SDXL U-Net 256x256 batch 1", _sdxl_unet, sdxl_inputs, denoise, {}),
        ModelCase(
            "SD VAE decode 512x512",
            _vae,
            lambda dtype: {"z": torch.randn(1, 4, 64, 64).to(dtype)},
            lambda model, z: model.decode(z, return_dict=False)[0],
            {"fp32": 1.25, "bf16": 1.25},
        ),
        ModelCase(
            "DiT-XL/2 256x256 batch 2",
            _dit,
            lambda dtype: {
                "hidden_states": torch.randn(2, 4, 32, 32).to(dtype),
                "timestep": torch.tensor([500, 500]),
                "class_labels": torch.tensor([1, 1000]),
            },
            denoise,
            {"fp32": 1.15, "bf16": 1.15},
        ),
        ModelCase("Flux, 3 blocks, 512x512", _flux_blocks, _flux_inputs, denoise, {"bf16": 1.15}),
        ModelCase("Wan 1.3B, 2 blocks, 17 frames 240x416", _wan_blocks, _wan_inputs, denoise, {"bf16": 1.15}),
    ]


def _in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """As ``from_pretrained`` leaves it: some modules (Wan's norms and time embedding) stay in fp32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    torch.nn.Module.to(model, dtype)  # Diffusers' own warns of these
    for path, parameter in model.named_parameters():
        if kept.intersection(path.split(".")):
            parameter.data = parameter.data.float()
    return model


def run_case(case: ModelCase, dtype_name: str, rounds: int, allocator: str) -> Row:
    """Check the patched output against eager, then time both sides in turns."""
    torch.manual_seed(0)
    model = _in_dtype(case.build().eval(), DTYPES[dtype_name])
    inputs = case.inputs(DTYPES[dtype_name])

    def forward() -> torch.Tensor:
        return case.call(model, **inputs)

    def stock() -> None:
        if patch_of(model) is not None:
            fastdiff.unpatch(model)

    def packed() -> None:
        fastdiff.patch(model, prepack_weights=True)
        forward()  # packs

    eager_output = forward()
    start = time.perf_counter()
    fastdiff.patch(model)
    patch_ms = (time.perf_counter() - start) * 1e3
    difference = ((forward().float() - eager_output.float()).norm() / eager_output.float().norm()).item()
    del eager_output
    # What is done before each sample, outside of the clock.
    providers = {
        "eager": stock,
        "fastdiff": lambda: fastdiff.patch(model),
        PACKED: packed,
    }
    if dtype_name == "fp32":  # refused there
        del providers[PACKED]
    timings = compare(
        dict.fromkeys(providers, forward), rounds=rounds, min_sample_s=0.0, warmup=0, before=providers
    )  # fmt: skip
    extra = {"patch_ms": round(patch_ms, 1), "relative_difference": difference}
    return Row(case.name, dtype_name, allocator, timings, target=case.targets.get(dtype_name), extra=extra)


def show(rows: list[Row]) -> Table:
    """Ratios of one process."""
    table = Table(title="eager time / patched time, same process (95 % interval)")
    for column in (
        "model",
        "dtype",
        "allocator",
        "eager ms",
        "patched ms",
        "speed-up",
        "packed",
        "target",
        "patch() ms",
        "diff",
    ):
        table.add_column(column, justify="left" if column in ("model", "dtype", "allocator") else "right")
    for row in rows:
        eager, ours, *packed = row.timings
        color = "red" if row.target and row.allocator == "stock" and ours.ratio < row.target else "green"
        table.add_row(
            row.name,
            row.dtype,
            row.allocator,
            f"{eager.median_ms:.0f}",
            f"{ours.median_ms:.0f}",
            f"[{color}]{ours.ratio:.2f}[/] ({ours.ratio_low:.2f}-{ours.ratio_high:.2f})",
            *([f"{t.ratio:.2f} ({t.ratio_low:.2f}-{t.ratio_high:.2f})" for t in packed] or [""]),
            f"{row.target:g}" if row.target else "",
            f"{row.extra['patch_ms']:.0f}",
            f"{row.extra['relative_difference']:.1e}",
        )
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--filter", default="", help="only models whose name contains this text")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--tuned-allocator", action="store_true", help="call fastdiff.tune_cpu_allocator() first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>.json")
    parser.add_argument("--device-name", default=None, help="name of the result file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    allocator = "stock"
    if options.tuned_allocator:
        fastdiff.tune_cpu_allocator()
        allocator = "tuned"
    console = Console(width=150)
    rows: list[Row] = []
    with torch.no_grad():
        for case in cases():
            if options.filter.lower() not in case.name.lower():
                continue
            for dtype_name in options.dtypes:
                rows.append(run_case(case, dtype_name, options.rounds, allocator))
                console.print(show(rows[-1:]))
    if options.save:
        path = result_file(options.device_name)
        save("models", rows, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Cold start: seconds from the first import to the first picture, and what a new size or another LoRA costs then.

    python -m fastdiff bench cold-start [--device cuda] [--channels 64 128 256 256] [--size 128] [--save]

Every sample is a new process with empty compilers' caches: it imports, builds a Stable Diffusion pipeline with random
weights and two LoRAs, patches or compiles it, and draws. On a GPU the pipeline has SD1.5's sizes, on a CPU a small
U-Net and VAE of the same structure, unless told otherwise. Sides take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

BEGIN = time.perf_counter()  # before any import that costs

PHASES = ("import", "build", "prepare", "first picture", "second picture", "new size", "other LoRA")
#: What is waited for before the first picture is there.
UNTIL_FIRST = PHASES[:4]


def child(options: argparse.Namespace) -> dict[str, object]:
    """One cold start: the seconds of every phase, and what the pictures amount to."""
    import torch
    from _children import patch_options
    from diffusers import StableDiffusionPipeline  # noqa: F401 - part of what is imported
    from model_cases import SD15, VAE, generate, made_on, parts_of, prompt_inputs, stable_diffusion
    from peft import LoraConfig

    if options.side.startswith("fastdiff"):
        import fastdiff
    seconds, since = {}, BEGIN

    def lap(phase: str) -> None:
        nonlocal since
        if options.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[phase], since = now - since, now

    if options.threads:
        torch.set_num_threads(options.threads)
    lap("import")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    unet, vae = dict(SD15), dict(VAE)
    if options.channels:
        unet["block_out_channels"] = tuple(options.channels)
        vae["block_out_channels"] = tuple(options.channels)
    torch.manual_seed(0)
    with made_on(options.device, dtype):
        pipe = stable_diffusion(unet, vae)
        inputs = prompt_inputs(unet["cross_attention_dim"], options.size, options.steps)
        for name in ("one", "two"):
            pipe.unet.add_adapter(LoraConfig(r=8, init_lora_weights=False, target_modules=["to_q", "to_v"]), name)
    pipe.unet.set_adapter("one")
    for part in parts_of(pipe):
        part.eval().requires_grad_(False)
    lap("build")
    if options.side.startswith("fastdiff"):
        fastdiff.patch(pipe, **patch_options(options.side))
    elif options.side == "torch.compile":
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    lap("prepare")
    pictures = []

    def draw(phase: str, **changes: int) -> None:
        with torch.no_grad():
            pictures.append(generate(pipe, **inputs | changes).float().cpu())
        lap(phase)

    draw("first picture")
    draw("second picture")
    draw("new size", height=options.size + 64)
    pipe.unet.set_adapter("two")
    draw("other LoRA")
    return {"seconds": seconds, "pictures": [[p.mean().item(), p.std().item()] for p in pictures]}


def gpu_targets(device: str) -> list[dict[str, object]]:
    """On a GPU, in seconds; drawing is part of a change of size or LoRA."""
    from _targets import Target, as_extra

    changes = (Target("seconds", 0.5, about=phase) for phase in ("new size", "other LoRA"))
    return as_extra(Target("more seconds", 3.0), *changes) if device == "cuda" else []


def name_of(options: argparse.Namespace) -> str:
    """Of the row."""
    unet = f"U-Net {options.channels}" if options.channels else "SD1.5"
    return f"Stable Diffusion, {unet}, {options.size}x{options.size}, {options.steps} steps"


def measure(options: argparse.Namespace, dtype: str) -> object:
    """All sides in turns."""
    from _children import ChildFailed, run_child
    from _harness import median_interval
    from _results import Row, Timing

    samples: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    pictures: dict[str, list[list[float]]] = {}
    absent: dict[str, str] = {}
    for _ in range(options.rounds):
        for side in [s for s in options.sides if s not in absent]:
            arguments = ["--side", side, "--dtype", dtype, "--device", options.device, "--size", str(options.size),
                         "--steps", str(options.steps), "--threads", str(options.threads or 0)]  # fmt: skip
            if options.channels:
                arguments += ["--channels", *map(str, options.channels)]
            try:
                result = run_child("cold_start.py", arguments)
            except ChildFailed as error:
                absent[side] = str(error)
                continue
            samples[side].append(result["seconds"])
            pictures[side] = result["pictures"]
    present = {side: found for side, found in samples.items() if found and side not in absent}
    if "eager" not in present:
        raise ChildFailed(f"eager: {absent['eager']}")
    total = {side: [sum(s[p] for p in UNTIL_FIRST) * 1e3 for s in found] for side, found in present.items()}
    timings = []
    for side, times in total.items():
        ratios = [e / t for e, t in zip(total["eager"], times, strict=True)]
        median, low, high = median_interval(times)
        timings.append(Timing(side, median, *median_interval(ratios), len(times), low, high))
    phases = {
        side: {p: list(median_interval([s[p] for s in found])) for p in PHASES} for side, found in present.items()
    }
    wrong = [
        f"{side}: pictures have (mean, deviation) {pictures[side]}, eager's {pictures['eager']}"
        for side in present
        if any(abs(a - b) > 0.02 for p, q in zip(pictures[side], pictures["eager"], strict=True)
               for a, b in zip(p, q, strict=True))
    ]  # fmt: skip
    extra = {"phases": phases, "left_out": absent, "wrong": wrong, "targets": gpu_targets(options.device)}
    return Row(name_of(options), dtype, "stock", timings, extra=extra)


def show(rows: list) -> object:
    """Seconds of every phase."""
    from rich.table import Table

    table = Table(title="seconds, medians")
    for column in ("pipeline", "dtype", "side", "until the first picture", *PHASES):
        table.add_column(column)
    for row in rows:
        for timing in row.timings:
            phases = row.extra["phases"][timing.provider]
            table.add_row(row.name, row.dtype, timing.provider, f"{timing.median_ms / 1e3:.2f}",
                          *(f"{phases[p][0]:.2f}" for p in PHASES))  # fmt: skip
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sizes = parser.add_argument_group("the pipeline")
    sizes.add_argument("--channels", nargs=4, type=int, default=None, metavar="C",
                       help="of U-Net and VAE, multiples of 32 (default: SD1.5; on a CPU 64 128 256 256)")  # fmt: skip
    sizes.add_argument("--size", type=int, default=None, help="of the picture (default: 512; on a CPU 128)")
    sizes.add_argument("--steps", type=int, default=2, help="(default: %(default)s)")
    if "--child" in sys.argv:
        parser.add_argument("--child", action="store_true")
        for option in ("--side", "--dtype", "--device"):
            parser.add_argument(option, required=True)
        parser.add_argument("--threads", type=int, required=True)
        print(json.dumps(child(parser.parse_args())))
        return 0

    from functools import partial

    from _runner import Job, Store, add_options, patched_sides, prepare, run_section, wanted

    add_options(parser, rounds=5, allocator=False)  # raising it would import fastdiff on all sides
    sizes.add_argument("--sides", nargs="+", default=None, metavar="SIDE",
                       help='eager, fastdiff, "fastdiff triton", "fastdiff cuda", torch.compile')  # fmt: skip
    options = parser.parse_args()
    prepare(options)
    options.channels = options.channels or ([64, 128, 256, 256] if options.device == "cpu" else None)
    options.size = options.size or (128 if options.device == "cpu" else 512)
    options.sides = options.sides or ["eager", *patched_sides(options.device), "torch.compile"]
    if options.size % 64 or any(c % 32 for c in options.channels or ()):
        parser.error(f"--size is {options.size} and --channels {options.channels}; expected multiples of 64 and 32")
    if "eager" not in options.sides:
        parser.error("--sides: eager is what the others are compared with")
    jobs = [
        Job(name_of(options), dtype, "stock", partial(measure, options, dtype))
        for dtype in options.dtypes
        if wanted(name_of(options), options)
    ]
    return run_section(Store("cold start", options, options.sides), jobs, options, show)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m fastdiff demo``: the same pictures with and without ``fastdiff.patch``, and what it took."""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.backends import BACKENDS

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_AMPLIFY = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", default=None, help="a Diffusers pipeline, by name or path (default: shipped demo)")
    parser.add_argument("--prompt", action="append", help="a prompt; repeat it for more pictures")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--backend", default=None, choices=BACKENDS, help="the only one whose kernels may serve; on a "
                        "GPU that was not measured none does unless asked for")  # fmt: skip
    parser.add_argument("--dtype", default="fp32", choices=list(_DTYPES))
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--scheduler", default=None, help="a Diffusers scheduler class, e.g. EulerDiscreteScheduler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats", type=int, default=None, help="timed runs of each side (default: 5; other models 1)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture to write (default: demo.png)")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the process's exit code."""
    from rich.console import Console
    from rich.progress import Progress

    import fastdiff

    console = Console()
    try:
        pipe = load(args)
    except (ImportError, OSError, ValueError, AttributeError) as exc:
        print(f"fastdiff demo: {exc}", file=sys.stderr)
        return 2
    pipe.set_progress_bar_config(disable=True)
    repeats = args.repeats or (5 if args.model is None else 1)
    kwargs = call_arguments(pipe, args)

    times: dict[str, list[float]] = {"eager": [], "fastdiff": []}
    images: dict[str, np.ndarray] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generating", total=2 * (repeats + 1))
        # In turns, so that a slow moment of the machine hits both sides; round 0 warms up.
        for turn in range(repeats + 1):
            images["eager"], seconds = _generate(pipe, kwargs, args.seed, args.device)
            if turn:
                times["eager"].append(seconds)
            progress.advance(task)
            with fastdiff.patched(pipe, backend=args.backend):
                images["fastdiff"], seconds = _generate(pipe, kwargs, args.seed, args.device)
                report = fastdiff.report(pipe)
            if turn:
                times["fastdiff"].append(seconds)
            progress.advance(task)

    console.print(report)
    difference = np.abs(images["eager"] - images["fastdiff"])
    _picture(images["eager"], images["fastdiff"], difference).save(args.out)
    eager, ours = (statistics.median(times[side]) for side in ("eager", "fastdiff"))
    ratios = [e / f for e, f in zip(times["eager"], times["fastdiff"], strict=True)]
    console.print(
        f"\n{len(images['eager'])} picture(s), {args.steps} steps, {args.dtype}, {args.device}: "
        f"eager [bold]{eager:.2f} s[/], fastdiff [bold]{ours:.2f} s[/] "
        f"([bold]{statistics.median(ratios):.2f}x[/], median of {len(ratios)} pair(s))"
    )
    console.print(
        f"largest pixel difference {difference.max() * 255:.2f} of 255, mean {difference.mean() * 255:.4f} of 255\n"
        f"wrote {args.out} (eager, fastdiff, difference x{_AMPLIFY})"
    )
    return 0


def load(args: argparse.Namespace) -> Any:
    """The pipeline that ``--model``, ``--dtype``, ``--device`` and ``--scheduler`` name.

    Raises:
        ValueError: if ``--scheduler`` is no Diffusers scheduler.
    """
    dtype = _DTYPES[args.dtype]
    if args.model is None:
        from fastdiff.demo import load_pipeline

        pipe = load_pipeline(torch_dtype=dtype, device=args.device)
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    if args.scheduler is not None:
        import diffusers

        cls = getattr(diffusers, args.scheduler, object)
        from_config = getattr(cls, "from_config", None)
        if from_config is None or not issubclass(cls, diffusers.SchedulerMixin):
            raise ValueError(f"--scheduler is {args.scheduler!r}; expected the name of a Diffusers scheduler class")
        pipe.scheduler = from_config(pipe.scheduler.config)
    return pipe


def call_arguments(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that this pipeline's ``__call__`` takes, of those that we have."""
    accepted = inspect.signature(pipe.__call__).parameters
    kwargs: dict[str, Any] = {"num_inference_steps": args.steps, "output_type": "np"}
    if "prompt" in accepted:
        kwargs["prompt"] = args.prompt or _default_prompts(args)
        if args.model is None:
            from fastdiff.demo import GUIDANCE_SCALE

            kwargs["guidance_scale"] = GUIDANCE_SCALE
    elif "class_labels" in accepted:
        kwargs["class_labels"] = [1, 2]
    return {name: value for name, value in kwargs.items() if name in accepted}


def _default_prompts(args: argparse.Namespace) -> list[str]:
    if args.model is not None:
        return ["a photograph of an astronaut riding a horse"]
    from fastdiff.demo import PROMPTS

    return list(PROMPTS)


def _generate(pipe: Any, kwargs: dict[str, Any], seed: int, device: str) -> tuple[np.ndarray, float]:
    """Pictures as (N, H, W, 3) in [0, 1], and seconds."""
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    images = pipe(**kwargs, generator=generator).images
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return np.asarray(images, dtype=np.float32), time.perf_counter() - start


def _picture(eager: np.ndarray, ours: np.ndarray, difference: np.ndarray) -> Any:
    """One labelled row per side, one column per picture; small pictures are enlarged."""
    from PIL import Image, ImageDraw

    count, height, width, _ = eager.shape
    zoom = max(1, 96 // height)
    label, gap = 22, 4
    canvas = Image.new("RGB", (count * (width * zoom + gap) + gap, 3 * (height * zoom + label)), "white")
    draw = ImageDraw.Draw(canvas)
    rows = [("eager", eager), ("fastdiff", ours), (f"difference x{_AMPLIFY}", difference * _AMPLIFY)]
    for r, (name, pictures) in enumerate(rows):
        top = r * (height * zoom + label)
        draw.text((gap, top + 5), name, fill="black")
        for i, picture in enumerate(pictures):
            pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
            tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            canvas.paste(tile, (gap + i * (width * zoom + gap), top + label))
    return canvas

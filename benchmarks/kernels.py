"""Kernel microbenchmarks on layer shapes of real models: fastdiff against eager and torch.compile.

    python benchmarks/kernels.py [--device cuda] [--filter TEXT] [--compile] [--tuned-allocator] [--save]

Outputs are freshly allocated on all sides, as in a model. ``--tuned-allocator`` raises glibc's thresholds for the
whole process first (both sides). Every case is checked against fp64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from _harness import SAMPLES, Row, compare, copy_bandwidth, matmul_rate, result_file, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastdiff
from fastdiff import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """One op on one shape.

    Attributes:
        make: dtype -> the arguments of ``eager`` and ``ours``.
        targets: dtype name -> the eager/ours ratio this project set itself.
        flops: 0 for memory-bound ops.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    targets: dict[str, float]
    flops: int = 0
    big: bool = False
    tuned_targets: dict[str, float] | None = None  # with allocator thresholds raised, if they differ


def _cl(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _group_norm(shape: tuple[int, ...], channels_last: bool, targets: tuple[float, float], temb: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x = torch.randn(shape).to(dtype)
        c = shape[1]
        w, b = (torch.randn(c) * 0.1 + 1).to(dtype), torch.randn(c).to(dtype)
        t = torch.randn(shape[0], c).to(dtype) if temb else None
        return (_cl(x) if channels_last else x), w, b, t

    def eager(x: Tensor, w: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
        if t is not None:
            x = x + t[:, :, None, None]
        return F.silu(F.group_norm(x, 32, w, b, 1e-5))

    def ours(x: Tensor, w: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
        return ops.group_norm_silu(x, 32, w, b, 1e-5, temb=t)

    name = f"{'temb + ' if temb else ''}GroupNorm + SiLU {list(shape)} {'NHWC' if channels_last else 'NCHW'}"
    big = shape[-1] == 512
    tuned = _targets((2.5, 2.5)) if big else None
    return Case(name, make, eager, ours, _targets(targets), big=big, tuned_targets=tuned)


def _rms_norm(shape: tuple[int, ...]) -> Case:
    """The norm of Wan's VAE, on frames of 480 x 832 and their halves."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(shape).to(dtype), (torch.randn(shape[1]) * 0.1 + 1).to(dtype)

    def eager(x: Tensor, gamma: Tensor) -> Tensor:
        normalized = F.normalize(x.float() if x.dtype != torch.float64 else x, dim=1).to(x.dtype)
        return F.silu(normalized * shape[1] ** 0.5 * gamma.view(-1, 1, 1, 1))

    def ours(x: Tensor, gamma: Tensor) -> Tensor:
        return ops.rms_norm_silu(x, gamma, None, 1e-12, clamp=True)

    return Case(f"RMSNorm over channels + SiLU {list(shape)}", make, eager, ours, {}, big=True)


def _modulate(shape: tuple[int, int, int], targets: tuple[float, float]) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        b, _, d = shape
        scale, shift = torch.randn(b, 2 * d).to(dtype).chunk(2, dim=1)
        return torch.randn(shape).to(dtype), scale, shift

    def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (shape[2],), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.adaln_modulate(x, scale, shift, eps=1e-6)

    return Case(f"LayerNorm + modulate {list(shape)}", make, eager, ours, _targets(targets))


def _targets(pair: tuple[float, float]) -> dict[str, float]:
    return {name: target for name, target in zip(("fp32", "bf16"), pair, strict=True) if target}


def _attention(b: int, h: int, sq: int, d: int, sk: int, targets: tuple[float, float] | None) -> Case:
    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(torch.randn(b, s, h * d).to(dtype).view(b, s, h, d) for s in (sq, sk, sk))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return o.transpose(1, 2).reshape(b, sq, h * d)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v).flatten(2)

    name = f"attention [{b},{h},{sq},{d}] x {sk} keys"
    return Case(name, make, eager, ours, _targets(targets) if targets else {}, flops=4 * b * h * sq * sk * d)


def cases() -> Iterator[Case]:
    """The table of the README, and the layers around it."""
    for nhwc in (False, True):
        yield _group_norm((2, 320, 64, 64), nhwc, (1.8, 2.0))
    for nhwc in (False, True):
        yield _group_norm((1, 128, 512, 512), nhwc, (2.0, 2.0))
    yield _group_norm((2, 640, 32, 32), False, (2.0, 2.5), temb=True)
    yield _rms_norm((1, 96, 4, 240, 416))
    yield _rms_norm((1, 384, 2, 120, 208))
    yield _modulate((2, 1024, 1152), (4.0, 3.0))
    yield _modulate((1, 4096, 1536), (4.0, 3.0))

    def make_gate(dtype: torch.dtype) -> tuple[Any, ...]:
        x, r = (torch.randn(2, 1024, 1152).to(dtype) for _ in range(2))
        return x, torch.randn(2, 6, 1152).to(dtype)[:, 2], r

    yield Case(
        "gate * x + residual [2,1024,1152]",
        make_gate,
        lambda x, g, r: g[:, None] * x + r,
        lambda x, g, r: ops.gate_residual(x, g, r),
        _targets((2.0, 2.5)),
    )

    def eager_geglu(x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    for width, targets in ((2560, {"fp32": 4.0, "bf16": 2.5}), (5120, {})):
        yield Case(
            f"GEGLU [2,4096,{width}]",
            lambda dtype, width=width: (torch.randn(2, 4096, width).to(dtype),),
            eager_geglu,
            ops.geglu,
            targets,
        )
    yield Case(
        "GELU-tanh [2,1024,4608]",
        lambda dtype: (torch.randn(2, 1024, 4608).to(dtype),),
        lambda x: F.gelu(x, approximate="tanh"),
        ops.gelu_tanh,
        _targets((3.0, 4.0)),
    )
    yield _attention(2, 8, 4096, 40, 77, (1.5, 3.0))
    yield _attention(2, 16, 1024, 72, 1024, (1.1, 1.8))
    yield _attention(2, 8, 1024, 80, 1024, (1.1, 1.8))
    yield _attention(2, 8, 4096, 40, 4096, None)
    yield _attention(2, 10, 1024, 64, 77, None)
    yield _attention(2, 10, 1024, 64, 1024, None)
    yield _attention(1, 1, 1024, 512, 1024, None)


def gpu_cases() -> Iterator[Case]:
    """What a GPU has to show: 80 % of the copy bandwidth from 8 MB on, and attention where others pad or refuse.

    The targets are ratios to eager; what is bound by memory has its floor in the table instead.
    """
    none = (0.0, 0.0)
    for shape in ((2, 320, 64, 64), (2, 1280, 16, 16), (2, 320, 128, 128), (1, 128, 512, 512), (1, 128, 1024, 1024)):
        for nhwc in (False, True):
            yield _group_norm(shape, nhwc, none)
    yield _group_norm((2, 640, 64, 64), False, none, temb=True)
    for shape in ((2, 1024, 1152), (2, 4096, 1536), (1, 4608, 3072)):
        yield _modulate(shape, none)
    for case in cases():
        if case.name.startswith(("gate", "GEGLU", "GELU")):
            yield replace(case, targets={})
    for depth, target in ((40, 1.15), (64, 1.0), (72, 1.15), (80, 1.15), (96, 1.0), (128, 1.0), (160, 1.0)):
        yield _attention(2, 16, 4096, depth, 4096, (0.0, target))
    yield _attention(1, 1, 16384, 512, 16384, (0.0, 2.0))
    for depth in (40, 64):
        for keys, target in ((77, 1.5), (154, 1.0), (300, 1.0), (512, 1.0)):
            yield _attention(2, 8, 4096, depth, keys, (0.0, target))


def to_device(value: Any, device: str) -> Any:
    """An argument on the device, with its strides and offset, as chunks have them."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return torch.as_strided(memory, value.shape, value.stride(), value.storage_offset())


def scheduler_rows(dtype_names: list[str], rounds: int) -> list[Row]:
    """DPM-Solver++ 2M: the stock step against the patched scheduler's, whole call including Python."""
    from diffusers import DPMSolverMultistepScheduler

    rows = []
    for dtype_name in dtype_names:
        dtype = DTYPES[dtype_name]
        sample, output = (torch.randn(2, 4, 64, 64).to(dtype) for _ in range(2))

        def stepper(patched: bool, sample: Tensor = sample, output: Tensor = output) -> Callable[[], None]:
            scheduler = DPMSolverMultistepScheduler()
            if patched:
                fastdiff.patch(scheduler)
            scheduler.set_timesteps(20)
            timesteps = scheduler.timesteps

            def trajectory() -> None:
                scheduler._step_index = None
                scheduler.lower_order_nums = 0
                scheduler.model_outputs = [None] * scheduler.config.solver_order
                x = sample
                for t in timesteps:
                    x = scheduler.step(output, t, x, return_dict=False)[0]

            return trajectory

        timings = compare({"eager": stepper(False), "fastdiff": stepper(True)}, rounds=rounds)
        for timing in timings:
            timing.median_ms /= 20
        rows.append(Row("scheduler step DPM++ 2M [2,4,64,64]", dtype_name, _allocator, timings, target=4.0))
    return rows


_allocator = "stock"


def check(case: Case, args: tuple[Any, ...]) -> None:
    """Ours must not be further from fp64 than twice eager's distance; a wrong kernel is not timed."""
    double = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    reference = case.eager(*double)
    error = lambda y: ((y.double() - reference).norm() / reference.norm()).item()  # noqa: E731
    ours, eager = error(case.ours(*args)), error(case.eager(*args))
    if not ours <= 2 * eager + 1e-7:
        raise SystemExit(f"{case.name}: error {ours:.3g} against eager's {eager:.3g}; not timed")


def run_case(
    case: Case, dtype_name: str, *, with_compile: bool, rounds: int, rates: dict[str, float], device: str = "cpu"
) -> Row:
    """Check, then time one case."""
    args = tuple(to_device(a, device) for a in case.make(DTYPES[dtype_name]))
    check(case, args)
    providers: dict[str, Callable[[], Any]] = {
        "eager": lambda: case.eager(*args),
        "fastdiff": lambda: case.ours(*args),
    }
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(case.eager, dynamic=False)
        providers["torch.compile"] = lambda: compiled(*args)
    timings = compare(
        providers, rounds=rounds if not case.big else max(7, rounds // 2), sample=SAMPLES[device]
    )
    out = case.eager(*args)
    bytes_moved = sum(a.numel() * a.element_size() for a in (*args, out) if isinstance(a, Tensor))
    targets = case.tuned_targets if _allocator == "tuned" and case.tuned_targets else case.targets
    floor = bytes_moved / rates["copy"] if not case.flops else case.flops / rates[dtype_name]
    return Row(
        case.name,
        dtype_name,
        _allocator,
        timings,
        bytes_moved,
        case.flops,
        floor * 1e3,
        targets.get(dtype_name),
    )


def show(rows: list[Row]) -> Table:
    """A table of ratios; the floor is bytes / copy bandwidth, or FLOPs / matmul rate."""
    table = Table(title="eager time / provider time (higher is faster; in brackets the 95 % interval)")
    for column in (
        "case",
        "dtype",
        "eager ms",
        "fastdiff ms",
        "floor ms",
        "fastdiff",
        "torch.compile",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("case", "dtype") else "right")
    for row in rows:
        by_name = {t.provider: t for t in row.timings}
        ours, compiled = by_name["fastdiff"], by_name.get("torch.compile")
        missed = row.target is not None and ours.ratio < row.target
        table.add_row(
            row.name,
            row.dtype,
            f"{by_name['eager'].median_ms:.3f}",
            f"{ours.median_ms:.3f}",
            f"{row.floor_ms:.3f}" if row.floor_ms else "",
            f"[{'red' if missed else 'green'}]{ours.ratio:.2f}[/] ({ours.ratio_low:.2f}-{ours.ratio_high:.2f})",
            f"{compiled.ratio:.2f}" if compiled else "",
            f"{row.target:g}" if row.target else "",
        )
    return table


def main() -> None:
    """Command line."""
    global _allocator
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    parser.add_argument("--device", default="cpu", choices=list(SAMPLES))
    parser.add_argument("--dtypes", nargs="+", default=None, choices=list(DTYPES), help="fp32 and bf16; on a GPU bf16")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager code")
    parser.add_argument("--tuned-allocator", action="store_true", help="call fastdiff.tune_cpu_allocator() first")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>.json")
    parser.add_argument("--device-name", default=None, help="name of the result file")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU")
    dtypes = options.dtypes or (["bf16"] if device == "cuda" else ["fp32", "bf16"])
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tuned_allocator:
        fastdiff.tune_cpu_allocator()
        _allocator = "tuned"
    torch.manual_seed(0)
    # A GPU's buffers are larger than its cache.
    rates = {"copy": copy_bandwidth((16 if device == "cpu" else 1024) << 20, device)}
    rates |= {n: matmul_rate(DTYPES[n], device) for n in dtypes}
    every = cases() if device == "cpu" else gpu_cases()
    selected = [c for c in every if options.filter.lower() in c.name.lower()]
    rows = []
    with torch.no_grad():
        for case in track(selected, description="kernels", console=Console(stderr=True)):
            for dtype_name in dtypes:
                rows.append(
                    run_case(
                        case,
                        dtype_name,
                        with_compile=options.compile,
                        rounds=options.rounds,
                        rates=rates,
                        device=device,
                    )
                )
        if device == "cpu" and options.filter.lower() in "scheduler step":
            rows += scheduler_rows(dtypes, options.rounds)
    Console(width=150).print(show(rows))
    if options.save:
        path = result_file(options.device_name, device)
        save("kernels", rows, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

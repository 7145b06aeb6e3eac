"""Kernel microbenchmarks on layer shapes of real models: our backends, eager, torch.compile, and other libraries.

    python -m fastdiff bench kernels [--device cuda] [--filter TEXT] [--compile] [--quick] [--save]

Outputs are freshly allocated on all sides, as in a model, and inputs rotate through copies larger than the caches.
``--tuned-allocator`` raises glibc's thresholds for the whole process first (all sides). Every provider is checked
against fp64 on the inputs it is timed on: one of ours that is wrong is not timed, and fails the run; another library's
that computes something else is timed, with its error in the row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from _harness import DTYPES, KERNEL_SAMPLES, Rates, cache_bytes, compare, ring, rotating, size_bytes
from _results import Row
from _runner import Job, add_options, prepare, run_section, wanted
from _targets import as_extra, text, verdicts
from layer_cases import Case, cases, gpu_cases, memory_targets
from other_libraries import LIBRARIES, available
from rich.table import Table
from torch import Tensor

from fastdiff.backends import BackendError, kernels_of, losses, use_backend

#: A provider may be this many times as far from fp64 as eager; more is a wrong kernel, or another computation.
ALLOWED = 2.0
#: Of attention, fp64 computes this many queries, spread over all: the whole would not fit into a GPU.
CHECKED_QUERIES = 256


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """A provider's results."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class Check:
    """Distances from fp64 on one set of arguments."""

    def __init__(self, case: Case, args: tuple[Any, ...]) -> None:
        self.args, self.rows = args, None
        wide = [a.double() if isinstance(a, Tensor) else a for a in args]
        if case.op == "attention":
            queries = args[0].shape[1]
            self.rows = torch.linspace(0, queries - 1, min(queries, CHECKED_QUERIES), device=args[0].device).long()
            wide[0] = wide[0][:, self.rows]
        self.reference = tensors_of(case.eager(*wide))
        self.norm = sum(r.square().sum() for r in self.reference).sqrt()
        self.eager = self.error(case.eager)

    def error(self, function: Callable[..., Any]) -> float:
        """Relative RMS error of all results together; infinite if there is a NaN, or another shape."""
        results = tensors_of(function(*self.args))
        if self.rows is not None:
            results = tuple(r[:, self.rows] for r in results)
        if [r.shape for r in results] != [r.shape for r in self.reference]:
            return float("inf")
        pairs = zip(results, self.reference, strict=True)
        error = (sum((y.double() - r).square().sum() for y, r in pairs).sqrt() / self.norm).item()
        return error if error == error else float("inf")

    def allows(self, error: float) -> bool:
        return error <= ALLOWED * self.eager + 1e-7


def ours_by_backend(case: Case, args: tuple[Any, ...]) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Our kernels that take this call, asked for by name, and why the others do not."""

    def demand(backend: str, *given: Any) -> Any:
        with use_backend(backend, strict=True):
            return case.ours(*given)

    providers, refused = {}, {}
    for kernel in kernels_of(case.op):
        call = partial(demand, kernel.backend)
        try:
            call(*args)
        except BackendError as error:
            refused[f"fastdiff {kernel.backend}"] = str(error).rpartition(": ")[2]
        else:
            providers[f"fastdiff {kernel.backend}"] = call
    return providers, refused


def providers_of(
    case: Case, args: tuple[Any, ...], device: str, with_compile: bool
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """All that can compute the case, eager first, and why others cannot."""
    found, absent = ours_by_backend(case, args)
    providers: dict[str, Callable[..., Any]] = {"eager": case.eager, **found}
    if with_compile:
        torch.compiler.reset()
        providers["torch.compile"] = torch.compile(case.eager, dynamic=False)
        providers["torch.compile max-autotune"] = torch.compile(case.eager, dynamic=False, mode="max-autotune")
    modules, missing = available(device)
    for name, module in modules.items():
        call = LIBRARIES[name].build(module, case)
        if call is not None:
            providers[name] = call
    return providers, absent | missing


def measure(case: Case, dtype_name: str, options: argparse.Namespace, rates: Rates) -> Row:
    """Check, then time one case."""
    device = options.device
    with torch.device(device):
        args = case.make(DTYPES[dtype_name])
    providers, absent = providers_of(case, args, device, options.compile)
    served = [k.backend for k in kernels_of(case.op)]
    check, wrong, note = Check(case, args), [], []
    for name, function in list(providers.items()):
        try:
            error = check.error(function)
        except Exception as problem:  # another library's refusal, or a compiler's failure: the others go on
            absent[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            if name.startswith("fastdiff"):
                wrong.append(f"{name}: {absent[name]}")
            del providers[name]
            continue
        if check.allows(error):
            continue
        said = f"{name}: error {error:.2g}, eager's {check.eager:.2g}"
        if name.startswith("fastdiff"):
            wrong.append(said)
            absent[name] = said
            del providers[name]
        else:
            note.append(said)
    out_bytes = size_bytes(tensors_of(case.eager(*args)))
    del check
    copies = ring(args, device, cache_bytes(device))
    timings = compare(
        {name: rotating(function, copies) for name, function in providers.items()},
        rounds=options.rounds,
        sample=KERNEL_SAMPLES[device],
        limit_s=options.row_s,
    )
    moved = size_bytes(args) + out_bytes
    extra = {
        "op": case.op, "of": case.of, "inputs": f"{len(copies)} copies",
        # Of the op's own arguments: SwiGLU's case has both halves in one.
        "features": losses.features(case.op, *(args[0].chunk(2, -1) if case.op == "swiglu" else args)),
        "left_out": absent, "wrong": wrong,
        "bandwidth": rates.bandwidth(), "flops_rate": rates.flops(dtype_name) if case.flops else 0.0,
    }  # fmt: skip
    if device == "cuda":
        extra["targets"] = as_extra(*memory_targets(case, DTYPES[dtype_name].itemsize, served))
        if case.op == "group_norm_silu" and size_bytes(args[:1]) > cache_bytes(device):
            extra["second_read"] = size_bytes(args[:1])
    target = case.targets.get(f"{dtype_name} {options.allocator}", case.targets.get(dtype_name))
    return Row(case.name, dtype_name, options.allocator, timings, moved, case.flops,
               rates.floor_ms(moved, case.flops, dtype_name), target, "; ".join(note), extra)  # fmt: skip


def show(rows: list[Row]) -> Table:
    """Ratios, and the share of the floor that the best of ours reaches."""
    table = Table(title="eager time / provider time (more is faster; in brackets the 95 % interval)")
    for column in ("case", "dtype", "eager ms", "floor ms", "fastdiff", "of floor", "others", "target"):
        table.add_column(column, justify="left" if column in ("case", "dtype", "others") else "right")
    for row in rows:
        eager, *rest = row.timings
        ours = [t for t in rest if t.provider.startswith("fastdiff")]
        best = min(ours, key=lambda t: t.median_ms, default=None)
        missed = best is not None and (best.ratio < 1.0 or any(v.said == "missed" for v in verdicts(asdict(row))))
        names = " ".join(f"{t.ratio:.2f} ({t.ratio_low:.2f}-{t.ratio_high:.2f}) {t.provider[9:]}" for t in ours)
        table.add_row(
            row.name,
            row.dtype,
            f"{eager.median_ms:.3f}",
            f"{row.floor_ms:.3f}",
            f"[{'red' if missed else 'green'}]{names}[/]" if names else "no kernel takes it",
            f"{row.floor_ms / best.median_ms:.0%}" if best else "",
            ", ".join(f"{t.provider} {t.ratio:.2f}" for t in rest if t not in ours),
            text(asdict(row), brief=True),
        )
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=15)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, default and max-autotune")
    options = parser.parse_args()
    prepare(options)
    every = gpu_cases() if options.device == "cuda" else cases()
    selected = [c for c in every if wanted(f"{c.name} {c.op} {c.of}", options)]
    if options.device == "cpu" and not options.filter:
        selected = [c for c in selected if c.fits_cpu()]
    rates = Rates(options.device)
    jobs = [
        Job(case.name, dtype, options.allocator, partial(measure, case, dtype, options, rates))
        for case in selected
        for dtype in options.dtypes
    ]
    with torch.no_grad():
        code = run_section("kernels", jobs, options, show)
    for name, reason in available(options.device)[1].items():
        print(f"not timed: {name}: {reason}")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of a forward, each provider in a process of its own.

    python -m fastdiff bench memory [--device cuda] [--filter TEXT] [--save]

On a GPU the peak is ``torch.cuda.max_memory_allocated``, on a CPU the process's largest resident set (``VmHWM``, reset
once the model is built), both over two forwards after a first one, and without the weights, which are shown besides.
The resident set has what malloc keeps and what huge pages round up, so on a CPU the tensors are counted too: the most
bytes that PyTorch's allocator had given out at once, in one more forward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _children import ChildFailed, patch_options, run_child
from _harness import DTYPES
from _results import Row
from _runner import Job, Store, add_options, patched_sides, prepare, run_section, wanted
from model_cases import cases, compiled_parts, named, parts_of
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import fastdiff

MIB = 1 << 20


def _status(field: str) -> int:
    """A size from ``/proc/self/status`` in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest memory since it was made, and what is in use then."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.procfs = Path("/proc/self/clear_refs").exists()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        elif self.procfs:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.base = _status("VmRSS")
        else:
            self.base = self._largest()

    @staticmethod
    def _largest() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def bytes(self) -> int:
        """Above what was in use at the beginning."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.base
        return (_status("VmHWM") if self.procfs else self._largest()) - self.base


def largest_live(call: Callable[[], Any]) -> int:
    """The most bytes of tensors on the CPU that a call has at once, above those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = (e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


def child(options: argparse.Namespace) -> dict[str, int]:
    """Weights and peak of one provider."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tuned_allocator:
        fastdiff.tune_cpu_allocator()
    case = named(options.case)
    with torch.no_grad():
        model, inputs = case.make(options.device, DTYPES[options.dtype])
        weights = sum(p.numel() * p.element_size() for part in parts_of(model) for p in part.parameters())
        whole = Peak(options.device)
        if options.side.startswith("fastdiff"):
            fastdiff.patch(model, **patch_options(options.side))
        elif options.side == "torch.compile":
            for part in compiled_parts(model):
                part.compile()
        case.call(model, **inputs)
        first = whole.bytes()
        again = Peak(options.device)
        for _ in range(2):
            case.call(model, **inputs)
        peak = again.bytes() + max(again.base - whole.base, 0)
        live = peak if options.device == "cuda" else largest_live(partial(case.call, model, **inputs))
        return {"weights": weights, "first": first, "peak": peak, "tensors": live}


def measure(name: str, dtype: str, options: argparse.Namespace) -> Row:
    """All sides, each as often as there are rounds."""
    samples: dict[str, list[dict[str, int]]] = {}
    absent: dict[str, str] = {}
    for _ in range(options.rounds):
        for side in [s for s in options.sides if s not in absent]:
            if side.endswith("packed weights") and dtype == "fp32":
                absent[side] = "refused in fp32"
                continue
            arguments = ["--case", name, "--side", side, "--dtype", dtype, "--device", options.device,
                         "--threads", str(options.threads or 0)]  # fmt: skip
            arguments += ["--tuned-allocator"] if options.tuned_allocator else []
            try:
                samples.setdefault(side, []).append(run_child("memory.py", arguments))
            except ChildFailed as error:
                absent[side] = str(error)
                samples.pop(side, None)
    peaks = {
        side: {what: int(statistics.median(s[what] for s in found)) for what in ("peak", "first", "tensors")}
        for side, found in samples.items()
    }
    if "eager" not in peaks:
        raise ChildFailed(f"eager: {absent.get('eager')}")
    weights = samples["eager"][0]["weights"]
    return Row(name, dtype, options.allocator, [], extra={"weights": weights, "bytes": peaks, "left_out": absent})


def show(rows: list[Row]) -> Table:
    """MiB, and the ratio to eager's."""
    table = Table(title="peak memory above the weights, MiB")
    for column in ("model", "dtype", "weights", "side", "peak", "of eager's", "tensors", "of eager's", "first forward"):
        table.add_column(column, justify="left" if column in ("model", "dtype", "side") else "right")
    for row in rows:
        eager = row.extra["bytes"]["eager"]
        for side, found in row.extra["bytes"].items():
            sizes = [text for what in ("peak", "tensors") for text in (f"{found[what] / MIB:.0f}",
                     f"{found[what] / max(eager[what], 1):.2f}")]  # fmt: skip
            table.add_row(row.name, row.dtype, f"{row.extra['weights'] / MIB:.0f}", side, *sizes,
                          f"{found['first'] / MIB:.0f}")  # fmt: skip
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    if "--child" in sys.argv:
        parser.add_argument("--child", action="store_true")
        parser.add_argument("--tuned-allocator", action="store_true")
        parser.add_argument("--threads", type=int)
        for option in ("--case", "--side", "--dtype", "--device"):
            parser.add_argument(option, required=True)
        print(json.dumps(child(parser.parse_args())))
        return 0
    add_options(parser, rounds=3)
    parser.add_argument("--sides", nargs="+", default=None, help='e.g. eager "fastdiff triton" torch.compile')
    options = parser.parse_args()
    if options.device == "cuda":
        options.default_rounds = 1  # the allocator's count does not vary
    prepare(options)
    packed = ["fastdiff, packed weights"] if options.device == "cpu" else []
    options.sides = options.sides or ["eager", *patched_sides(options.device), *packed]
    selected = [c for c in cases() if wanted(c.name, options)]
    if options.device == "cpu" and not options.filter:
        selected = [c for c in selected if c.on_cpu]
    jobs: list[Any] = [
        Job(case.name, dtype, options.allocator, partial(measure, case.name, dtype, options))
        for case in selected
        for dtype in options.dtypes
    ]
    return run_section(Store("memory", options, options.sides), jobs, options, show)


if __name__ == "__main__":
    sys.exit(main())

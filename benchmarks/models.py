"""Whole models of the real sizes with random weights: eager, patched and compiled side by side in one process.

    python -m fastdiff bench models [--device cuda] [--filter TEXT] [--compile] [--quick] [--save]

One model object serves all sides: it is patched and unpatched between samples (outside the clock), so weights, memory
and thermal state are the same. Times are the host's, until the GPU is done: launching counts. In half precision on a
CPU it is also timed with ``prepack_weights=True``. The stock and the raised allocator thresholds need separate
processes; ``report.py`` computes the speed-up of "patched with thresholds raised" over "eager stock" from the two.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from _children import patch_options
from _harness import DTYPES, MODEL_SAMPLES, Rates, compare
from _results import Row
from _runner import Job, Store, add_options, patched_sides, prepare, run_section, wanted
from _targets import text, verdicts
from model_cases import ModelCase, cases, compiled_parts, parts_of
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import fastdiff
from fastdiff.patching import patch_of


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


#: What torch's counter leaves out.
UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Sides:
    """One model, brought from one provider's state to another's.

    Attributes:
        prepare: provider -> what makes the model that provider's, not timed; :meth:`call` is.
    """

    def __init__(self, case: ModelCase, model: Any, inputs: dict[str, Any], dtype_name: str, device: str,
                 with_compile: bool) -> None:  # fmt: skip
        self.case, self.model, self.inputs, self.parts = case, model, inputs, compiled_parts(model)
        self.prepare: dict[str, Callable[[], Any]] = {"eager": self.stock}
        packed = ["fastdiff, packed weights"] if device == "cpu" and dtype_name != "fp32" else []  # refused in fp32
        for side in (*patched_sides(device), *packed):
            self.prepare[side] = partial(self.patched, **patch_options(side))
        if with_compile:
            for mode in ("default", "max-autotune"):
                name = "torch.compile" if mode == "default" else f"torch.compile {mode}"
                calls = [torch.compile(part._call_impl, mode=mode, dynamic=False) for part in self.parts]
                self.prepare[name] = partial(self.compiled, calls)

    def call(self) -> Tensor:
        return self.case.call(self.model, **self.inputs)

    def stock(self) -> None:
        self.call_through(None)
        if any(patch_of(part) is not None for part in (self.model, *parts_of(self.model))):
            fastdiff.unpatch(self.model)

    def compiled(self, calls: list[Callable[..., Any]]) -> None:
        self.stock()
        self.call_through(calls)

    def call_through(self, calls: list[Callable[..., Any]] | None) -> None:
        """What ``nn.Module.compile`` sets, with calls that are compiled already, or ``None`` to go back."""
        for part, call in zip(self.parts, calls or [None] * len(self.parts), strict=True):
            if part._compiled_call_impl is not call:
                part._compiled_call_impl = call

    def patched(self, **options: Any) -> None:
        self.call_through(None)
        fastdiff.patch(self.model, **options)
        for _ in range(2 if options else 0):
            self.call()  # packs weights, compiles Triton's kernels; the second call captures graphs


def measure(case: ModelCase, dtype_name: str, options: argparse.Namespace, rates: Rates) -> Row:
    """Check all providers against eager, then time them in turns."""
    device = options.device
    model, inputs = case.make(device, DTYPES[dtype_name])
    torch.compiler.reset()
    sides = Sides(case, model, inputs, dtype_name, device, options.compile)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        reference = sides.call().float()
    extra: dict[str, Any] = {"left_out": {}, "wrong": [], "difference": {}, "setup_s": {}}
    for name in [n for n in sides.prepare if n != "eager"]:
        start = time.perf_counter()
        try:
            sides.prepare[name]()
            prepared = time.perf_counter() - start
            difference = ((sides.call().float() - reference).norm() / reference.norm()).item()
        except Exception as error:  # a compiler's failure, or no memory for one side: the others go on
            extra["left_out"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if name.startswith("fastdiff"):
                extra["wrong"].append(f"{name}: {extra['left_out'][name]}")
            del sides.prepare[name]
            continue
        # Patching alone, and until the first result is there: a compiler works when it is called.
        extra["setup_s"][name] = [round(prepared, 3), round(time.perf_counter() - start, 3)]
        extra["difference"][name] = difference
        if name.startswith("fastdiff") and not difference <= (1e-3 if dtype_name == "fp32" else 0.2):
            extra["wrong"].append(f"{name}: differs from eager by {difference:.2g}")
    del reference
    timings = compare(dict.fromkeys(sides.prepare, sides.call), rounds=options.rounds, min_sample_s=0.0, warmup=0,
                      before=sides.prepare, sample=MODEL_SAMPLES[device], limit_s=options.row_s)  # fmt: skip
    weights = sum(p.numel() * p.element_size() for part in parts_of(model) for p in part.parameters())
    flops = counter.get_total_flops()
    extra |= {"weights_bytes": weights, "targets": case.further_targets(device)}
    row = Row(case.name, dtype_name, options.allocator, timings, weights, flops,
              rates.floor_ms(weights, flops, dtype_name),
              case.target(device, dtype_name), extra=extra)  # fmt: skip
    del model, sides  # a patched model refers to itself
    gc.collect()
    return row


def show(rows: list[Row]) -> Table:
    """Ratios of one process."""
    table = Table(title="eager time / provider time, same process (95 % interval)")
    for column in ("model", "dtype", "allocator", "eager ms", "floor ms", "of floor", "fastdiff", "others", "target",
                   "differs"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "dtype", "allocator", "others") else "right")
    for row in rows:
        eager, *rest = row.timings
        ours = [t for t in rest if t.provider.startswith("fastdiff")]
        best = max(ours, key=lambda t: t.ratio, default=None)
        missed = best is None or best.ratio < 1.0 or any(v.said == "missed" for v in verdicts(asdict(row)))
        color = "red" if missed else "green"
        names = "\n".join(f"{t.ratio:.2f} ({t.ratio_low:.2f}-{t.ratio_high:.2f}) {t.provider[9:]}" for t in ours)
        table.add_row(
            row.name, row.dtype, row.allocator, f"{eager.median_ms:.1f}", f"{row.floor_ms:.1f}",
            f"{row.floor_ms / best.median_ms:.0%}" if best else "", f"[{color}]{names}[/]",
            ", ".join(f"{t.provider} {t.ratio:.2f}" for t in rest if t not in ours),
            text(asdict(row)), f"{max(row.extra['difference'].values(), default=0):.1e}",
        )  # fmt: skip
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=9)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, default and max-autotune")
    options = parser.parse_args()
    prepare(options)
    rates = Rates(options.device)
    selected = [c for c in cases() if wanted(c.name, options)]
    if options.device == "cpu" and not options.filter:
        selected = [c for c in selected if c.on_cpu]
    jobs = [
        Job(case.name, dtype, options.allocator, partial(measure, case, dtype, options, rates))
        for case in selected
        for dtype in options.dtypes
    ]
    with torch.no_grad():
        return run_section(Store("models", options, patched_sides(options.device)), jobs, options, show)


if __name__ == "__main__":
    sys.exit(main())

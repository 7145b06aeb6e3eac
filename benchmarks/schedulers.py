"""Host time per sampler step, stock against fastdiff, for every scheduler whose step is fused.

A generation of 20 steps, ``set_timesteps`` counted, divided by its steps. The sample is small, so that the time is the
host's and not the arithmetic's: on a GPU that is what a fast denoiser waits for.

    python -m fastdiff bench schedulers [--filter UniPC LMS] [--quick] [--save]
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import compare
from _results import Row, Timing
from _runner import Job, add_options, prepare, run_section, wanted
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "schedulers"))

STEPS = 20
SHAPE = (1, 4, 32, 32)

#: (label, class, options). The plain configuration of every class comes besides.
OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPM++ 3M", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPC order 3", "UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPC flow", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("flow-match Euler, stochastic", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]
#: The plain configurations' names, where the class's is not the usual one.
LABELS = {"DPMSolverMultistepScheduler": "DPM++ 2M", "UniPCMultistepScheduler": "UniPC", "LMSDiscreteScheduler": "LMS"}
TARGETS = {"DPM++ 2M": 4.0, "UniPC": 50.0, "LMS": 50.0}


def generation(scheduler: Any) -> Callable[[], int]:
    """A whole generation with given model outputs, called as pipelines do; returns the number of steps."""
    from trajectory import Walk, set_timesteps

    generator = torch.Generator().manual_seed(0)
    first, model_output = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    # Scaling the model's input is not part of a step; the step asks whether it was done.
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    arguments = {} if type(scheduler).__name__ == "ScoreSdeVpScheduler" else {"return_dict": False}

    def whole() -> int:
        set_timesteps(scheduler, STEPS)
        walk, sample = Walk(scheduler, **arguments), first
        walk.scaled = False
        for index in range(len(walk.timesteps)):
            sample = walk.step(index, model_output, sample)[0]
        return len(walk.timesteps)

    def plain() -> int:  # without what finds the arguments, which takes a tenth of our time
        set_timesteps(scheduler, STEPS)
        step, timesteps, sample = getattr(scheduler, method), scheduler.timesteps[:count], first
        for timestep in timesteps:
            sample = step(model_output, timestep, sample, **arguments)[0]
        return count

    set_timesteps(scheduler, STEPS)
    walk = Walk(scheduler, **arguments)
    method, count = walk.sampler.method, len(walk.timesteps)
    return torch.no_grad()(plain if walk.plain() else whole)


def measure(label: str, name: str, config: dict[str, Any], rounds: int) -> Row:
    """One scheduler: milliseconds per step."""
    from trajectory import make, served

    patched = make(name, True, **config)
    stock, fused = generation(make(name, **config)), generation(patched)
    steps = stock()
    for _ in range(3):
        fused()
    if served(patched) != "cpu":
        raise RuntimeError(f"{label} is not fused: {served(patched)}")
    timings = compare({"eager": stock, "fastdiff": fused}, rounds=rounds)
    return Row(label, "fp32", "stock", [_per_step(t, steps) for t in timings],
               target=TARGETS.get(label), extra={"steps": steps, "shape": list(SHAPE)})


def _per_step(t: Timing, steps: int) -> Timing:
    return replace(t, median_ms=t.median_ms / steps, low_ms=t.low_ms / steps, high_ms=t.high_ms / steps)


def _row(label: str, name: str, config: dict[str, Any], options: argparse.Namespace) -> Row:
    return replace(measure(label, name, config, options.rounds), allocator=options.allocator)


def show(rows: list[Row]) -> Table:
    """Microseconds per step."""
    table = Table(title=f"host time per step, {STEPS} steps and set_timesteps", title_justify="left")
    table.add_column("scheduler")
    for column in ("stock us", "fastdiff us", "stock / fastdiff", "target"):
        table.add_column(column, justify="right")
    for row in rows:
        stock, fused = row.timings
        ratio = f"{fused.ratio:.1f} ({fused.ratio_low:.1f}-{fused.ratio_high:.1f})"
        style = "red" if fused.ratio < (row.target or 1.0) else ""
        table.add_row(row.name, f"{stock.median_ms * 1e3:.1f}", f"{fused.median_ms * 1e3:.1f}", ratio,
                      f"{row.target:g}" if row.target else "", style=style)
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=15, dtypes=False, devices=("cpu",))
    parser.set_defaults(threads=os.cpu_count())
    options = parser.parse_args()
    prepare(options)
    warnings.simplefilter("ignore")
    from trajectory import AVAILABLE

    cases = [(LABELS.get(n, n.removesuffix("Scheduler")), n, {}) for n in AVAILABLE] + OPTIONS
    jobs = [
        Job(label, "fp32", options.allocator, partial(_row, label, name, config, options))
        for label, name, config in cases
        if wanted(f"{label} {name}", options)
    ]
    return run_section("schedulers", jobs, options, show)


if __name__ == "__main__":
    sys.exit(main())

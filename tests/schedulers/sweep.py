"""Every sampler under every option over whole trajectories, in every dtype; and the share of them that runs fused::

    python tests/schedulers/sweep.py                # 20 and 50 steps; minutes
    python tests/schedulers/sweep.py --only UniPC SASolver
    python tests/schedulers/sweep.py --coverage     # the share alone; seconds

Exits with 1 if a trajectory differs from stock's by more than the tests allow.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter

import torch
from configurations import CONFIGURATIONS, Configuration, label, left_stock
from rich.console import Console
from rich.progress import track
from rich.table import Table
from test_trajectories import assert_fp64, assert_no_further_from_fp64_than_stock
from trajectory import AVAILABLE, make, run

from fastdiff.schedulers.samplers import STOCK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def coverage(configurations: list[Configuration]) -> tuple[Counter[str], Counter[str]]:
    """By class, how many of its options there are and with how many every step is one launch of a fused kernel."""
    options: Counter[str] = Counter(name for name, _ in left_stock())
    fused: Counter[str] = Counter()
    for name, config, schedule, step in configurations:
        options[name] += 1
        records = run(make(name, True, **config), torch.float32, schedule=schedule, step=step)
        fused[name] += not any(record["site"].startswith("stock") for record in records)
    return options, fused


def failures(configuration: Configuration, steps: int) -> list[str]:
    """What is wrong with a trajectory of so many steps."""
    name, config, schedule, step = configuration
    if "steps" in schedule and schedule["steps"] > 2:  # the others have timesteps of their own, or two steps at most
        configuration = name, config, {**schedule, "steps": steps}, step
    try:
        run(make(name, **config), torch.float64, schedule=configuration[2], step=step)
    except Exception:  # a stock bug: DPM-Solver inverse, 50 exponential sigmas
        return []
    found = []
    try:
        assert_fp64(configuration)
    except AssertionError as error:
        found.append(f"{label(configuration)}, {steps} steps, fp64: {error}")
    for dtype in DTYPES:
        try:
            assert_no_further_from_fp64_than_stock(configuration, dtype)
        except AssertionError as error:
            found.append(f"{label(configuration)}, {steps} steps, {dtype}: {str(error).splitlines()[0]}")
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--only", nargs="+", default=[], help="parts of class names")
    parser.add_argument("--coverage", action="store_true", help="compare no trajectories")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    chosen = [c for c in CONFIGURATIONS if not arguments.only or any(part in c[0] for part in arguments.only)]
    bad: list[str] = []
    if not arguments.coverage:
        for configuration in track(chosen, console=console):
            for steps in arguments.steps:
                bad += failures(configuration, steps)
    options, fused = coverage(chosen)
    table = Table("class", "options", "fused", title="samplers and options that run fused")
    for name in sorted(options):
        table.add_row(name, str(options[name]), str(fused[name]))
    console.print(table)
    classes = len(AVAILABLE) + sum(name in STOCK for name in options)
    console.print(f"{len(AVAILABLE)} of {classes} classes, {fused.total()} of {options.total()} options "
                  f"({fused.total() / options.total():.1%})")
    for line in bad:
        console.print(line, style="red", highlight=False, markup=False)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

"""Everything on a GPU within a budget of time: its tests, then kernels, models, cold start and memory; a short table.

    make gpu                                    # builds first, ten minutes in all; GPU_BUDGET=300 for five
    make gpu PY=python3                         # with the packages of that Python, where none can be fetched
    python -m fastdiff bench gpu --budget 300 --phases tests kernels

Rows are kept as they come, and those that this code has measured on this GPU are not measured again: a run that was
cut goes on where it stopped. What matters most comes first; torch.compile, which takes its time, comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cold_start
import model_cases
import torch
from _results import environment, result_file, rows_here
from _tables import best_of
from _targets import Verdict, verdicts
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
#: A phase with less time than this is not begun: its process would only import.
LEAST_S = 20.0
COLORS = {"reached": "green", "missed": "red", "not measured": "yellow"}
#: Processes for the tests, which mostly compile Triton's kernels, on the host.
WORKERS = str(min(8, os.cpu_count() or 1))
#: How long a process that is interrupted has to say what it knows.
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Phase:
    """One process.

    Attributes:
        share: of the time that is left when it begins.
        command: of Python; a script of this folder also gets its budget.
    """

    name: str
    share: float
    command: tuple[str, ...]

    def arguments(self, budget_s: float, device: str) -> list[str]:
        """The command line after the interpreter."""
        if self.command[0] == "-m":
            return list(self.command)
        script, *options = self.command
        kept = ["--device", device, "--save", "--resume", "--budget", f"{budget_s:.0f}"]
        return [str(HERE / script), *options, *kept]


_PYTEST = ("-m", "pytest", "-q", "-rs", "--tb=short", "-n", WORKERS, "--dist", "worksteal")
PHASES = (
    Phase("tests", 0.35, (*_PYTEST, str(HERE.parent / "tests" / "gpu"))),
    Phase("kernels", 0.45, ("kernels.py", "--quick")),
    Phase("models", 0.6, ("models.py", "--quick")),
    Phase("cold start", 0.4, ("cold_start.py", "--rounds", "1")),
    Phase("memory", 0.3, ("memory.py",)),
    Phase("models, compiled", 0.6, ("models.py", "--quick", "--compile")),
    Phase("kernels, other dtypes", 0.5, ("kernels.py", "--quick", "--dtypes", "fp16", "fp32")),
    Phase("kernels, compiled", 1.0, ("kernels.py", "--quick", "--compile")),
)

#: Rows with their environments, by section.
Sections = dict[str, list[dict[str, Any]]]
Run = Callable[[Sequence[str], float], "int | None"]


def run_process(arguments: Sequence[str], timeout_s: float) -> int | None:
    """The exit code of a Python process, ``None`` if it had to be ended after ``timeout_s``, with those it began."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=HERE.parent, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except BaseException as reason:
        _end(process)
        if isinstance(reason, subprocess.TimeoutExpired):
            return None
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those it began. At an interrupt pytest still says what failed so far."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_phases(
    budget_s: float,
    device: str,
    *,
    phases: Sequence[Phase] = PHASES,
    run: Run = run_process,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Run the phases one after the other within the budget.

    A script stops by itself after its share, its last row may take longer: it is ended only when the whole budget is
    over. Tests are ended after their share.

    Returns:
        What became of each phase: ``"ok"``, ``"failed"``, ``"cut"`` or ``"no time"``.
    """
    start, became = clock(), {}
    for phase in phases:
        left = start + budget_s - clock()
        share = left * phase.share
        if share < LEAST_S:
            became[phase.name] = "no time"
            continue
        limit = share if phase.command[0] == "-m" else left
        code = run(phase.arguments(share, device), limit)
        became[phase.name] = "cut" if code is None else "ok" if code == 0 else "failed"
    return became


def _of_measured(found: Sequence[Verdict]) -> str:
    """How many of the targets that were measured are reached, and how many were not measured."""
    known = [v for v in found if v.reached is not None]
    absent = f", {len(found) - len(known)} not measured" if len(known) < len(found) else ""
    return f"{sum(v.met for v in known)} of {len(known)}{absent}"


def summary(sections: Sections, became: dict[str, str]) -> Table:
    """The phases, and per section how ours did."""
    table = Table(title=", ".join(f"{name}: {what}" for name, what in became.items()))
    for column in ("section", "rows", "speed-up: median", "worst", "losses", "targets reached"):
        table.add_column(column, justify="left" if column == "section" else "right")
    for name, rows in sections.items():
        ratios = [best["ratio"] for row in rows if (best := best_of(row))]
        aims = [verdict for row in rows for verdict in verdicts(row)]
        table.add_row(
            name, str(len(rows)),
            f"{statistics.median(ratios):.2f}" if ratios else "", f"{min(ratios):.2f}" if ratios else "",
            str(sum(r < 1 for r in ratios)) if ratios else "",
            _of_measured(aims) if aims else "",
        )  # fmt: skip
    return table


def _rows_with_targets(sections: Sections, device: str) -> list[dict[str, Any]]:
    """Of models and cold start, those that were not measured among them."""
    here = "cuda" if device == "cuda" else "fp32"
    rows = []
    for case in model_cases.cases():
        of_case = [row for row in sections.get("models", ()) if row["name"] == case.name]
        absent = {"name": case.name, "timings": [], "target": case.target(device, here),
                  "extra": {"targets": case.further_targets(device)}}  # fmt: skip
        rows += of_case or [absent]
    started = {"name": "cold start", "timings": [], "extra": {"targets": cold_start.gpu_targets(device)}}
    return [*rows, *(sections.get("cold start") or [started])]


def targets(sections: Sections, device: str) -> Table:
    """What is to be reached, and whether it is: models and cold start one by one, kernels by what they are held to."""
    table = Table(title="targets")
    for column in ("of", "side", "what", "target", "reached", "verdict"):
        table.add_column(column, justify="right" if column in ("target", "reached") else "left")
    for row in _rows_with_targets(sections, device):
        for v in verdicts(row):
            reached = "" if v.reached is None else f"{v.reached:.2f}"
            table.add_row(row["name"], v.of, v.what, f"{v.value:g}", reached, f"[{COLORS[v.said]}]{v.said}[/]")
    grouped: dict[tuple[str, str, float], list[Verdict]] = {}
    for row in sections.get("kernels", ()):
        for v in verdicts(row):
            grouped.setdefault((v.of, v.what, v.value), []).append(v)
    for (of, what, value), found in sorted(grouped.items()):
        known = [v.reached for v in found if v.reached is not None]
        missed = any(v.said == "missed" for v in found)
        said = "not measured" if not known else "missed" if missed else "reached"
        counts = f"[{COLORS[said]}]{said}[/]: {_of_measured(found)}"
        # The least is the worst: what kernels are held to are speeds and shares.
        table.add_row("kernels", of, what, f"{value:g}", f"{min(known):.2f} at worst" if known else "", counts)
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the command itself")
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phases", nargs="+", default=names, choices=names, metavar="PHASE",
                        help=f"only these of {', '.join(map(repr, names))}")  # fmt: skip
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench gpu: torch sees no CUDA GPU", file=sys.stderr)
        return 2
    chosen = [phase for phase in PHASES if phase.name in options.phases]
    became = run_phases(options.budget, options.device, phases=chosen, run=run_process)
    console = Console(width=140)
    sections, others = rows_here(result_file(None, options.device), environment(options.device))
    console.print(targets(sections, options.device))
    console.print(summary(sections, became))
    if others:
        console.print(f"{others} row(s) of other code, torch or machine are in the file, not counted here")
    if {"cut", "no time"} & set(became.values()):
        console.print("the time was over before the end: run it again, it goes on with the rows that are missing")
    console.print("python -m fastdiff bench report brings the results into the pages and the choice of kernels")
    return int("failed" in became.values())


if __name__ == "__main__":
    sys.exit(main())

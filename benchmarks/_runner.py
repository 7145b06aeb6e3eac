"""Runs the rows of a section: progress, a budget of time, results kept row by row, what is measured already skipped."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import DTYPES
from _results import Row, RowKey, environment, measured_keys, result_file, save
from compare import Change, compared, show_changes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastdiff
from fastdiff.backends import BACKENDS, kernels_of, losses
from fastdiff.ops._library import OPS

#: Rounds with --quick: the fewest that give a 95 % interval which is not all of the samples.
QUICK_ROUNDS = 9
#: Seconds with --quick that a row is timed for, if three rounds of it do not take longer.
QUICK_ROW_S = 30.0


@dataclass(frozen=True)
class Job:
    """A row that is still to be measured."""

    name: str
    dtype: str
    allocator: str
    run: Callable[[], Row]

    @property
    def key(self) -> RowKey:
        return self.name, self.dtype, self.allocator


@dataclass
class Outcome:
    """What became of the jobs.

    Attributes:
        skipped: measured before.
        left: not begun, for want of time.
        failed: why, by job.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    failed: dict[RowKey, str] = field(default_factory=dict)


def run_jobs(
    jobs: Sequence[Job],
    keep: Callable[[Row], None],
    *,
    done: Iterable[RowKey] = (),
    budget_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    advance: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Run the jobs in their order.

    Args:
        keep: called with every row as soon as it is there, so that an interrupted run loses one at most.
        done: keys of rows that need no measuring.
        budget_s: seconds; a job is not begun if less is left than a job took in the median so far.
        clock: seconds from anywhere.
        advance: called with the name of a job before it begins, or is passed over.
    """
    outcome, start, known = Outcome(), clock(), set(done)
    took: list[float] = []
    for job in jobs:
        advance(f"{job.name} {job.dtype}")
        if job.key in known:
            outcome.skipped.append(job)
            continue
        begun = clock()
        if budget_s is not None:
            left, expected = start + budget_s - begun, statistics.median(took) if took else 0.0
            if left <= 0 or left < expected:
                outcome.left.append(job)
                continue
        try:
            row = job.run()
        except Exception as error:  # one case that fails, be it for want of memory, must not cost the others
            outcome.failed[job.key] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            outcome.rows.append(row)
            keep(row)
        took.append(clock() - begun)
    return outcome


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that everything has whose rows are kept, measured or counted."""
    parser.add_argument("--filter", nargs="+", default=[], metavar="TEXT", help="only names with one of these in it")
    parser.add_argument("--save", action="store_true", help="keep the rows in benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="skip rows that this very code has made here before")
    parser.add_argument("--budget", type=float, default=None, metavar="SECONDS", help="begin no row after this time")
    parser.add_argument("--baseline", type=Path, default=None, metavar="OLD.json",
                        help="say what got worse since these results; then the exit code is 1")  # fmt: skip


def check_run_options(options: argparse.Namespace) -> None:
    """Refuse what makes no sense.

    Raises:
        SystemExit: naming the option.
    """
    if options.baseline is not None and not options.baseline.is_file():
        raise SystemExit(f"--baseline: there is no file {options.baseline}")
    if options.resume and not options.save:
        raise SystemExit("--resume needs --save: it goes by the results that are kept")


def add_options(parser: argparse.ArgumentParser, *, rounds: int, dtypes: bool = True,
                devices: Sequence[str] = ("cpu", "cuda"), allocator: bool = True) -> None:  # fmt: skip
    """The options that all measurements have; ``--tuned-allocator`` only where ``allocator`` is true."""
    add_run_options(parser)
    parser.add_argument("--device", default=devices[0], choices=devices)
    if dtypes:
        parser.add_argument("--dtypes", nargs="+", default=None, choices=list(DTYPES), help="default: fp32 and bf16 "
                            "on a CPU, bf16 on a GPU")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=None, help=f"samples of each provider (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds at most, of kernels and models "
                        f"fewer where they would take over {QUICK_ROW_S:g} s")  # fmt: skip
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: %(default)s; None is torch's)")
    if allocator:
        parser.add_argument("--tuned-allocator", action="store_true", help="call fastdiff.tune_cpu_allocator() first")
    parser.add_argument("--device-name", default=None, help="name of the result file (default: made from the device)")
    parser.set_defaults(default_rounds=rounds, **({} if allocator else {"tuned_allocator": False}))


def prepare(options: argparse.Namespace) -> None:
    """Apply the options to the process, and fill in the defaults that depend on the device.

    Raises:
        SystemExit: if the device is not there, or a number makes no sense.
    """
    check_run_options(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA GPU")
    if options.rounds is not None and options.rounds < 1:
        raise SystemExit(f"--rounds is {options.rounds}; expected at least 1")
    options.rounds = options.rounds or options.default_rounds
    if options.quick:
        options.rounds = min(options.rounds, QUICK_ROUNDS)
    options.row_s = QUICK_ROW_S if options.quick else None
    if getattr(options, "dtypes", ()) is None:
        options.dtypes = ["bf16"] if options.device == "cuda" else ["fp32", "bf16"]
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.tuned_allocator:
        fastdiff.tune_cpu_allocator()
    options.allocator = "tuned" if options.tuned_allocator else "stock"
    torch.manual_seed(0)


def patched_sides(device: str) -> list[str]:
    """Our sides of a whole model: what ``patch`` gives, or where no GPU kernel is measured yet, each backend.

    ``"fastdiff"`` is ``fastdiff.patch(model)``, ``"fastdiff cuda"`` is ``fastdiff.patch(model, backend="cuda")``; each
    on a GPU also with CUDA graphs.
    """
    sides = ["fastdiff"]
    if device == "cuda" and not any(losses.is_proven(losses.kind(torch.device(device)), op) for op in OPS):
        asked = {k.backend for op in OPS for k in kernels_of(op) if k.on_request}
        sides = [f"fastdiff {backend}" for backend in BACKENDS if backend in asked] or sides
    return [*sides, *(f"{side}, CUDA graphs" for side in sides if device == "cuda")]


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether ``--filter`` lets a name through."""
    return not options.filter or any(part.lower() in name.lower() for part in options.filter)


class Store:
    """A section of a result file: what it has, what is kept in it, and how rows compare with another file's.

    Args:
        sides: what a row must have, or say why not, to be done. The choice of kernels, and with it our sides, changes
            with what was measured, which is no source.
    """

    def __init__(self, section: str, options: argparse.Namespace, sides: Sequence[str] = ()) -> None:
        self.section = section
        self.path = result_file(options.device_name, options.device)
        self.where = environment(options.device)
        self.asked = (*sides, *(("torch.compile",) if getattr(options, "compile", False) else ()))

    def done(self) -> set[RowKey]:
        """What need not be measured again."""
        return measured_keys(self.path, self.section, self.where, self.asked)

    def keep(self, row: Row) -> None:
        save(self.section, [row], self.path, self.where)

    def changes(self, old: dict[str, Any], rows: list[Row]) -> list[Change]:
        """Between the content of another file and the rows."""
        entries = [asdict(row) | {"environment": 0} for row in rows]
        new = {self.section: {"environments": [self.where], "rows": entries}}
        return compared(old, json.loads(json.dumps(new)))


def run_section(
    section: str | Store, jobs: Sequence[Job], options: argparse.Namespace, show: Callable[[list[Row]], Table]
) -> int:
    """Run, keep, print, and compare with the baseline.

    Args:
        section: its name, or its store where it has another form than measurements have.

    Returns:
        The exit code: 1 if a kernel was wrong, a case failed or something got slower.
    """
    console = Console(width=150)
    store = Store(section, options) if isinstance(section, str) else section
    done = store.done() if options.resume else set()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task(store.section, total=len(jobs))

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=f"{store.section}: {name}"[:60])

        keep = store.keep if options.save else lambda row: None
        outcome = run_jobs(jobs, keep, done=done, budget_s=options.budget, advance=advance)
    if outcome.rows:
        console.print(show(outcome.rows))
    if outcome.skipped:
        console.print(f"{len(outcome.skipped)} row(s) were measured before and are kept")
    if outcome.left:
        console.print(f"[yellow]{len(outcome.left)} row(s) left, the time is over; --resume goes on with them[/]")
    bad = [f"{' '.join(key[:2])}: {reason}" for key, reason in outcome.failed.items()]
    bad += [f"{row.name} {row.dtype}: {reason}" for row in outcome.rows for reason in row.extra.get("wrong", ())]
    for line in bad:
        console.print(f"failed: {line}", style="red", markup=False, highlight=False)
    if options.save and outcome.rows:
        print(f"wrote {store.path}")
    slower = False
    if options.baseline is not None:
        slower = show_changes(store.changes(json.loads(options.baseline.read_text()), outcome.rows), console)
    return int(bool(bad) or slower)

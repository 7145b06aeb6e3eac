"""What got slower, or faster, between two result files, beyond noise.

    python -m fastdiff bench compare old.json new.json

A provider is judged by its ratio to eager in the same run, which a slower moment of the machine leaves alone; eager
itself, and what has no ratio, by its time, or its peak of memory. It got slower if the 95 % intervals of the two runs
do not overlap and the medians differ by more than the margin: between processes on a shared machine a ratio moves more
than within one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _results import key_of, rows_of
from rich.console import Console
from rich.table import Table

#: The least relative change of a median that counts.
MARGIN = 0.05
#: How the names of our providers begin.
OURS = ("fastdiff", "patched")
#: By name: median, low, high; more is faster.
Speeds = dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Change:
    """One number of one row, in both runs. ``factor`` is the new speed / the old speed."""

    section: str
    name: str
    dtype: str
    provider: str
    factor: float
    verdict: str


def judge(old: tuple[float, float, float], new: tuple[float, float, float], margin: float = MARGIN) -> str:
    """``"slower"``, ``"faster"`` or ``"same"``, of (median, low, high) of speeds: more is faster."""
    if new[2] < old[1] and new[0] < old[0] * (1 - margin):
        return "slower"
    if new[1] > old[2] and new[0] > old[0] * (1 + margin):
        return "faster"
    return "same"


def _numbers(row: dict[str, Any]) -> tuple[Speeds, Speeds]:
    """(median, low, high) of what a row has measured, as speeds: ratios to eager, and absolute ones.

    Absolute are the baseline's time, the phases of a cold start after the first picture, and peak memory, whose inverse
    stands for a speed.
    """
    ratios: Speeds = {}
    absolute: Speeds = {}
    for index, timing in enumerate(row["timings"]):
        if index:
            ratios[timing["provider"]] = timing["ratio"], timing["ratio_low"], timing["ratio_high"]
        elif timing.get("low_ms"):  # else from before intervals of times were kept
            absolute[timing["provider"]] = 1 / timing["median_ms"], 1 / timing["high_ms"], 1 / timing["low_ms"]
    for side, phases in row["extra"].get("phases", {}).items():
        for phase in ("new size", "other LoRA"):
            median, low, high = phases[phase]
            absolute[f"{side}, {phase}"] = 1 / median, 1 / high, 1 / low
    for side, found in row["extra"].get("bytes", {}).items():
        peak = 1 / max(found["peak"], 1)
        absolute[f"{side}, peak memory"] = peak, peak, peak
    return ratios, absolute


def compared(old: dict[str, Any], new: dict[str, Any], margin: float = MARGIN) -> list[Change]:
    """All that both results have; absolute numbers only where both are of the same device."""
    changes = []
    for section in [s for s in new if s in old and "environments" in new[s]]:
        before = {key_of(row): row for row in rows_of(old[section])}
        for row in rows_of(new[section]):
            earlier = before.get(key_of(row))
            if earlier is None:
                continue
            same = all(earlier["environment"].get(k) == row["environment"].get(k) for k in ("cpu", "gpu"))
            for then, now in list(zip(_numbers(earlier), _numbers(row), strict=True))[: 2 if same else 1]:
                changes += [
                    Change(section, row["name"], row["dtype"], what, now[what][0] / then[what][0],
                           judge(then[what], now[what], margin))
                    for what in now if what in then
                ]  # fmt: skip
    return changes


def show_changes(changes: list[Change], console: Console) -> bool:
    """Print what changed; returns whether anything of ours got slower.

    Eager and other libraries are shown too: if those got slower, it was the machine.
    """
    moved = sorted((c for c in changes if c.verdict != "same"), key=lambda c: c.factor)
    if not moved:
        console.print(f"no change beyond noise in {len(changes)} timings")
        return False
    table = Table(title=f"changed beyond noise, of {len(changes)} timings")
    for column in ("section", "case", "dtype", "provider", "new / old speed"):
        table.add_column(column)
    for c in moved:
        color = "red" if c.verdict == "slower" else "green"
        table.add_row(c.section, c.name, c.dtype, c.provider, f"[{color}]{c.factor:.2f}[/]")
    console.print(table)
    return any(c.verdict == "slower" and c.provider.startswith(OURS) for c in moved)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help="least relative change (default: %(default)s)")
    options = parser.parse_args()
    for path in (options.old, options.new):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    return int(show_changes(compared(old, new, options.margin), Console(width=150)))


if __name__ == "__main__":
    sys.exit(main())

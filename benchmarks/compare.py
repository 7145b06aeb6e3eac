"""What got slower, or faster, between two result files, beyond noise.

    python -m fastdiff bench compare old.json new.json

A provider is judged by its ratio to eager in the same run, which a slower moment of the machine leaves alone; eager
itself, and what has no ratio, by its time. It got slower if the 95 % intervals of the two runs do not overlap and the
medians differ by more than the margin: between processes on a shared machine a ratio moves more than within one.
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


@dataclass(frozen=True)
class Change:
    """One provider of one row, in both runs. ``factor`` is the new speed / the old speed."""

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


def _speed(timing: dict[str, Any], baseline: bool) -> tuple[float, float, float] | None:
    if not baseline:
        return timing["ratio"], timing["ratio_low"], timing["ratio_high"]
    if not timing.get("low_ms"):
        return None  # from before intervals of times were kept
    return 1 / timing["median_ms"], 1 / timing["high_ms"], 1 / timing["low_ms"]


def compared(old: dict[str, Any], new: dict[str, Any], margin: float = MARGIN) -> list[Change]:
    """All providers of all rows that both results have."""
    changes = []
    for section in [s for s in new if s in old and "environments" in new[s]]:
        before = {key_of(row): row for row in rows_of(old[section])}
        for row in rows_of(new[section]):
            earlier = before.get(key_of(row))
            if earlier is None:
                continue
            timings = {t["provider"]: t for t in earlier["timings"]}
            same_device = earlier["environment"].get("cpu") == row["environment"].get("cpu")
            for index, timing in enumerate(row["timings"]):
                if timing["provider"] not in timings or (index == 0 and not same_device):
                    continue
                pair = _speed(timings[timing["provider"]], index == 0), _speed(timing, index == 0)
                if pair[0] is None or pair[1] is None:
                    continue
                changes.append(Change(section, row["name"], row["dtype"], timing["provider"], pair[1][0] / pair[0][0],
                                      judge(pair[0], pair[1], margin)))  # fmt: skip
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
    return any(c.verdict == "slower" and c.provider.startswith("fastdiff") for c in moved)


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

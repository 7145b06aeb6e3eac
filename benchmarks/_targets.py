"""What the project set itself, and whether a row of a result file reaches it.

``row["target"]`` is the speed-up over eager, of host time the most microseconds; further targets are in
``row["extra"]["targets"]``, each a :class:`Target` as a dictionary. A target is judged by our fastest side; "packed
weights", an option that costs memory, has no part in it. Cold start is judged side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Entry = dict[str, Any]
#: What tables show targets of without saying so.
PLAIN = ("speed over eager", "us on top per kernel")


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        measure: ``"speed"``, at least ``value`` times the fastest provider whose name begins with ``about``;
            ``"bandwidth"``, at least this share of the measured copy bandwidth; ``"seconds"``, at most so many of the
            phase ``about`` of a cold start; ``"more seconds"``, at most so many more than eager's until the first
            picture; ``"overhead"``, at most so many microseconds per kernel.
        of: the provider; our fastest if empty.
    """

    measure: str
    value: float
    about: str = "eager"
    of: str = ""


def as_extra(*targets: Target) -> list[dict[str, Any]]:
    """The value of ``extra["targets"]``."""
    return [asdict(target) for target in targets]


@dataclass(frozen=True)
class Verdict:
    """What became of a target.

    Attributes:
        of: the provider, empty if it is whichever of ours is the fastest.
        what: what was to be reached.
        value: the number set.
        reached: the number measured, ``None`` if there is none.
        met: whether it is reached. "No slower than", a speed of 1, allows for noise: the intervals decide.
    """

    of: str
    what: str
    value: float
    reached: float | None = None
    met: bool = False

    @property
    def said(self) -> str:
        return "not measured" if self.reached is None else "reached" if self.met else "missed"


def timing_of(row: Entry, provider: str) -> Entry | None:
    """One provider's timing, if it has one."""
    return next((t for t in row["timings"] if t["provider"] == provider), None)


def ours_of(row: Entry) -> list[Entry]:
    """Our timings."""
    return [t for t in row["timings"] if t["provider"].startswith("fastdiff")]


def _judged(row: Entry, of: str) -> Entry | None:
    if of:
        return timing_of(row, of)
    found = [t for t in ours_of(row) if not t["provider"].endswith("packed weights")]
    return max(found, key=lambda t: t["ratio"], default=None)


def _speed(row: Entry, target: Target) -> Iterator[Verdict]:
    what = f"speed over {target.about}"
    ours = _judged(row, target.of)
    rivals = [t for t in row["timings"] if t["provider"].startswith(target.about)]
    if ours is None or not rivals:
        yield Verdict(target.of, what, target.value)
        return
    rival = max(rivals, key=lambda t: t["ratio"])
    reached = ours["ratio"] / rival["ratio"]
    most = ours["ratio_high"] / rival["ratio_low"] if target.value == 1.0 else reached
    yield Verdict(target.of, what, target.value, reached, most >= target.value)


def _bandwidth(row: Entry, target: Target) -> Iterator[Verdict]:
    """GroupNorm reads what is larger than the cache twice."""
    timing, extra = timing_of(row, target.of), row["extra"]
    share = None
    if timing is not None:
        moved = row["bytes_moved"] + extra.get("second_read", 0)
        share = moved / extra["bandwidth"] / (timing["median_ms"] / 1e3)
    yield Verdict(target.of, "share of copy bandwidth", target.value, share, (share or 0.0) >= target.value)


def _seconds(row: Entry, target: Target) -> Iterator[Verdict]:
    for timing in ours_of(row) or [{"provider": "fastdiff"}]:
        side = timing["provider"]
        phases = row["extra"].get("phases", {}).get(side)
        spent = phases[target.about][0] if phases else None
        met = spent is not None and spent <= target.value
        yield Verdict(side, f"seconds of {target.about}", target.value, spent, met)


def _more_seconds(row: Entry, target: Target) -> Iterator[Verdict]:
    eager = timing_of(row, "eager")
    for timing in ours_of(row) or [{"provider": "fastdiff"}]:
        more = (timing["median_ms"] - eager["median_ms"]) / 1e3 if eager and "median_ms" in timing else None
        met = more is not None and more <= target.value
        yield Verdict(timing["provider"], "seconds to the first picture more than eager's", target.value, more, met)


def _overhead(row: Entry, target: Target) -> Iterator[Verdict]:
    added = row["extra"].get("overhead_us")
    yield Verdict("", "us on top per kernel", target.value, added, added is not None and added <= target.value)


_JUDGES = {
    "speed": _speed,
    "bandwidth": _bandwidth,
    "seconds": _seconds,
    "more seconds": _more_seconds,
    "overhead": _overhead,
}


def verdicts(row: Entry) -> list[Verdict]:
    """Of all targets of a row, the speed-up over eager first."""
    first = "overhead" if "overhead_us" in row["extra"] else "speed"
    targets = [Target(first, row["target"])] if row.get("target") else []
    targets += [Target(**entry) for entry in row["extra"].get("targets", ())]
    return [verdict for target in targets for verdict in _JUDGES[target.measure](row, target)]


def text(row: Entry, side: str = "", *, brief: bool = False) -> str:
    """The targets of a row in a cell of a table: the number, and where it was not reached.

    Args:
        side: only the targets of this provider.
        brief: of targets that need words only those that were missed.
    """
    said = []
    for verdict in verdicts(row):
        plain = verdict.what in PLAIN
        if (side and verdict.of != side) or (brief and not plain and verdict.said != "missed"):
            continue
        words = f"{verdict.value:g}", "" if plain else verdict.what, "" if side else verdict.of
        said.append(" ".join(filter(None, words)) + ("" if verdict.met else f" ({verdict.said})"))
    return "; ".join(said)

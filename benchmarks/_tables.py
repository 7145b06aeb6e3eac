"""The tables of README.md and docs/kernels.md, one function per section of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import _targets
from _targets import Entry, ours_of, timing_of

MIB = 1 << 20


def best_of(row: Entry) -> Entry | None:
    """What ``patch`` without options gives, and for single kernels the fastest of ours."""
    return timing_of(row, "fastdiff") or min(ours_of(row), key=lambda t: t["median_ms"], default=None)


def providers_of(rows: Iterable[Entry]) -> list[str]:
    """The providers beside the baseline: ours, compilers, then other libraries."""
    found = dict.fromkeys(t["provider"] for row in rows for t in row["timings"][1:])
    return sorted(found, key=lambda p: (not p.startswith("fastdiff"), not p.startswith("torch"), p))


def ratio(timing: Entry | None) -> str:
    """A ratio with its interval, bold where it is a loss."""
    if timing is None:
        return ""
    text = f"{timing['ratio']:.2f}"
    return f"{f'**{text}**' if timing['ratio'] < 1.0 else text} ({timing['ratio_low']:.2f}-{timing['ratio_high']:.2f})"


def lines(columns: str, rows: Iterable[Iterable[str]], left: int) -> str:
    """A Markdown table; all columns but the first ``left`` ones are numbers."""
    names = columns.split("|")
    head = [f"| {' | '.join(names)} |", f"|{'---|' * left}{'---:|' * (len(names) - left)}"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def kernels(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """One line per case and dtype; the floor is a roofline, see the page."""
    providers = providers_of(rows)

    def cells(row: Entry) -> list[str]:
        best, floor = best_of(row), row["floor_ms"]
        note = f" ({row['note']})" if row["note"] else ""
        return [
            row["name"] + note, row["extra"].get("of", ""), row["dtype"], row["allocator"], *run(row),
            f"{row['timings'][0]['median_ms']:.3f}", f"{best['median_ms']:.3f}" if best else "",
            f"{floor:.3f}" if floor else "", f"{floor / best['median_ms']:.0%}" if floor and best else "",
            *(ratio(timing_of(row, p)) for p in providers), _targets.text(row, brief=True),
        ]  # fmt: skip

    runs = ["run"] * len(run(rows[0]))
    columns = ["op, shape", "layer of", "dtype", "allocator", *runs, "eager ms", "fastdiff ms", "floor ms",
               "of the floor", *providers, "target"]  # fmt: skip
    return lines("|".join(columns), map(cells, rows), 4 + len(runs))


def models(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Speed-ups within a process, and of 'patched, thresholds raised' over 'eager, stock'."""
    of_key = {(r["name"], r["dtype"], r["allocator"]): r for r in rows}
    stock = [r for r in rows if r["allocator"] == "stock"]
    providers = providers_of(stock)
    both = any(r["allocator"] == "tuned" for r in rows)

    def cells(row: Entry) -> list[str]:
        eager, best = row["timings"][0], best_of(row)
        floor = row["floor_ms"]
        tuned = of_key.get((row["name"], row["dtype"], "tuned"))
        ours = timing_of(tuned, "fastdiff") if tuned else None
        raised = [ratio(ours), f"{eager['median_ms'] / ours['median_ms']:.2f}" if ours else ""] if both else []
        return [
            row["name"], row["dtype"], *run(row), f"{eager['median_ms'] / 1e3:.3g}",
            f"{best['median_ms'] / 1e3:.3g}" if best else "", f"{floor / 1e3:.2g}" if floor else "",
            f"{floor / best['median_ms']:.0%}" if floor and best else "",
            *(ratio(timing_of(row, p)) for p in providers), _targets.text(row), *raised,
        ]  # fmt: skip

    runs = ["run"] * len(run(rows[0]))
    raised = ["both with raised thresholds", "patched + raised / eager"] if both else []
    columns = ["model", "dtype", *runs, "eager s", "fastdiff s", "floor s", "of the floor", *providers, "target",
               *raised]  # fmt: skip
    return lines("|".join(columns), map(cells, stock), 2 + len(runs))


def cold_start(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Seconds of every phase of a cold start."""
    aims = ["targets"] if any(row["extra"].get("targets") for row in rows) else []

    def of_row(row: Entry) -> Iterable[list[str]]:
        for timing in row["timings"]:
            side = timing["provider"]
            phases = row["extra"]["phases"][side]
            interval = f"{timing['median_ms'] / 1e3:.2f} ({timing['low_ms'] / 1e3:.2f}-{timing['high_ms'] / 1e3:.2f})"
            yield [row["name"], row["dtype"], *run(row), side, interval,
                   *(f"{phases[name][0]:.2f}" for name in phases),
                   *(_targets.text(row, side) for _ in aims)]  # fmt: skip

    names = list(next(iter(rows[0]["extra"]["phases"].values())))
    runs = ["run"] * len(run(rows[0]))
    columns = ["pipeline", "dtype", *runs, "side", "until the first picture, s", *names, *aims]
    return lines("|".join(columns), (c for row in rows for c in of_row(row)), 3 + len(runs))


def _has_tensors(row: Entry) -> bool:
    return any("tensors" in found for found in row["extra"]["bytes"].values())


def memory(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Peak memory above the weights, and its ratio to eager's."""
    sides = list(dict.fromkeys(side for row in rows for side in row["extra"]["bytes"]))

    def size(found: dict[str, dict[str, int]], side: str, what: str) -> str:
        if what not in found.get(side, ()):  # of all memory alone, in older rows
            return ""
        text, share = f"{found[side][what] / MIB:.0f}", found[side][what] / max(found["eager"][what], 1)
        return text if side == "eager" else f"{text} ({f'**{share:.2f}**' if share > 1.005 else f'{share:.2f}'})"

    def cells(row: Entry) -> list[str]:
        found = row["extra"]["bytes"]
        sizes = (size(found, side, what) for side in sides for what in kinds)
        return [row["name"], row["dtype"], row["allocator"], *run(row), f"{row['extra']['weights'] / MIB:.0f}", *sizes]

    kinds = {"peak": "", "tensors": ", its tensors"} if any(_has_tensors(row) for row in rows) else {"peak": ""}
    runs = ["run"] * len(run(rows[0]))
    columns = ["model", "dtype", "allocator", *runs, "weights MiB",
               *(f"{side}{kind} MiB" for side in sides for kind in kinds.values())]  # fmt: skip
    return lines("|".join(columns), map(cells, rows), 3 + len(runs))


def overhead(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Microseconds per call of a layer."""
    runs = ["run"] * len(run(rows[0]))
    found = (
        [row["name"], *run(row), str(row["extra"]["kernels"]), *(f"{t['median_ms'] * 1e3:.1f}" for t in row["timings"]),
         f"{row['extra']['overhead_us']:.1f}", _targets.text(row)]
        for row in rows
    )  # fmt: skip
    columns = ["layer", *runs, "kernels", "stock us", "patched us", "bare us", "on top, per kernel, us", "target"]
    return lines("|".join(columns), found, 1 + len(runs))


def schedulers(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Host time per sampler step, stock and fused."""
    runs = ["run"] * len(run(rows[0]))
    found = (
        [row["name"], *run(row), *(f"{t['median_ms'] * 1e3:.0f}" for t in row["timings"]), ratio(row["timings"][1]),
         _targets.text(row)]
        for row in rows
    )  # fmt: skip
    return lines("|".join(["sampler", *runs, "stock us", "fastdiff us", "speed-up", "target"]), found, 1 + len(runs))


def pipelines(rows: list[Entry]) -> str:
    """One line per model of a pipeline."""

    def cells(row: Entry) -> list[str]:
        saved = f" -> {row['after']} (-{1 - row['after'] / row['before']:.0%})" if row["patched"] else ""
        left = "; ".join(f"{count} {what}" for what, count in row["left"].items())
        return [
            row["pipelines"], f"`{row['model']}`", row["configuration"], f"{row['patched']} of {row['places']}",
            f"{row['before']}{saved}", left,
        ]  # fmt: skip

    return "\n".join([
        "| pipeline | model | configuration | places patched | launches a forward | left alone |",
        "|---|---|---|---:|---:|---|",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ])  # fmt: skip


def losses(sections: dict[str, list[Entry]], beyond_noise: bool = True) -> list[list[str]]:
    """(section, case, dtype, provider, ratio) of all of ours that are slower than eager, the worst first."""
    found = [
        (t["ratio"], [name, row["name"], row["dtype"], t["provider"], ratio(t)])
        for name, rows in sections.items()
        for row in rows
        for t in ours_of(row)
        if (t["ratio_high"] if beyond_noise else t["ratio"]) < 1.0
    ]
    return [cells for _, cells in sorted(found, key=lambda pair: pair[0])]

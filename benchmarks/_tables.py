"""The tables of README.md and docs/kernels.md, one function per section of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Entry = dict[str, Any]
MIB = 1 << 20


def timing_of(row: Entry, provider: str) -> Entry | None:
    """One provider's timing, if it has one."""
    return next((t for t in row["timings"] if t["provider"] == provider), None)


def ours_of(row: Entry) -> list[Entry]:
    """Our timings."""
    return [t for t in row["timings"] if t["provider"].startswith("fastdiff")]


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


def target(row: Entry) -> str:
    """The target, and whether it was missed (:func:`best_of`)."""
    if not row.get("target"):
        return ""
    best = best_of(row)
    return f"{row['target']:g}{'' if best and best['ratio'] >= row['target'] else ' (missed)'}"


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
            *(ratio(timing_of(row, p)) for p in providers), target(row),
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
        tuned = of_key.get((row["name"], row["dtype"], "tuned"))
        ours = timing_of(tuned, "fastdiff") if tuned else None
        raised = [ratio(ours), f"{eager['median_ms'] / ours['median_ms']:.2f}" if ours else ""] if both else []
        return [
            row["name"], row["dtype"], *run(row), f"{eager['median_ms'] / 1e3:.3g}",
            f"{best['median_ms'] / 1e3:.3g}" if best else "", f"{row['floor_ms'] / 1e3:.2g}" if row["floor_ms"] else "",
            *(ratio(timing_of(row, p)) for p in providers), target(row), *raised,
        ]  # fmt: skip

    runs = ["run"] * len(run(rows[0]))
    raised = ["both with raised thresholds", "patched + raised / eager"] if both else []
    columns = ["model", "dtype", *runs, "eager s", "fastdiff s", "floor s", *providers, "target", *raised]
    return lines("|".join(columns), map(cells, stock), 2 + len(runs))


def cold_start(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Seconds of every phase of a cold start."""

    def of_row(row: Entry) -> Iterable[list[str]]:
        for timing in row["timings"]:
            phases = row["extra"]["phases"][timing["provider"]]
            interval = f"{timing['median_ms'] / 1e3:.2f} ({timing['low_ms'] / 1e3:.2f}-{timing['high_ms'] / 1e3:.2f})"
            yield [row["name"], row["dtype"], *run(row), timing["provider"], interval,
                   *(f"{phases[name][0]:.2f}" for name in phases)]  # fmt: skip

    names = list(next(iter(rows[0]["extra"]["phases"].values())))
    runs = ["run"] * len(run(rows[0]))
    columns = ["pipeline", "dtype", *runs, "side", "until the first picture, s", *names]
    return lines("|".join(columns), (c for row in rows for c in of_row(row)), 3 + len(runs))


def memory(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Peak memory above the weights, and its ratio to eager's."""
    sides = list(dict.fromkeys(side for row in rows for side in row["extra"]["bytes"]))

    def cells(row: Entry) -> list[str]:
        found = row["extra"]["bytes"]
        peaks = []
        for side in sides:
            share = found[side]["peak"] / max(found["eager"]["peak"], 1) if side in found else 0.0
            text = f"{found[side]['peak'] / MIB:.0f}" if side in found else ""
            peaks.append(f"{text} ({f'**{share:.2f}**' if share > 1 else f'{share:.2f}'})" if text and side != "eager"
                         else text)  # fmt: skip
        return [row["name"], row["dtype"], row["allocator"], *run(row), f"{row['extra']['weights'] / MIB:.0f}", *peaks]

    runs = ["run"] * len(run(rows[0]))
    columns = ["model", "dtype", "allocator", *runs, "weights MiB", *(f"{side} MiB" for side in sides)]
    return lines("|".join(columns), map(cells, rows), 3 + len(runs))


def overhead(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Microseconds per call of a layer."""
    runs = ["run"] * len(run(rows[0]))
    found = (
        [row["name"], *run(row), str(row["extra"]["kernels"]), *(f"{t['median_ms'] * 1e3:.1f}" for t in row["timings"]),
         f"{row['extra']['overhead_us']:.1f}"]
        for row in rows
    )  # fmt: skip
    columns = ["layer", *runs, "kernels", "stock us", "patched us", "bare us", "on top, per kernel, us"]
    return lines("|".join(columns), found, 1 + len(runs))


def schedulers(rows: list[Entry], run: Callable[[Entry], list[str]]) -> str:
    """Host time per sampler step, stock and fused."""
    runs = ["run"] * len(run(rows[0]))
    found = (
        [row["name"], *run(row), *(f"{t['median_ms'] * 1e3:.0f}" for t in row["timings"]), ratio(row["timings"][1]),
         target(row)]
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

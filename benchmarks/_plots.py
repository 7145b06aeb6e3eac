"""The plots of docs/: kernels against eager, per op against the roofline, models, cold start.

Losses are left of the line at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _tables import providers_of
from _targets import Entry, timing_of

#: By the beginning of a provider's name; the first that fits.
COLORS = {
    "fastdiff, CUDA graphs": "#164a38",
    "fastdiff cuda, CUDA graphs": "#0f3d2e", "fastdiff triton, CUDA graphs": "#3c8a66",
    "eager": "#4d5560",
    "fastdiff cuda": "#1d5c46", "fastdiff triton": "#58ad86", "fastdiff, packed": "#8fd0b0",
    "fastdiff": "#2a7f62", "torch.compile max": "#8d99a6", "torch.compile": "#c3cad1", "xFormers": "#d98e4a",
    "flash-attn": "#c1553b", "SageAttention": "#8a5a9e", "Liger": "#4a7fb5", "comfy-kitchen": "#b59b4a",
}  # fmt: skip
#: More rows than this are not drawn into one picture.
MOST_NAMES = 64
RATIO, SHARE = "eager time / provider time", "share of the roofline's speed"
#: Of a phase that everybody pays for, and of those that differ.
SHADES = {"import": "#d9dde1", "build": "#b0b7bf", "prepare": "#d98e4a", "first picture": "#2a7f62"}


def _bars(rows: list[Entry], path: Path) -> None:
    """Horizontal bars of speed-ups: a group per row, a bar per provider, a panel per dtype."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    providers = providers_of(rows)
    height = 0.8 / max(len(providers), 1)
    figure, panels = _panels(rows, names, 0.14 * (1 + len(providers)), RATIO)
    for dtype, axis in panels.items():
        of_name = {r["name"]: r for r in rows if r["dtype"] == dtype}
        for index, provider in enumerate(providers):
            values = [_ratio(of_name[n], provider) if n in of_name else 0.0 for n in names]
            positions = [i + (index + 0.5) * height - 0.4 for i in range(len(names))]
            bars = axis.barh(positions, values, height=height, color=_color(provider), label=provider)
            axis.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], padding=2, fontsize=6)
        axis.margins(x=0.08)
    _finish(figure, axis, path)


def _roofline(rows: list[Entry], path: Path) -> None:
    """Shares of the roofline's speed: a line per op and provider, a dot per shape, a panel per dtype."""
    ops = list(dict.fromkeys(r["extra"]["op"] for r in rows))
    providers = ["eager", *providers_of(rows)]
    height = 0.8 / len(providers)
    figure, panels = _panels(rows, ops, 0.14 * (1 + len(providers)), SHARE)
    for dtype, axis in panels.items():
        for index, provider in enumerate(providers):
            dots = [(share, ops.index(r["extra"]["op"]) + (index + 0.5) * height - 0.4) for r in rows
                    if r["dtype"] == dtype and (share := _share_of_floor(r, provider))]  # fmt: skip
            axis.plot(*(zip(*dots, strict=True) if dots else ((), ())), "o", color=_color(provider), label=provider,
                      markersize=4, alpha=0.7)  # fmt: skip
        axis.set_xlim(left=0)
        for between in range(1, len(ops)):
            axis.axhline(between - 0.5, color="#d9dde1", linewidth=0.6)
    _finish(figure, axis, path)


def _panels(rows: list[Entry], names: list[str], inches: float, title: str) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel per dtype, a line of so many inches per name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = sorted({r["dtype"] for r in rows}, reverse=True)
    size = (7 * len(dtypes), inches * len(names) + 1.4)
    figure, axes = plt.subplots(1, len(dtypes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for dtype, axis in zip(dtypes, axes[0], strict=True):
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"{dtype}: {title}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, dict(zip(dtypes, axes[0], strict=True))


def _finish(figure: Any, axis: Any, path: Path) -> None:
    """With the legend of a panel below all."""
    import matplotlib.pyplot as plt

    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _color(provider: str) -> str:
    return next((color for start, color in COLORS.items() if provider.startswith(start)), "#000000")


def _ratio(row: Entry, provider: str) -> float:
    timing = timing_of(row, provider)
    return timing["ratio"] if timing else 0.0


def _share_of_floor(row: Entry, provider: str) -> float:
    timing = timing_of(row, provider)
    return row["floor_ms"] / timing["median_ms"] if timing else 0.0


def _cold_start(rows: list[Entry], path: Path) -> None:
    """Stacked phases until the first picture, one bar per side, and what comes after it in numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{r['name']}, {r['dtype']}\n{t['provider']}", r["extra"]["phases"][t["provider"]])
            for r in rows for t in r["timings"]]  # fmt: skip
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(bars) + 1.4), layout="constrained")
    left = [0.0] * len(bars)
    for phase, color in SHADES.items():
        widths = [phases[phase][0] for _, phases in bars]
        axis.barh(range(len(bars)), widths, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, (_, phases) in enumerate(bars):
        new, other = phases["new size"][0], phases["other LoRA"][0]
        after = f"  {left[index]:.1f} s; new size {new:.1f} s, other LoRA {other:.1f} s"
        axis.text(left[index], index, after, va="center", fontsize=7)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axis.set_xlim(0, 1.8 * max(left))
    axis.set_xlabel("seconds")
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    _finish(figure, axis, path)


def _parts(rows: list[Entry]) -> dict[str, list[Entry]]:
    """All in one picture, or one per op where that would be too long; by what the file's name ends in."""
    if len({r["name"] for r in rows}) <= MOST_NAMES:
        return {"": rows} if rows else {}
    parts: dict[str, list[Entry]] = {}
    for row in rows:
        parts.setdefault(f"-{row['extra']['op']}", []).append(row)
    return parts


def plots(results: dict[str, dict[str, list[Entry]]]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(file name, function that draws it) of all plots of all result files."""
    for device, sections in results.items():
        stock = {name: [r for r in rows if r["allocator"] == "stock"] for name, rows in sections.items()}
        timed = [r for r in stock.get("kernels", []) if len(r["timings"]) > 1]
        for op, rows in _parts(timed).items():
            yield f"kernels-{device}{op}.png", partial(_bars, rows)
        if floored := [r for r in timed if r["floor_ms"]]:
            yield f"roofline-{device}.png", partial(_roofline, floored)
        if stock.get("models"):
            yield f"models-{device}.png", partial(_bars, stock["models"])
        if stock.get("cold start"):
            yield f"cold-start-{device}.png", partial(_cold_start, stock["cold start"])

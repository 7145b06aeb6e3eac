"""Turn ``benchmarks/results/*.json`` into the tables and plots of README.md and docs/kernels.md.

python benchmarks/report.py            # rewrite them between their markers, redraw docs/*.png
python benchmarks/report.py --check    # exit 1 if they are not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLOTS = HERE.parent / "docs"
PAGES = (HERE.parent / "README.md", PLOTS / "kernels.md")


def _timing(row: dict[str, Any], provider: str) -> dict[str, Any] | None:
    return next((t for t in row["timings"] if t["provider"] == provider), None)


def _ratio(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return ""
    ratio = f"{timing['ratio']:.2f}"
    if timing["ratio"] < 1.0:
        ratio = f"**{ratio}**"
    return f"{ratio} ({timing['ratio_low']:.2f}-{timing['ratio_high']:.2f})"


def _target(row: dict[str, Any]) -> str:
    """The target, and whether it was missed."""
    target = row.get("target")
    if not target:
        return ""
    ours = _timing(row, "fastdiff")
    return f"{target:g}" if ours and ours["ratio"] >= target else f"{target:g} (missed)"


def kernel_table(section: dict[str, Any]) -> str:
    """One line per case and dtype."""
    lines = [
        "| op, shape | dtype | allocator | eager ms | fastdiff ms | floor ms | speed-up | torch.compile | target |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in section["rows"]:
        eager, ours = _timing(row, "eager"), _timing(row, "fastdiff")
        if eager is None or ours is None:
            continue
        floor = f"{row['floor_ms']:.3f}" if row["floor_ms"] else ""
        lines.append(
            f"| {row['name']} | {row['dtype']} | {row['allocator']} | {eager['median_ms']:.3f} | "
            f"{ours['median_ms']:.3f} | {floor} | {_ratio(ours)} | {_ratio(_timing(row, 'torch.compile'))} | "
            f"{_target(row)} |"
        )
    return "\n".join(lines)


def model_table(section: dict[str, Any]) -> str:
    """Speed-ups within a process, and of 'patched, thresholds raised' over 'eager, stock'."""
    rows = {(r["name"], r["dtype"], r["allocator"]): r for r in section["rows"]}
    lines = [
        "| model | dtype | eager s | patched s | speed-up | target | with packed weights | both with raised thresholds "
        "| patched + raised / eager |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, dtype, allocator), row in rows.items():
        if allocator != "stock":
            continue
        tuned = rows.get((name, dtype, "tuned"))
        eager, ours = _timing(row, "eager"), _timing(row, "fastdiff")
        if eager is None or ours is None:
            continue
        within = across = ""
        if tuned is not None:
            tuned_ours = _timing(tuned, "fastdiff")
            assert tuned_ours is not None
            within = _ratio(tuned_ours)
            across = f"{eager['median_ms'] / tuned_ours['median_ms']:.2f}"
        lines.append(
            f"| {name} | {dtype} | {eager['median_ms'] / 1e3:.2f} | {ours['median_ms'] / 1e3:.2f} | "
            f"{_ratio(ours)} | {_target(row)} | {_ratio(_timing(row, 'fastdiff, packed weights'))} | {within} | "
            f"{across} |"
        )
    return "\n".join(lines)


def overhead_table(section: dict[str, Any]) -> str:
    """Microseconds per call of a layer."""
    lines = [
        "| layer | kernels | stock us | patched us | bare us | on top, per kernel, us |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in section["rows"]:
        times = " | ".join(f"{t['median_ms'] * 1e3:.1f}" for t in row["timings"])
        lines.append(f"| {row['name']} | {row['extra']['kernels']} | {times} | {row['extra']['overhead_us']:.1f} |")
    return "\n".join(lines)


def pipeline_table(section: dict[str, Any]) -> str:
    """One line per model of a pipeline."""
    lines = [
        "| pipeline | model | configuration | places patched | launches a forward | left alone |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in section["rows"]:
        saved = f" -> {row['after']} (-{1 - row['after'] / row['before']:.0%})" if row["patched"] else ""
        left = "; ".join(f"{count} {what}" for what, count in row["left"].items())
        lines.append(
            f"| {row['pipelines']} | `{row['model']}` | {row['configuration']} | {row['patched']} of {row['places']} | "
            f"{row['before']}{saved} | {left} |"
        )
    return "\n".join(lines)


def scheduler_table(section: dict[str, Any]) -> str:
    """Host time per sampler step, stock and fused."""
    lines = ["| sampler | stock us | fastdiff us | speed-up | target |", "|---|---:|---:|---:|---:|"]
    for row in section["rows"]:
        stock, ours = _timing(row, "eager"), _timing(row, "fastdiff")
        if stock is not None and ours is not None:
            lines.append(
                f"| {row['name']} | {stock['median_ms'] * 1e3:.0f} | {ours['median_ms'] * 1e3:.0f} | {_ratio(ours)} | "
                f"{_target(row)} |"
            )
    return "\n".join(lines)


TABLES = {
    "kernels": kernel_table,
    "models": model_table,
    "overhead": overhead_table,
    "schedulers": scheduler_table,
    "pipelines": pipeline_table,
}


def _environment(section: dict[str, Any]) -> str:
    env = section["environment"]
    if "diffusers" in env:
        return f"Diffusers {env['diffusers']}, CPU kernels, counted on the published configurations."
    return (
        f"{env['cpu']} ({', '.join(env['cpu_flags'])}), {env['threads']} threads, torch {env['torch']}, "
        f"kernels {env['fastdiff_isa']}, commit {env['commit']}, {env['date']}."
    )


def render(page: str) -> str:
    """``page`` with every ``<!-- results:SECTION -->`` block replaced."""
    for section_name, table in TABLES.items():
        parts = []
        for path in sorted((HERE / "results").glob("*.json")):
            section = json.loads(path.read_text()).get(section_name)
            if section:
                parts.append(f"{_environment(section)}\n\n{table(section)}")
        body = "\n\n".join(parts) or "Not measured yet."
        pattern = rf"(<!-- results:{section_name} -->\n).*?(\n<!-- /results -->)"
        page = re.sub(pattern, lambda m, b=body: m[1] + b + m[2], page, flags=re.DOTALL)
    return page


def plot(section: dict[str, Any], path: Path) -> None:
    """Bars of eager / provider per case, one panel per dtype, against 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in section["rows"] if r["allocator"] == "stock"]
    dtypes = sorted({r["dtype"] for r in rows}, reverse=True)
    names = list(dict.fromkeys(r["name"] for r in rows))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(7 * len(dtypes), 0.42 * len(names) + 1.6), sharey=True, squeeze=False
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        of_name = {r["name"]: r for r in rows if r["dtype"] == dtype}
        for offset, provider, color in ((-0.2, "fastdiff", "#2a7f62"), (0.2, "torch.compile", "#b0b7bf")):
            ratios = [(_timing(of_name[n], provider) or {}).get("ratio", 0) if n in of_name else 0 for n in names]
            positions = [i + offset for i in range(len(names))]
            bars = axis.barh(positions, ratios, height=0.38, color=color, label=provider)
            axis.bar_label(bars, [f"{r:.2f}" if r else "" for r in ratios], padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(f"{dtype}: eager time / provider time")
        axis.legend(loc="lower right", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a page is stale")
    options = parser.parse_args()
    stale = [page for page in PAGES if page.read_text() != render(page.read_text())]
    if options.check:
        for page in stale:
            print(f"{page.name} does not match benchmarks/results: run python benchmarks/report.py", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.write_text(render(page.read_text()))
    for path in sorted((HERE / "results").glob("*.json")):
        section = json.loads(path.read_text()).get("kernels")
        if section:
            plot(section, PLOTS / f"kernels-{path.stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

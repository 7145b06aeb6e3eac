"""Turn ``benchmarks/results/*.json`` into what README.md, docs/ and the choice of kernels show of them.

python -m fastdiff bench report            # rewrite tables between their markers, plots, and the table of losing sizes
python -m fastdiff bench report --check    # exit 1 if tables or losing sizes are not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _tables
from _losses import TABLE, losing_sizes
from _plots import plots
from _results import RESULTS, load, rows_of

ROOT = Path(__file__).resolve().parents[1]
#: Sections whose rows are compared with eager.
WITH_LOSSES = ("kernels", "models", "cold start", "schedulers")
#: Sections that a GPU has too, and what stands there until one has.
ON_GPU = ("kernels", "models", "cold start", "memory")
NO_GPU = "GPU: not measured yet; `make gpu` on a machine with one adds its table here."
PLOTS = ROOT / "docs"
PAGES = (ROOT / "README.md", PLOTS / "kernels.md", PLOTS / "benchmarks.md")
TABLES: dict[str, Callable[..., str]] = {
    "kernels": _tables.kernels,
    "models": _tables.models,
    "cold start": _tables.cold_start,
    "memory": _tables.memory,
    "overhead": _tables.overhead,
    "schedulers": _tables.schedulers,
}


def results() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Measured rows with their environments, by result file and section."""
    return {
        path.stem: {name: rows_of(body) for name, body in load(path).items() if "environments" in body}
        for path in sorted(RESULTS.glob("*.json"))
    }


def describe(environment: dict[str, Any]) -> str:
    """One line about a machine and a run."""
    if environment.get("gpu"):
        where = f"{environment['gpu']}, CUDA, Triton {environment.get('triton') or 'absent'}"
    else:
        where = f"{environment['cpu']} ({', '.join(environment['cpu_flags'])}), {environment['threads']} threads"
    kernels = "" if environment.get("gpu") else f"kernels {environment['fastdiff_isa']}, "
    return f"{where}, torch {environment['torch']}, {kernels}commit {environment['commit']}, {environment['date']}."


def _table(table: Callable[..., str], rows: list[dict[str, Any]]) -> str:
    """A table under its environments; they are numbered, and rows name theirs, where there are several."""
    environments: list[str] = []
    for row in rows:
        text = describe(row["environment"])
        if text not in environments:
            environments.append(text)
    if len(environments) == 1:
        return f"{environments[0]}\n\n{table(rows, lambda row: [])}"
    runs = "\n".join(f"{number}. {text}" for number, text in enumerate(environments, 1))
    number_of = lambda row: [str(1 + environments.index(describe(row["environment"])))]  # noqa: E731
    return f"{runs}\n\n{table(rows, number_of)}"


def _pipelines() -> str:
    section = load(RESULTS / "pipelines.json").get("pipelines")
    if section is None:
        return "Not counted yet."
    diffusers = section["environment"]["diffusers"]
    said = f"Diffusers {diffusers}, CPU kernels, counted on the published configurations."
    return f"{said}\n\n{_tables.pipelines(section['rows'])}"


def _of_gpu(rows: list[dict[str, Any]]) -> bool:
    return any(row["environment"].get("gpu") for row in rows)


def blocks() -> dict[str, str]:
    """What stands between each pair of markers."""
    measured = results()
    found = {"pipelines": _pipelines()}
    for name, table in TABLES.items():
        parts = [_table(table, sections[name]) for sections in measured.values() if sections.get(name)]
        parts = parts or ["Not measured yet."]
        if name in ON_GPU and not any(_of_gpu(sections.get(name, [])) for sections in measured.values()):
            parts.append(NO_GPU)
        found[name] = "\n\n".join(parts)
    lost = [
        (device, *cells)
        for device, sections in measured.items()
        for cells in _tables.losses({k: v for k, v in sections.items() if k in WITH_LOSSES})
    ]
    found["losses"] = (
        _tables.lines("results|section|case|dtype|provider|speed-up", lost, 5) if lost else "None beyond noise."
    )
    found["plots"] = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name, _ in plots(measured))
    return found


def render(page: str, found: dict[str, str]) -> str:
    """``page`` with every ``<!-- results:SECTION -->`` block replaced."""
    for name, body in found.items():
        pattern = rf"(<!-- results:{name} -->\n).*?(\n<!-- /results -->)"
        page = re.sub(pattern, lambda m, b=body: m[1] + b + m[2], page, flags=re.DOTALL)
    return page


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when something is stale")
    options = parser.parse_args()
    found = blocks()
    wanted = {page: render(page.read_text(), found) for page in PAGES}
    wanted[TABLE] = json.dumps(losing_sizes(results()), indent=1) + "\n"
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path.name} is not what benchmarks/results says: python -m fastdiff bench report", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path])
        print(f"wrote {path.relative_to(ROOT)}")
    for name, draw in plots(results()):
        draw(PLOTS / name)
        print(f"drew docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

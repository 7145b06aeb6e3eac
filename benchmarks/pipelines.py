"""What patching covers in each published model: places replaced, and launches of a forward before and after.

    python -m fastdiff bench pipelines --save      # writes benchmarks/results/pipelines.json, which report.py reads

Models are those of tests/patching/zoo.py and transformer_models.py, with their published configurations where there
are some, else tiny. They run on fake tensors, which have shapes but no memory: kernels are chosen and operations
dispatched as for real ones.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from _results import RESULTS as FOLDER
from _results import SOURCES, Row, RowKey, load, source_digest, write
from _runner import Job, Store, add_run_options, check_run_options, run_section, wanted
from compare import Change
from rich.table import Table
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import fastdiff
from fastdiff.patching.families import example_of

ROOT = Path(__file__).parent.parent
RESULTS = FOLDER / "pipelines.json"
sys.path[:0] = [str(ROOT / "tests" / "patching"), str(ROOT / "tests")]

from fakes import fake_tensors  # noqa: E402
from published import PLAIN, Plain  # noqa: E402
from transformer_models import TRANSFORMERS, Transformer  # noqa: E402
from zoo import ZOO, Entry, model_class  # noqa: E402


def count(model: Any, pipelines: str, configuration: str, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """One line of the table; ``inputs`` where fastdiff knows none."""
    inputs = example_of(model) if inputs is None else inputs
    fastdiff.patch(model)(**inputs)
    report = fastdiff.report(model, launches=inputs)
    (launches,) = report.launches
    places = [row for row in report.rows if row.kernel]
    left = Counter(f"{row.cls}: {row.reason or row.backend}" for row in places if not row.fused)
    return {
        "pipelines": pipelines,
        "model": type(model).__name__,
        "configuration": configuration,
        "places": len(places),
        "patched": report.fused,
        "left": left,
        "before": launches.before,
        "after": launches.after,
    }


def of_zoo(entry: Entry) -> dict[str, Any]:
    """The line of a U-Net, ControlNet or VAE."""
    with fake_tensors():
        model = entry.case.build() if entry.public is None else model_class(entry.cls)(**entry.public).eval()
        return count(model, entry.pipelines, entry.source or "tiny")


def of_plain(entry: Plain) -> dict[str, Any]:
    """The line of a model with nothing to fuse."""
    with fake_tensors():
        picture = {entry.input: torch.randn(1, 3, 64, 64)}
        return count(model_class(entry.cls)().eval(), entry.pipelines, "published sizes", picture)


def of_transformer(case: Transformer) -> dict[str, Any]:
    """The line of a transformer; tiny, with all its blocks, where its forward reads values of tensors."""
    try:
        with fake_tensors():
            return count(case.published(deep=True, device="cpu"), case.name, "published sizes")
    except (DataDependentOutputException, DynamicOutputShapeException):
        with torch.no_grad():
            return count(case.build(deep=True), case.name, "tiny, all blocks")


class Counts(Store):
    """The file of counts: one set of versions for all rows, rows in the order of the models."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.section, self.path = "pipelines", RESULTS
        self.where = {"diffusers": diffusers.__version__}
        self.order = [job.name for job in jobs]
        self.source = source_digest(patterns=(*SOURCES, "tests/patching/*.py"))

    def load(self) -> dict[str, Any]:
        """The section; empty if the kept counts are of another Diffusers."""
        section = load(self.path).get(self.section, {})
        return section if section.get("environment") == self.where else {"rows": []}

    def done(self) -> set[RowKey]:
        counted = self.load().get("source", {})
        return {(name, "", "") for name in self.order if counted.get(name) == self.source}

    def keep(self, row: Row) -> None:
        section = self.load()
        of_name = {name_of(entry): entry for entry in section["rows"]} | {row.name: row.extra}
        counted = section.get("source", {}) | {row.name: self.source}
        names = [name for name in self.order if name in of_name]
        section = {"environment": self.where, "rows": [of_name[name] for name in names],
                   "source": {name: counted[name] for name in names if name in counted}}  # fmt: skip
        write(self.path, {self.section: section})

    def changes(self, old: dict[str, Any], rows: list[Row]) -> list[Change]:
        """Fewer launches are faster, whatever they cost; more places left alone are slower even so."""
        before = {name_of(entry): entry for entry in old.get(self.section, {"rows": []})["rows"]}
        found = []
        for row in rows:
            if (earlier := before.get(row.name)) is None:
                continue
            now = row.extra
            left = (now["places"] - now["patched"]) - (earlier["places"] - earlier["patched"])
            more = now["after"] - earlier["after"]
            verdict = "slower" if left > 0 or more > 0 else "faster" if more < 0 else "same"
            factor = earlier["after"] / now["after"]
            found.append(Change(self.section, row.name, "", "fastdiff, launches", factor, verdict))
        return found


def name_of(entry: dict[str, Any]) -> str:
    """What tells a row from the others."""
    return f"{entry['model']}: {entry['pipelines']}"


def jobs_of_models() -> list[Job]:
    """A job per model, in the table's order."""

    def job(count_it: Callable[[Any], dict[str, Any]], entry: Any, name: str) -> Job:
        def run() -> Row:
            return Row(name, "", "", [], extra=count_it(entry))

        return Job(name, "", "", run)

    return [
        *(job(of_zoo, e, f"{e.cls}: {e.pipelines}") for e in ZOO),
        *(job(of_plain, e, f"{e.cls}: {e.pipelines}") for e in PLAIN),
        *(job(of_transformer, case, f"{case.cls.__name__}: {case.name}") for case in TRANSFORMERS),
    ]


def show(rows: list[Row]) -> Table:
    """Places and launches."""
    table = Table(title="what patching covers, and launches of a forward")
    for column in ("model", "places", "patched", "before", "after"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(row.name, *(str(row.extra[column]) for column in ("places", "patched", "before", "after")))
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_run_options(parser)
    options = parser.parse_args()
    check_run_options(options)
    every = jobs_of_models()
    counts = Counts(every)
    if options.save and options.filter and not counts.load()["rows"]:
        raise SystemExit(f"--filter: {RESULTS.name} is not of {counts.where}; count all models first")
    return run_section(counts, [job for job in every if wanted(job.name, options)], options, show)


if __name__ == "__main__":
    sys.exit(main())

"""What patching covers in each published model: places replaced, and launches of a forward before and after.

python benchmarks/pipelines.py          # writes benchmarks/results/pipelines.json; report.py makes README's table of it

Models are those of tests/patching/zoo.py and transformer_models.py, with their published configurations where there
are some, else tiny. They run on fake tensors, which have shapes but no memory: kernels are chosen and operations
dispatched as for real ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import fastdiff
from fastdiff.patching.families import example_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "pipelines.json"
sys.path.insert(0, str(ROOT / "tests" / "patching"))

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
    except DataDependentOutputException:
        with torch.no_grad():
            return count(case.build(deep=True), case.name, "tiny, all blocks")


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rows = []
    for row in chain(map(of_zoo, ZOO), map(of_plain, PLAIN), map(of_transformer, TRANSFORMERS)):
        rows.append(row)
        print(json.dumps(row), flush=True)
    section = {"environment": {"diffusers": diffusers.__version__}, "rows": rows}
    RESULTS.write_text(json.dumps({"pipelines": section}, indent=1) + "\n")


if __name__ == "__main__":
    main()

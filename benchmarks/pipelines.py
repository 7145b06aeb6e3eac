"""What patching covers in each published model: places replaced, and launches of a forward before and after.

python benchmarks/pipelines.py          # writes benchmarks/results/pipelines.json; report.py makes README's table of it

Models are those of tests/patching/zoo.py, with their published configurations where there are some, else tiny. They
run on fake tensors, which have shapes but no memory: kernels are chosen and operations dispatched as for real ones.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastdiff
from fastdiff import backends
from fastdiff.patching.families import example_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "pipelines.json"
sys.path.insert(0, str(ROOT / "tests" / "patching"))

from zoo import ZOO, Entry, model_class  # noqa: E402


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block tensors are fake, and the backends take them for real ones."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(backends, "_PLAIN", (*backends._PLAIN, FakeTensor)))
        stack.enter_context(torch.no_grad())
        yield


def count(entry: Entry) -> dict[str, Any]:
    """One line of the table."""
    with fake_tensors():
        model = entry.case.build() if entry.public is None else model_class(entry.cls)(**entry.public).eval()
        inputs = example_of(model)
        fastdiff.patch(model)(**inputs)
        report = fastdiff.report(model, launches=inputs)
    (launches,) = report.launches
    places = [row for row in report.rows if row.kernel]
    left = Counter(f"{row.cls}: {row.reason or row.backend}" for row in places if not row.fused)
    return {
        "pipelines": entry.pipelines,
        "model": entry.cls,
        "configuration": entry.source or "tiny",
        "places": len(places),
        "patched": report.fused,
        "left": left,
        "before": launches.before,
        "after": launches.after,
    }


def main() -> None:
    """Command line."""
    rows = []
    for entry in ZOO:
        rows.append(count(entry))
        print(json.dumps(rows[-1]), flush=True)
    section = {"environment": {"diffusers": diffusers.__version__}, "rows": rows}
    RESULTS.write_text(json.dumps({"pipelines": section}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Pages and plots of results that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _plots
import cold_start
import pytest
import report
from _plots import plots
from _results import Row, Timing, save

pytest.importorskip("matplotlib")

CPU: dict[str, Any] = {"kind": "cpu amx", "cpu": "A CPU", "cpu_flags": ["avx2"], "gpu": None, "threads": 2,
                       "torch": "2", "fastdiff_isa": "amx", "commit": "c1", "date": "d"}  # fmt: skip
GPU = CPU | {"kind": "cuda sm_90", "gpu": "A GPU", "triton": "3"}


def fill(path: Path, where: dict[str, Any], *providers: str) -> None:
    """A result file with all sections that are drawn."""

    def timings() -> list[Timing]:
        found = [Timing("eager", 2.0, 1.0, 1.0, 1.0, 9, 1.9, 2.1)]
        for index, provider in enumerate(providers):
            ratio = 0.6 + 0.7 * index
            found.append(Timing(provider, 2 / ratio, ratio, 0.9 * ratio, 1.1 * ratio, 9, 1.8 / ratio, 2.2 / ratio))
        return found

    for dtype in ("fp32", "bf16"):
        rows = [Row(f"op [{n}]", dtype, "stock", timings(), floor_ms=0.5, target=1.5, extra={"op": "geglu"})
                for n in range(3)]  # fmt: skip
        save("kernels", rows, path, where)
        save("models", [Row("a model", dtype, "stock", timings(), floor_ms=0.7)], path, where)
    sides = ("eager", *providers)
    phases = {side: {p: [1.0 + index, 0.9, 1.1] for index, p in enumerate(cold_start.PHASES)} for side in sides}
    extra = {"phases": phases, "targets": cold_start.gpu_targets("cuda" if where["gpu"] else "cpu")}
    save("cold start", [Row("a pipeline", "bf16", "stock", timings(), extra=extra)], path, where)
    peaks = {side: {"peak": 3 << 20, "first": 4 << 20, "tensors": 2 << 20} for side in sides}
    save("memory", [Row("a model", "bf16", "stock", [], extra={"weights": 1 << 30, "bytes": peaks})], path, where)


def test_plots_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    fill(tmp_path / "g.json", GPU, "fastdiff triton", "fastdiff cuda", "torch.compile", "xFormers")
    drawn = dict(plots(report.results()))
    assert list(drawn) == ["kernels-g.png", "roofline-g.png", "models-g.png", "cold-start-g.png"]
    monkeypatch.setattr(_plots, "MOST_NAMES", 2)  # one per op, where they are many
    assert list(dict(plots(report.results())))[:2] == ["kernels-g-geglu.png", "roofline-g.png"]
    for name, draw in drawn.items():
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000


def test_pages_say_what_no_gpu_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.blocks()["models"] == f"Not measured yet.\n\n{report.NO_GPU}"
    fill(tmp_path / "c.json", CPU, "fastdiff")
    found = report.blocks()
    for section in report.ON_GPU:
        assert "A CPU" in found[section] and found[section].endswith(report.NO_GPU)
    assert report.NO_GPU not in found["schedulers"]
    assert "| a model | fp32 | 0.002 | 0.00333 | 0.0007 | 21% | **0.60** (0.54-0.66) |  |" in found["models"]
    fill(tmp_path / "g.json", GPU, "fastdiff cuda")
    found = report.blocks()
    for section in report.ON_GPU:
        assert "A CPU" in found[section] and "A GPU" in found[section] and report.NO_GPU not in found[section]
    assert "0.5 seconds of new size (missed)" in found["cold start"]
    assert found["losses"].count("**0.60** (0.54-0.66)") == 2 * (6 + 2 + 1)  # kernels, models, cold start

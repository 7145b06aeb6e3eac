"""The sections beside kernels and models are ordinary ones: filtered, kept, resumed, compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import _results
import benchmark_scripts
import cold_start
import kernels
import memory
import pytest
import torch
from _results import load, rows_of
from _runner import Job
from benchmark_scripts import run, script

from fastdiff.backends import kernels_of

KEPT = benchmark_scripts.BENCHMARKS / "results" / "pipelines.json"
needs_cpu = pytest.mark.skipif(not any(k.backend == "cpu" for k in kernels_of("geglu")), reason="no CPU kernels")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rows are kept instead; threads are set back."""
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@needs_cpu
@pytest.mark.parametrize(("name", "text", "rows"), [("schedulers", "ddimi", ["DDIMInverse"]),
                                                    ("overhead", "geglu", ["GEGLU"])])  # fmt: skip
def test_common_options(
    name: str, text: str, rows: list[str], results: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    common = ["--filter", text, "--rounds", "3", "--threads", "1", "--device-name", "r"]
    assert run(script(name), monkeypatch, *common, "--budget", "0") == 0
    assert "1 row(s) left, the time is over" in capsys.readouterr().out
    assert not (results / "r.json").exists()
    assert run(script(name), monkeypatch, *common, "--save") == 0
    found = rows_of(load(results / "r.json")[name])
    assert [(r["name"], r["dtype"], r["allocator"], r["environment"]["threads"]) for r in found] == [
        (row, "fp32", "stock", 1) for row in rows
    ]
    assert run(script(name), monkeypatch, *common, "--save", "--resume", "--quick") == 0
    assert "1 row(s) were measured before" in capsys.readouterr().out
    kept = load(results / "r.json")
    for timing in kept[name]["rows"][0]["timings"][1:]:  # once it was a thousand times as fast
        for key in ("ratio", "ratio_low", "ratio_high"):
            timing[key] *= 1000
    (results / "old.json").write_text(json.dumps(kept))
    assert run(script(name), monkeypatch, *common, "--baseline", str(results / "old.json")) == 1
    assert "changed beyond noise" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(script(name), monkeypatch, *common, "--device", "cuda")
    assert "invalid choice: 'cuda'" in capsys.readouterr().err


def test_cold_start_has_no_tuned_allocator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are of the stock one, and say so."""
    with pytest.raises(SystemExit):
        run(cold_start, monkeypatch, "--tuned-allocator", "--filter", "no such row")
    assert "unrecognized arguments: --tuned-allocator" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "rounds"), [((), 1), (("--rounds", "4"), 4), (("--quick",), 1)])
def test_rounds_of_memory_on_a_gpu(given: tuple[str, ...], rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by default, for the allocator's count does not vary; as many as are asked for."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "patched_sides", lambda device: ["fastdiff"])
    monkeypatch.setattr(memory, "Store", lambda *arguments: None)
    monkeypatch.setattr(memory, "run_section", lambda store, jobs, options, show: seen.append(options.rounds) or 0)
    assert run(memory, monkeypatch, "--device", "cuda", *given) == 0
    assert seen == [rounds]


def test_documented_options_are_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/benchmarks.md has them, by script."""
    every = {"--save", "--filter", "--resume", "--budget", "--baseline"}
    measuring = every | {"--rounds", "--quick", "--threads", "--device-name", "--device"}
    wanted = {
        "kernels": measuring | {"--tuned-allocator", "--dtypes", "--compile"},
        "models": measuring | {"--tuned-allocator", "--dtypes", "--compile"},
        "cold_start": measuring | {"--dtypes", "--sides", "--channels", "--size", "--steps"},
        "memory": measuring | {"--tuned-allocator", "--dtypes", "--sides"},
        "schedulers": measuring | {"--tuned-allocator"},
        "overhead": measuring | {"--tuned-allocator"},
        "pipelines": every,
    }
    page = (benchmark_scripts.BENCHMARKS.parent / "docs" / "benchmarks.md").read_text().split("How it is measured")[0]
    for name, options in wanted.items():
        module = {"cold_start": cold_start, "memory": memory, "kernels": kernels}.get(name) or script(name)
        with pytest.raises(SystemExit):
            run(module, monkeypatch, "--help")
        found = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
        assert found == options, name
        assert all(f"`{o}" in page for o in options - {"--channels", "--size", "--steps"})


def _entry(model: str, after: int, patched: int = 5) -> dict[str, Any]:
    return {"pipelines": "p", "model": model, "configuration": "tiny", "places": 5, "patched": patched, "left": {},
            "before": 100, "after": after}  # fmt: skip


def test_counts_are_kept_in_the_order_of_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines = script("pipelines")
    path, counted, after = tmp_path / "pipelines.json", [], {"A": 50, "B": 60, "C": 70}

    def job(model: str) -> Job:
        def count() -> _results.Row:
            counted.append(model)
            return _results.Row(f"{model}: p", "", "", [], extra=_entry(model, after[model]))

        return Job(f"{model}: p", "", "", count)

    monkeypatch.setattr(pipelines, "RESULTS", path)
    monkeypatch.setattr(pipelines, "jobs_of_models", lambda: [job(model) for model in "ABC"])

    def kept() -> dict[str, int]:
        return {row["model"]: row["after"] for row in load(path)["pipelines"]["rows"]}

    with pytest.raises(SystemExit, match="count all models first"):
        run(pipelines, monkeypatch, "--filter", "B:", "--save")
    assert run(pipelines, monkeypatch) == 0 and not path.exists()
    assert run(pipelines, monkeypatch, "--save", "--budget", "0") == 0 and not path.exists()
    assert run(pipelines, monkeypatch, "--save") == 0 and kept() == {"A": 50, "B": 60, "C": 70}
    (tmp_path / "old.json").write_text(path.read_text())
    counted.clear()
    after |= {"B": 40, "A": 55}
    assert run(pipelines, monkeypatch, "--save", "--filter", "b:") == 0 and counted == ["B"]
    assert list(kept().items()) == [("A", 50), ("B", 40), ("C", 70)]
    counted.clear()
    assert run(pipelines, monkeypatch, "--save", "--resume") == 0 and counted == []
    section = load(path)["pipelines"]
    section["source"]["C: p"] = "of other code"
    path.write_text(json.dumps({"pipelines": section}))
    assert run(pipelines, monkeypatch, "--save", "--resume") == 0 and counted == ["C"]
    baseline = ["--baseline", str(tmp_path / "old.json"), "--filter"]
    assert run(pipelines, monkeypatch, *baseline, "b:", "c:") == 0  # fewer launches, and the same
    capsys.readouterr()
    assert run(pipelines, monkeypatch, *baseline, "a:") == 1  # more launches
    assert "A: p" in capsys.readouterr().out
    path.write_text(json.dumps({"pipelines": section | {"environment": {"diffusers": "0.0"}}}))
    with pytest.raises(SystemExit, match="count all models first"):
        run(pipelines, monkeypatch, "--filter", "B:", "--save")


def test_kept_counts_are_of_these_jobs() -> None:
    pipelines = script("pipelines")
    rows = load(KEPT)["pipelines"]["rows"]
    names = [job.name for job in pipelines.jobs_of_models()]
    assert len(set(names)) == len(names) and [pipelines.name_of(row) for row in rows] == names

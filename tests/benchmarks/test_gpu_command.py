"""``make gpu``: its budget and phases with made-up times, and the whole command on a GPU that is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _children
import _harness
import _results
import _runner
import benchmark_scripts
import cold_start
import gpu
import kernels
import layer_cases
import memory
import model_cases
import pytest
import torch
from _results import Row, Timing, load, rows_here, rows_of, save
from benchmark_scripts import script

from fastdiff import ops
from fastdiff.backends import Kernel, kernels_of, losses


def _run_gpu(budget: float, took: Callable[[Sequence[str], float], float], codes: dict[str, int]) -> Any:
    """The phases with made-up times; returns what became of them and the calls (script, limit, budget)."""
    now, calls = [100.0], []

    def run(arguments: Sequence[str], timeout_s: float) -> int | None:
        script = "pytest" if arguments[0] == "-m" else Path(arguments[0]).name
        given = float(arguments[arguments.index("--budget") + 1]) if "--budget" in arguments else timeout_s
        calls.append((script, timeout_s, given))
        seconds = took(arguments, given)
        now[0] += min(seconds, timeout_s)
        return None if seconds > timeout_s else codes.get(script, 0)

    became = gpu.run_phases(budget, "cuda", run=run, clock=lambda: now[0])
    assert now[0] - 100 <= budget
    return became, calls


def test_gpu_phases_keep_the_budget() -> None:
    became, calls = _run_gpu(600, lambda arguments, given: given, {})  # everything takes all it may
    assert became["tests"] == became["kernels"] == became["models"] == "ok"
    assert [c[0] for c in calls[:3]] == ["pytest", "kernels.py", "models.py"]
    assert calls[0][1] == pytest.approx(210) and calls[1][1:] == (pytest.approx(390), pytest.approx(176, abs=1))
    assert all(limit >= given - 1 for _, limit, given in calls)
    became, calls = _run_gpu(600, lambda arguments, given: 5.0, {})  # all rows were measured before
    assert set(became.values()) == {"ok"} and len(calls) == len(gpu.PHASES)
    assert calls[-1][2] > 500  # the last phase gets what the others left


def test_gpu_phases_are_cut_and_fail() -> None:
    became, calls = _run_gpu(120, lambda arguments, given: 1e6, {})
    assert became["tests"] == "cut" and became["kernels"] == "cut"  # ended with the budget, after its own share
    assert set(list(became.values())[2:]) == {"no time"} and len(calls) == 2
    became, _ = _run_gpu(600, lambda arguments, given: 5.0, {"models.py": 1})
    assert (became["models"], became["memory"]) == ("failed", "ok")


def test_gpu_processes_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE_S", 0.5)  # of those that ignore interrupts, as what a shell put aside does
    assert gpu.run_process(["-c", "raise SystemExit(3)"], 60.0) == 3
    assert gpu.run_process(["-c", "import time; time.sleep(600)"], 0.2) is None


def test_gpu_summary_counts(tmp_path: Path) -> None:
    eager = Timing("eager", 1, 1, 1, 1, 9)
    rows = [Row("a", "bf16", "stock", [eager, Timing("fastdiff cuda", 0.5, 2, 2, 2, 9)], target=3),
            Row("b", "bf16", "stock", [eager, Timing("fastdiff cuda", 2, 0.5, 0.5, 0.5, 9)])]  # fmt: skip
    path, here = tmp_path / "r.json", dict.fromkeys(("source", "kind", "cpu", "gpu", "threads", "torch"), "this")
    save("kernels", rows, path, here)
    for change in ("source", "torch"):  # rows of another run, which was much faster
        save("kernels", [Row(change, "bf16", "stock", [eager, Timing("fastdiff", 0.1, 10, 10, 10, 9)])], path,
             here | {change: "other"})  # fmt: skip
    sections, others = rows_here(path, here)
    assert others == 2
    table = gpu.summary(sections, {"tests": "ok"})
    assert [next(iter(column.cells)) for column in table.columns] == ["kernels", "2", "1.25", "0.50", "1", "0 of 1"]


def test_gpu_targets_are_judged_by_what_was_measured() -> None:
    eager, ours = ({"provider": name, "median_ms": 1.0, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio}
                   for name, ratio in (("eager", 1.0), ("fastdiff", 2.0)))  # fmt: skip

    def kernel(target: float, *timings: dict[str, Any]) -> dict[str, Any]:
        return {"name": "a", "timings": [eager, *timings], "target": target, "extra": {}}

    def last(*rows: dict[str, Any]) -> str:
        table = gpu.targets({"kernels": list(rows)}, "cpu")
        return next(reversed(list(table.columns[-1].cells)))

    assert last(kernel(1.5, ours), kernel(1.5)) == "[green]reached[/]: 1 of 1, 1 not measured"
    assert last(kernel(3.0, ours), kernel(3.0)) == "[red]missed[/]: 0 of 1, 1 not measured"
    assert last(kernel(1.5, ours), kernel(1.5, ours)) == "[green]reached[/]: 2 of 2"
    assert last(kernel(1.5)) == "[yellow]not measured[/]: 0 of 0, 1 not measured"
    (aims,) = gpu.summary({"kernels": [kernel(1.5, ours), kernel(1.5)]}, {}).columns[-1].cells
    assert aims == "1 of 1, 1 not measured"


@pytest.fixture
def made_up_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is the CPU, one tiny case of each kind, results in a folder of their own; what was measured so far."""
    measured: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "Made Up 1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_runner, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(losses, "kind", lambda device: "cuda sm_00" if device.type == "cuda" else "cpu")
    asked = Kernel("geglu", "cpu", ops.geglu.eager, lambda x: None, on_request=True)
    monkeypatch.setattr(_runner, "kernels_of", lambda op: (asked,))  # its backend, until something is measured
    monkeypatch.setattr(losses, "fastest", {})
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    monkeypatch.setattr(_harness, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(_harness, "matmul_rate", lambda dtype, device: 1e12)
    for samples in (_harness.KERNEL_SAMPLES, _harness.MODEL_SAMPLES):
        monkeypatch.setitem(samples, "cuda", _harness.host_sample)
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(kernels, "ring", lambda args, device, cache: [args, args])

    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            with torch.device("cpu"):
                return make(*args)

        return made

    case = layer_cases.group_norm("t", (2, 32, 5, 3))
    attention = replace(layer_cases.attention("t", 1, 2, 9, 40, 77), targets={"bf16": 1.5})
    cases = [replace(c, make=on_cpu(c.make)) for c in (case, attention)]
    monkeypatch.setattr(kernels, "gpu_cases", lambda: cases)
    config = {"block_out_channels": (32,) * 4, "sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 8}
    unet = model_cases._model("UNet2DConditionModel", **config)
    real = model_cases.named("SD1.5 U-Net 512x512 batch 2")
    tiny = replace(real, build=on_cpu(unet), inputs=on_cpu(lambda: model_cases._unet_inputs(2, 8, 16)))
    for module in (script("models"), memory):
        monkeypatch.setattr(module, "cases", lambda: [tiny])

    def run_child(name: str, arguments: Sequence[str], timeout_s: float = 0.0) -> dict[str, Any]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=False))
        measured.append(f"{name} {given['--side']}")
        if name == "memory.py":
            return {"weights": 1 << 20, "first": 3 << 20, "peak": 2 << 20, "tensors": 1 << 20}
        return {"seconds": dict.fromkeys(cold_start.PHASES, 0.25), "pictures": [[0.5, 0.1]]}

    monkeypatch.setattr(_children, "run_child", run_child)
    monkeypatch.setattr(memory, "run_child", run_child)
    for name, module in (("kernels.py", kernels), ("models.py", script("models"))):
        measure = module.measure

        def noted(case: Any, *args: Any, name: str = name, measure: Any = measure) -> Row:
            measured.append(f"{name} {case.name} {args[0]}")
            return measure(case, *args)

        monkeypatch.setattr(module, "measure", noted)
    return measured


@pytest.mark.skipif(not any(k.backend == "cpu" for k in kernels_of("geglu")), reason="no CPU kernels")
def test_the_command_on_a_made_up_gpu(
    made_up_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All scripts with the arguments they get, everything but the GPU itself; then once more, where all is there."""
    modules = {"kernels.py": kernels, "models.py": script("models"), "cold_start.py": cold_start, "memory.py": memory}

    def in_this_process(arguments: Sequence[str], timeout_s: float) -> int:
        if arguments[0] == "-m":
            return 0
        with monkeypatch.context() as patch:
            return benchmark_scripts.run(modules[Path(arguments[0]).name], patch, *arguments[1:])

    monkeypatch.setattr(gpu, "run_process", in_this_process)
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 0
    said = capsys.readouterr().out
    sections = load(tmp_path / "made-up-1.json")
    assert {name: len(body["rows"]) for name, body in sections.items()} == {
        "kernels": 6, "models": 1, "cold start": 1, "memory": 1,  # kernels in three dtypes
    }  # fmt: skip
    (model,) = rows_of(sections["models"])
    sides = ["fastdiff cpu", "fastdiff cpu, CUDA graphs"]
    assert [t["provider"] for t in model["timings"]] == ["eager", *sides, "torch.compile", "torch.compile max-autotune"]
    assert model["extra"]["wrong"] == [] and model["environment"]["gpu"] == "Made Up 1" and model["dtype"] == "bf16"
    for words in ("SD1.5 U-Net 512x512 batch 2", "speed over torch.compile", "Flux-dev 1024x1024", "not measured",
                  "seconds of new size", "tests: ok", "bench report"):  # fmt: skip
        assert words in said, words
    assert said.index("Flux-dev") < said.index("tests: ok") < said.index("bench report")
    assert "not counted here" not in said
    done = len(made_up_gpu)
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 0 and len(made_up_gpu) == done
    assert "measured before" in capsys.readouterr().out
    # The table of measurements now has this GPU, so a plain patch gives other kernels: that was not measured.
    fastest = {"cuda sm_00": {"geglu": {"bf16": "triton"}}}
    monkeypatch.setattr(losses, "fastest", fastest)
    changed = ["fastdiff", "fastdiff, CUDA graphs"]
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 0
    sections = load(tmp_path / "made-up-1.json")
    assert {t["provider"] for t in sections["models"]["rows"][0]["timings"]} >= {"torch.compile", *changed}
    assert {t["provider"] for t in sections["cold start"]["rows"][0]["timings"]} >= {"torch.compile", *changed}
    assert sections["memory"]["rows"][0]["extra"]["bytes"].keys() == {"eager", *changed}
    assert not any(again.startswith("kernels.py") for again in made_up_gpu[done:])
    monkeypatch.setattr(gpu, "environment", lambda device: _results.environment(device) | {"source": "later"})
    monkeypatch.setattr(gpu, "run_process", lambda arguments, timeout_s: 0)
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 0
    assert "9 row(s) of other code" in capsys.readouterr().out


def test_phases_can_be_chosen(made_up_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(gpu, "run_process", lambda arguments, timeout_s: begun.append(Path(arguments[0]).name) or 0)
    assert benchmark_scripts.run(gpu, monkeypatch, "--phases", "memory", "tests") == 0
    assert begun == ["-m", "memory.py"]


def test_the_command_is_cut(made_up_gpu: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It says so, and ends with an error only where a phase failed."""
    codes: list[int | None] = [0, None, 0]
    monkeypatch.setattr(gpu, "run_process", lambda arguments, timeout_s: (codes or [0]).pop(0))
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 0
    said = capsys.readouterr().out
    assert "kernels: cut" in said and "run it again" in said
    codes[:] = [1]
    assert benchmark_scripts.run(gpu, monkeypatch, "--budget", "600") == 1
    said = capsys.readouterr().out
    assert "tests: failed" in said and "run it again" not in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_scripts.run(gpu, monkeypatch) == 2

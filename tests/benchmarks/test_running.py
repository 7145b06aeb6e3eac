"""Budget, resumption, phases and checks of the benchmarks, with clocks and cases made up for it."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _runner
import cold_start
import compare
import kernels
import layer_cases
import memory
import model_cases
import other_libraries
import pytest
import torch
from _children import patch_options
from _harness import Rates
from _results import Row, Timing, key_of, load, rows_of, save
from _runner import Job, run_jobs
from benchmark_scripts import BENCHMARKS, run, script
from diffusers import UNet2DConditionModel
from torch import Tensor

import fastdiff
from fastdiff import _bench_command, cli, ops
from fastdiff.backends import BackendError, Kernel, kernels_of, losses
from fastdiff.ops._library import OPS

HAS_CPU = any(k.backend == "cpu" for k in kernels_of("geglu"))


class Clock:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, seconds: float = 10.0) -> Job:
        """A row that takes so long."""

        def run() -> Row:
            self.now += seconds
            if name == "broken":
                raise RuntimeError("out of luck\nand more")
            return Row(name, "bf16", "stock", [Timing("eager", 1.0, 1.0, 1.0, 1.0, 9)])

        return Job(name, "bf16", "stock", run)


def _names(jobs: Sequence[Any]) -> list[str]:
    return [job.name for job in jobs]


def test_budget_begins_nothing_that_would_not_end() -> None:
    clock, kept = Clock(), []
    jobs = [clock.job("a"), clock.job("b"), clock.job("c"), clock.job("d")]
    outcome = run_jobs(jobs, kept.append, budget_s=29, clock=clock)
    assert _names(outcome.rows) == _names(kept) == ["a", "b"]  # 9 s are left, and a row takes 10
    assert _names(outcome.left) == ["c", "d"] and clock.now == 120
    assert _names(run_jobs(jobs, kept.append, budget_s=30.5, clock=clock).rows) == ["a", "b", "c"]
    assert _names(run_jobs(jobs, kept.append, budget_s=0, clock=clock).left) == ["a", "b", "c", "d"]
    assert len(run_jobs(jobs, kept.append, clock=clock).rows) == 4


def test_resumed_run_measures_the_rest(tmp_path: Path) -> None:
    """Cut by its budget, then cut again, then complete; rows of the first runs stay."""
    path, clock = tmp_path / "r.json", Clock()
    where = {"kind": "k", "cpu": "c", "gpu": None, "threads": 1, "torch": "t", "source": "s"}
    jobs = [clock.job(name) for name in "abcde"]
    ran = []
    for _ in range(3):
        done = _runner.measured_keys(path, "kernels", where)
        outcome = run_jobs(jobs, lambda row: save("kernels", [row], path, where), done=done, budget_s=20, clock=clock)
        ran.append(_names(outcome.rows))
        assert _names(outcome.skipped) == [n for previous in ran[:-1] for n in previous]
    assert ran == [["a", "b"], ["c", "d"], ["e"]]
    assert [row["name"] for row in rows_of(load(path)["kernels"])] == list("abcde")


def test_failure_costs_its_row_only() -> None:
    clock, kept = Clock(), []
    outcome = run_jobs([clock.job("a"), clock.job("broken"), clock.job("c")], kept.append, clock=clock)
    assert _names(kept) == ["a", "c"]
    assert outcome.failed == {("broken", "bf16", "stock"): "RuntimeError: out of luck"}


def _section(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(_runner, "result_file", lambda name, device: tmp_path / "r.json")
    parser = argparse.ArgumentParser()
    _runner.add_options(parser, rounds=3)
    options = parser.parse_args(arguments)
    _runner.prepare(options)
    return _runner.run_section("kernels", jobs, options, lambda rows: _runner.Table(title=f"{len(rows)} rows"))


def test_section_saves_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    assert _section([clock.job("a")], tmp_path, monkeypatch) == 0
    assert not (tmp_path / "r.json").exists()
    assert _section([clock.job("a")], tmp_path, monkeypatch, "--save") == 0
    assert clock.now == 120
    assert _section([clock.job("a"), clock.job("b")], tmp_path, monkeypatch, "--save", "--resume") == 0
    assert clock.now == 130 and "1 row(s) were measured before" in capsys.readouterr().out
    assert _section([clock.job("broken")], tmp_path, monkeypatch) == 1
    assert "out of luck" in capsys.readouterr().out
    wrong = Row("w", "bf16", "stock", [Timing("eager", 1.0, 1.0, 1.0, 1.0, 9)], extra={"wrong": ["fastdiff: off"]})
    assert _section([Job("w", "bf16", "stock", lambda: wrong)], tmp_path, monkeypatch) == 1
    assert "fastdiff: off" in capsys.readouterr().out


def test_baseline_says_what_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond noise, and ours: then the exit code is 1."""

    def job(name: str, ratio: float) -> Job:
        eager = Timing("eager", 1.0, 1.0, 1.0, 1.0, 9, 0.99, 1.01)
        ours = Timing("fastdiff cpu", 1 / ratio, ratio, 0.98 * ratio, 1.02 * ratio, 9)
        return Job(name, "bf16", "stock", lambda: Row(name, "bf16", "stock", [eager, ours]))

    old = str(tmp_path / "old.json")
    assert _section([job("a", 2.0), job("b", 2.0)], tmp_path, monkeypatch, "--save") == 0
    (tmp_path / "r.json").rename(old)
    assert _section([job("a", 1.95), job("b", 2.5), job("new", 0.1)], tmp_path, monkeypatch, "--baseline", old) == 0
    said = capsys.readouterr().out
    assert "of 4 timings" in said and "1.25" in said
    assert _section([job("a", 1.5), job("b", 2.0)], tmp_path, monkeypatch, "--baseline", old) == 1
    assert "0.75" in capsys.readouterr().out
    assert _section([job("a", 2.0)], tmp_path, monkeypatch, "--baseline", old) == 0
    assert "no change beyond noise in 2 timings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--resume"], "--resume needs --save"), (["--rounds", "0"], "--rounds is 0"),
     (["--baseline", "/no/such.json"], "no file /no/such.json")],
)  # fmt: skip
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=message):
        _section([], tmp_path, monkeypatch, *arguments)


def _options(**changes: Any) -> argparse.Namespace:
    given = {"device": "cpu", "compile": False, "rounds": 3, "row_s": None, "allocator": "stock"}
    return argparse.Namespace(**given | changes)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    found = Rates("cpu")
    found._rates = {"copy": 1e9, "fp32": 1e11, "bf16": 1e11}
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 1 << 16)
    return found


def _tiny(op: str) -> layer_cases.Case:
    make = {
        "group_norm_silu": lambda: layer_cases.group_norm("t", (2, 32, 5, 3), temb=True),
        "rms_norm_silu": lambda: layer_cases.rms_norm("t", (1, 8, 2, 5, 3)),
        "adaln_modulate": lambda: layer_cases.modulate("t", (2, 3, 16)),
        "adaln_modulate_dual": lambda: layer_cases.modulate("t", (2, 3, 16), count=2),
        "gate_residual": lambda: layer_cases.gate("t", (2, 3, 16), norm=False),
        "gate_residual_adaln": lambda: layer_cases.gate("t", (2, 3, 16), norm=True),
        "geglu": lambda: layer_cases.activation("t", "geglu", (2, 3, 16)),
        "swiglu": lambda: layer_cases.activation("t", "swiglu", (2, 3, 16)),
        "gelu_tanh": lambda: layer_cases.activation("t", "gelu_tanh", (2, 3, 16)),
        "attention": lambda: layer_cases.attention("t", 2, 3, 300, 8, 7),
        "qk_norm_rope": lambda: layer_cases.qk_norm_rope("t", 1, 5, 2, 8, text=3),
        "scheduler_step": lambda: layer_cases.sampler_step("t", (2, 4, 5, 3)),
        "cfg_combine": lambda: layer_cases.guidance("t", (2, 4, 5, 3), rescale=0.7),
    }
    return make[op]()


@pytest.mark.skipif(not HAS_CPU, reason="no CPU kernels")
@pytest.mark.parametrize("op", sorted({case.op for case in layer_cases.cases()}))
def test_every_op_is_measured(op: str, rates: Rates) -> None:
    row = kernels.measure(_tiny(op), "fp32", _options(), rates)
    assert [t.provider for t in row.timings] == ["eager", "fastdiff cpu"] and row.extra["wrong"] == []
    assert row.floor_ms > 0 and row.bytes_moved > 0 and row.extra["features"]
    assert row.extra["left_out"]["xFormers"] == "has no kernels for cpu"


def test_cases_cover_the_ops_once() -> None:
    found = list(layer_cases.cases())
    assert {case.op for case in found} == {name for name in OPS if not name.endswith("_backward")}
    for every in (found, list(layer_cases.gpu_cases())):
        names = [case.name for case in every]
        repeated = {n for n in names if names.count(n) > 1}
        assert len(set(names)) == len(names), repeated
    assert sum(case.fits_cpu() for case in found) > 40
    with torch.device("meta"):
        for case in found:
            assert max(t.numel() for t in case.make(torch.bfloat16) if isinstance(t, Tensor)) >= case.values // 2


@pytest.mark.skipif(not HAS_CPU, reason="no CPU kernels")
def test_wrong_kernel_is_not_timed(rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a little, a NaN, a wrong shape; the failing one is left out, eager stays."""
    case = _tiny("geglu")
    for spoil in (lambda y: y * 1.001, lambda y: y.index_fill(0, torch.tensor(0), torch.nan), lambda y: y[:1]):
        wrong = replace(case, ours=lambda x, spoil=spoil: spoil(ops.geglu(x)))
        row = kernels.measure(wrong, "fp32", _options(), rates)
        assert [t.provider for t in row.timings] == ["eager"]
        assert "fastdiff cpu" in row.extra["left_out"] and len(row.extra["wrong"]) == 1
    late = layer_cases.attention("t", 1, 1, 1000, 8, 5)  # a few of many queries are compared, the last among them
    wrong = replace(late, ours=lambda *qkv: torch.cat((ops.attention(*qkv)[:, :-1], torch.zeros(1, 1, 1, 8)), dim=1))
    assert kernels.measure(wrong, "fp32", _options(), rates).extra["wrong"]


@pytest.mark.skipif(not HAS_CPU, reason="no CPU kernels")
def test_other_libraries_are_checked_and_listed(rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with another computation is timed with its error; one that refuses is listed with its reason."""

    def refuses(*args: Any) -> Tensor:
        raise ValueError("not this size")

    tanh = other_libraries.Library("math", "math", lambda module, case: lambda x: case.eager(x) * 1.01, ("cpu",))
    no = other_libraries.Library("json", "json", lambda module, case: refuses, ("cpu",))
    absent = other_libraries.Library("no_such_module_here", "no-such", lambda module, case: None, ("cpu",))
    monkeypatch.setattr(kernels, "LIBRARIES", libraries := {"Off": tanh, "Refuses": no, "Absent": absent})
    monkeypatch.setattr(other_libraries, "LIBRARIES", libraries)
    row = kernels.measure(_tiny("geglu"), "fp32", _options(), rates)
    assert [t.provider for t in row.timings] == ["eager", "fastdiff cpu", "Off"]
    assert "Off: error 0.01" in row.note and row.extra["wrong"] == []
    assert row.extra["left_out"] == {"Refuses": "ValueError: not this size",
                                     "Absent": "not installed (pip install no-such)"}  # fmt: skip


def test_backend_that_refuses_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*args: Any) -> Tensor:
        raise BackendError("backend 'cpu' does not take this call of geglu: cpu: a tensor is sparse")

    found, refused = kernels.ours_by_backend(replace(_tiny("geglu"), ours=ours), (torch.zeros(1, 2),))
    assert found == {} and set(refused.values()) <= {"a tensor is sparse"} and bool(refused) == HAS_CPU


@pytest.fixture
def tiny_unet() -> model_cases.ModelCase:
    config = {"block_out_channels": (32, 32, 32, 32), "sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 8}
    build = model_cases._model("UNet2DConditionModel", **config)
    return model_cases._case("tiny", build, model_cases._unet_inputs, 2, 8, 16, bf16=1.1)


def test_models_are_made_where_they_run(tiny_unet: model_cases.ModelCase) -> None:
    names = [case.name for case in model_cases.cases()]
    assert len(set(names)) == len(names)
    model, inputs = tiny_unet.make("cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    assert tiny_unet.call(model, **inputs).shape == (2, 4, 8, 8) and not model.training
    model._keep_in_fp32_modules = ["conv_out"]
    model_cases.keep_fp32(model)
    assert model.conv_out.weight.dtype == torch.float32 and model.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.skipif(not HAS_CPU, reason="no CPU kernels")
def test_model_is_measured_on_all_sides(tiny_unet: model_cases.ModelCase, rates: Rates) -> None:
    """And one that patching made wrong fails the run."""
    models = script("models")
    with torch.no_grad():
        row = models.measure(tiny_unet, "bf16", _options(), rates)
        assert [t.provider for t in row.timings] == ["eager", "fastdiff", "fastdiff, packed weights"]
        assert row.extra["wrong"] == [] and row.target == 1.1 and row.flops > 1e6 and row.floor_ms > 0
        assert set(row.extra["difference"]) == set(row.extra["setup_s"]) == {"fastdiff", "fastdiff, packed weights"}
        models.show([row])

        def call(model: Any, **inputs: Any) -> Tensor:
            return model(**inputs, return_dict=False)[0] * (1.5 if fastdiff.patching.patch_of(model) else 1.0)

        row = models.measure(replace(tiny_unet, call=call), "fp32", _options(), rates)
    assert row.extra["wrong"] == ["fastdiff: differs from eager by 0.5"]


def test_memory_of_all_sides(tiny_unet: model_cases.ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "named", lambda name: tiny_unet)
    given = {"threads": 0, "tuned_allocator": False, "case": "tiny", "device": "cpu", "dtype": "bf16"}
    weights = 2 * sum(p.numel() for p in tiny_unet.make("cpu", torch.bfloat16)[0].parameters())
    for side in ("eager", "fastdiff", "fastdiff, packed weights"):
        found = memory.child(argparse.Namespace(side=side, **given))
        assert found["weights"] == weights and found["peak"] >= 0 and found["first"] >= 0 and found["tensors"] > 0


def test_sides_are_options_of_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _runner.patched_sides("cpu") == ["fastdiff"]
    kernel = Kernel("geglu", "triton", ops.geglu.eager, lambda x: None, on_request=True)
    monkeypatch.setattr(_runner, "kernels_of", lambda op: (kernel,))
    monkeypatch.setattr(losses, "kind", lambda device: "cuda sm_90")
    monkeypatch.setattr(losses, "fastest", {})
    assert _runner.patched_sides("cuda") == ["fastdiff triton", "fastdiff triton, CUDA graphs"]
    plain = ["fastdiff", "fastdiff, CUDA graphs"]
    monkeypatch.setattr(losses, "fastest", {"cuda sm_90": {"geglu": {"bf16": "triton"}}})  # what the table chooses
    assert _runner.patched_sides("cuda") == plain
    monkeypatch.setattr(losses, "fastest", {"cuda sm_80": {"geglu": {"bf16": "triton"}}})
    assert _runner.patched_sides("cuda") == ["fastdiff triton", "fastdiff triton, CUDA graphs"]
    monkeypatch.setattr(losses, "own", lambda name, op, dtype: "triton" if name == "cuda sm_90" else None)
    assert _runner.patched_sides("cuda") == plain  # what was measured on this machine counts too
    assert patch_options("fastdiff triton") == {"backend": "triton"}
    assert patch_options("fastdiff, packed weights") == {"prepack_weights": True}
    assert patch_options("fastdiff") == {}
    assert patch_options("fastdiff, CUDA graphs") == {"cuda_graphs": True}
    assert patch_options("fastdiff cuda, CUDA graphs") == {"backend": "cuda", "cuda_graphs": True}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no procfs")
def test_peak_is_of_the_largest_moment() -> None:
    peak = memory.Peak("cpu")
    with mmap.mmap(-1, 64 << 20) as block:  # malloc might give back what is resident already
        block.write(b"1" * len(block))
    assert peak.bytes() >= 60 << 20


def test_tensors_are_counted_at_the_largest_moment() -> None:
    def call() -> None:
        block = torch.ones(64 << 18)  # 64 MiB
        block = block[:1].clone()
        torch.ones(32 << 18), block

    kept = torch.ones(16 << 18)
    assert 64 << 20 <= memory.largest_live(call) < 65 << 20
    assert kept.nbytes <= memory.largest_live(lambda: kept.add(1)) < kept.nbytes + (1 << 20)


@pytest.mark.parametrize("strided", [False, True])
def test_a_patched_block_has_no_more_tensors_at_once(strided: bool) -> None:
    model = UNet2DConditionModel(
        block_out_channels=(32,), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        use_linear_projection=not strided,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    inputs = torch.randn(2, 4, 32, 32), 10, torch.randn(2, 5, 16)
    stock = memory.largest_live(lambda: model(*inputs))
    fastdiff.patch(model)
    model(*inputs)
    assert memory.largest_live(lambda: model(*inputs)) <= stock


def test_cold_start_of_a_child() -> None:
    """The smallest pipeline, patched, in a process of its own: every phase is timed, every picture is there."""
    arguments = ["--child", "--side", "fastdiff", "--dtype", "fp32", "--device", "cpu", "--size", "64", "--steps", "1",
                 "--threads", "1", "--channels", "32", "32", "32", "32"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run([sys.executable, str(BENCHMARKS / "cold_start.py"), *arguments], capture_output=True,
                          text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert tuple(found["seconds"]) == cold_start.PHASES and all(s >= 0 for s in found["seconds"].values())
    pictures = found["pictures"]
    assert len(pictures) == 4 and pictures[0] == pictures[1] and pictures[3] != pictures[2]


def test_bench_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _bench_command.benchmarks_folder() == BENCHMARKS
    assert {p.name for p in BENCHMARKS.iterdir()} >= set(_bench_command.SCRIPTS.values())
    monkeypatch.setattr(_bench_command, "_PACKAGE", tmp_path / "site-packages" / "fastdiff")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "kernels", "--quick"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_bench_passes_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    slow = [Timing("eager", 1.0, 1.0, 1.0, 1.0, 9), Timing("fastdiff cpu", 1.0, 1.0, 0.9, 1.1, 9)]
    fast = [slow[0], Timing("fastdiff cpu", 0.5, 2.0, 1.9, 2.1, 9)]
    for path, timings in ((old, fast), (new, slow)):
        save("kernels", [Row("case", "bf16", "stock", timings)], path, {"cpu": "A"})
    assert key_of(load(old)["kernels"]["rows"][0]) == ("case", "bf16", "stock")
    assert cli.main(["bench", "compare", str(old), str(new), "--margin", "0.1"]) == 1
    assert run(compare, monkeypatch, str(new), str(old)) == 0

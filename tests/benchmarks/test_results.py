"""Result files, comparison of runs, and what the choice of kernels takes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import _losses
import _results
import layer_cases
import pytest
import report
import torch
from _losses import losing_sizes
from _results import Row, Timing, load, measured_keys, rows_of, save
from benchmark_scripts import run
from compare import compared, judge, show_changes
from rich.console import Console

import fastdiff
from fastdiff import ops
from fastdiff.backends import Choice, kernels_of, losses, use_backend

HERE: dict[str, Any] = {"kind": "cpu amx", "cpu": "A", "gpu": None, "threads": 2, "torch": "2", "source": "s",
                        "commit": "c1", "date": "d"}  # fmt: skip


def _row(name: str = "case", ratio: tuple[float, float, float] = (2.0, 1.9, 2.1), ms: float = 1.0, **extra: Any) -> Row:
    timings = [Timing("eager", ms, 1.0, 1.0, 1.0, 9, 0.99 * ms, 1.01 * ms),
               Timing("fastdiff cpu", ms / ratio[0], *ratio, 9, ms / ratio[2], ms / ratio[1])]  # fmt: skip
    return Row(name, "bf16", "stock", timings, extra=extra)


def _file(*rows: Row, **changes: Any) -> dict[str, Any]:
    entries = [json.loads(json.dumps(r, default=vars)) | {"environment": 0} for r in rows]
    return {"kernels": {"environments": [HERE | changes], "rows": entries}}


def test_rows_keep_their_environment(tmp_path: Path) -> None:
    path, later = tmp_path / "r.json", HERE | {"commit": "c2"}
    save("kernels", [_row("one"), _row("two")], path, HERE)
    save("models", [_row("one")], path, HERE)
    save("kernels", [_row("two", ms=5.0), _row("three")], path, later)
    section = load(path)["kernels"]
    found = {row["name"]: row["environment"]["commit"] for row in rows_of(section)}
    assert found == {"one": "c1", "two": "c2", "three": "c2"}
    assert len(section["environments"]) == 2 and len(section["rows"]) == 3
    assert next(r for r in section["rows"] if r["name"] == "two")["timings"][0]["median_ms"] == 5.0
    assert load(path)["models"]["rows"][0]["name"] == "one"
    save("kernels", [_row("one")], path, later)
    assert load(path)["kernels"]["environments"] == [later]  # the other has no rows left
    assert not path.with_suffix(".tmp").exists()


@pytest.mark.parametrize("change", [{"source": "t"}, {"kind": "cuda sm_90"}, {"threads": 4}, {"torch": "3"}, {}])
def test_resumed_rows_are_of_this_code_and_device(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "r.json"
    save("kernels", [_row("one"), _row("two", left_out={"torch.compile": "why"})], path, HERE)
    everything = {("one", "bf16", "stock"), ("two", "bf16", "stock")}
    assert measured_keys(path, "kernels", HERE | change) == (set() if change else everything)
    if not change:
        assert measured_keys(path, "kernels", HERE | {"commit": "other", "date": "later"}) == everything
        assert measured_keys(path, "kernels", HERE, ["torch.compile"]) == {("two", "bf16", "stock")}
        assert measured_keys(path, "models", HERE) == set()


def test_digest_is_of_code(tmp_path: Path) -> None:
    (tmp_path / "fastdiff" / "ops").mkdir(parents=True)
    source = tmp_path / "fastdiff" / "ops" / "a.py"
    source.write_text("1")
    digest = _results.source_digest.__wrapped__
    first = digest(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert digest(tmp_path) == first
    source.write_text("2")
    assert digest(tmp_path) != first


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((2.0, 1.9, 2.1), (1.5, 1.4, 1.6), "slower"),
        ((2.0, 1.9, 2.1), (1.8, 1.6, 1.95), "same"),  # the intervals overlap
        ((2.0, 1.99, 2.01), (1.95, 1.94, 1.96), "same"),  # less than the margin
        ((1.5, 1.4, 1.6), (2.0, 1.9, 2.1), "faster"),
    ],
)
def test_judgement(old: Any, new: Any, verdict: str) -> None:
    assert judge(old, new) == verdict


def test_comparison_of_runs() -> None:
    old = _file(_row("lost", (2.0, 1.9, 2.1)), _row("kept"), _row("gone"))
    new = _file(_row("lost", (1.5, 1.4, 1.6)), _row("kept", ms=3.0), _row("added"), commit="c2")
    changes = compared(old, new)
    verdicts = {(c.name, c.provider): c.verdict for c in changes}
    assert verdicts == {("lost", "eager"): "same", ("lost", "fastdiff cpu"): "slower",
                        ("kept", "eager"): "slower", ("kept", "fastdiff cpu"): "same"}  # fmt: skip
    quiet = Console(quiet=True)
    assert show_changes(changes, quiet)
    assert not show_changes([c for c in changes if c.name == "kept"], quiet)  # eager alone: the machine
    other_machine = compared(old, _file(_row("kept", ms=3.0), cpu="B"))
    assert [(c.provider, c.verdict) for c in other_machine] == [("fastdiff cpu", "same")]


def _losing(op: str, features: dict[str, int], *ratios: tuple[float, float, float], **changes: Any) -> dict[str, Any]:
    rows = [_row(f"case {i}", r, op=op, features=features) for i, r in enumerate(ratios)]
    file = _file(*rows, **changes)
    return {"file": {name: rows_of(section) for name, section in file.items()}}


def test_comparison_of_phases_and_memory() -> None:
    """Absolute numbers, so of the same device only."""

    def file(seconds: float, peak: int, **changes: Any) -> dict[str, Any]:
        phases = {"fastdiff": {p: [seconds, 0.9 * seconds, 1.1 * seconds] for p in ("new size", "other LoRA")}}
        return _file(_row(phases=phases, bytes={"fastdiff": {"peak": peak, "first": 1}}), **changes)

    found = {c.provider: c.verdict for c in compared(file(1.0, 1000), file(1.5, 1200))}
    assert found == {"eager": "same", "fastdiff cpu": "same", "fastdiff, new size": "slower",
                     "fastdiff, other LoRA": "slower", "fastdiff, peak memory": "slower"}  # fmt: skip
    assert {c.verdict for c in compared(file(1.0, 1000), file(1.1, 1001))} == {"same"}
    assert [c.provider for c in compared(file(1.0, 1000), file(1.5, 1200, gpu="B"))] == ["fastdiff cpu"]


def test_losing_sizes_are_beyond_noise_and_in_all_rows() -> None:
    slow, noisy, fast = (0.8, 0.7, 0.9), (0.95, 0.9, 1.05), (2.0, 1.9, 2.1)
    (entry,) = losing_sizes(_losing("geglu", {"numel": 5000}, slow, slow))["losses"]
    assert (entry["device"], entry["backend"], entry["op"], entry["dtype"]) == ("cpu amx", "cpu", "geglu", "bf16")
    assert entry["bounds"] == [["numel", 4096, 8192]] and "0.80" in entry["reason"]
    for rows in ((noisy,), (slow, fast), (slow, noisy)):
        table = losing_sizes(_losing("geglu", {"numel": 5000}, *rows))
        assert table["losses"] == [] and list(table["measured"]) == ["cpu amx"]


def test_order_of_backends_is_that_over_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per kind, op and dtype; eager where none of ours is faster in the mean."""
    results = _losing("geglu", {"numel": 5000}, (4.0, 3.9, 4.1), (1.0, 0.9, 1.1))
    rows = results["file"]["kernels"]
    for row, ratio in zip(rows, (3.0, 2.0), strict=True):
        row["timings"].append(row["timings"][1] | {"provider": "fastdiff triton", "ratio": ratio})
    assert losing_sizes(results)["fastest"] == {"cpu amx": {"geglu": {"bf16": "triton, cpu"}}}  # 2.4 against 2
    monkeypatch.setattr(_losses, "cases", lambda: ())  # one row decides
    rows[1]["dtype"] = "fp16"  # 4 in bf16, against 3; 1 in fp16, against 2
    assert losing_sizes(results)["fastest"] == {"cpu amx": {"geglu": {"bf16": "cpu, triton", "fp16": "triton"}}}
    slower = losing_sizes(_losing("geglu", {"numel": 5000}, (0.9, 0.8, 1.1)))
    assert slower["fastest"] == {"cpu amx": {"geglu": {"bf16": "eager"}}}


def test_fastest_backend_is_not_chosen_by_few_sizes() -> None:
    """A run for one name, or one that was cut: at least half of the cases of that device must be there."""
    fast = (2.0, 1.9, 2.1)
    for kind, cases in (("cpu amx", [c for c in layer_cases.cases() if c.fits_cpu()]),
                        ("cuda sm_90", list(layer_cases.gpu_cases()))):  # fmt: skip
        count = sum(case.op == "attention" for case in cases)
        chosen = {kind: {"attention": {"bf16": "cpu"}}}
        for present, found in ((1, {}), ((count - 1) // 2, {}), ((count + 1) // 2, chosen)):
            results = _losing("attention", {"depth": 64, "queries": 9, "keys": 9}, *[fast] * present, kind=kind)
            assert losing_sizes(results)["fastest"] == found, (kind, present)


def test_choice_leaves_losing_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bucket, on that device and in that dtype; asked for by name the kernel serves; the report says it."""
    if not any(k.backend == "cpu" for k in kernels_of("gelu_tanh")):
        pytest.skip("no CPU kernels")
    here = losses.kind(torch.device("cpu"))
    loss = losses.Loss(here, "cpu", "gelu_tanh", "fp32", (("numel", 64, 128),), "measured at 0.80 of eager's speed")
    monkeypatch.setitem(losses.by_kernel, ("cpu", "gelu_tanh"), (loss,))

    def choice(size: int, dtype: torch.dtype = torch.float32) -> Choice:
        return ops.gelu_tanh.choose(torch.randn(size).to(dtype))

    assert (choice(100).backend, choice(100).reason) == ("eager", "cpu: measured at 0.80 of eager's speed")
    assert choice(63).backend == choice(128).backend == choice(100, torch.bfloat16).backend == "cpu"
    with use_backend("cpu", strict=True):
        assert choice(100).backend == "cpu"
    monkeypatch.setitem(losses.by_kernel, ("cpu", "gelu_tanh"), (loss.__class__("cpu elsewhere", *_fields(loss)[1:]),))
    assert choice(100).backend == "cpu"


def _fields(loss: losses.Loss) -> list[Any]:
    return [getattr(loss, name) for name in loss.__slots__]


def test_losing_attention_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """By head dimension and counts of queries and keys; traced without a break."""
    here = losses.kind(torch.device("cpu"))
    bounds = losses.bucket({"depth": 8, "queries": 9, "keys": 77})
    assert bounds == (("depth", 8, 9), ("queries", 8, 16), ("keys", 64, 128))
    loss = losses.Loss(here, "cpu", "attention", "fp32", bounds, "slow")
    monkeypatch.setitem(losses.by_kernel, ("cpu", "attention"), (loss,))

    def chosen(queries: int, keys: int, depth: int = 8) -> str:
        return ops.attention.choose(torch.randn(1, queries, 2, depth), *(torch.randn(1, keys, 2, depth),) * 2).reason

    if not any(k.backend == "cpu" for k in kernels_of("attention")):
        pytest.skip("no CPU kernels")
    assert chosen(9, 77) == chosen(15, 127) == "cpu: slow"
    assert not any((chosen(16, 77), chosen(9, 128), chosen(9, 77, depth=16)))
    compiled = torch.compile(lambda q, k: ops.attention(q, k, k), fullgraph=True, backend="eager")
    for keys in (77, 128, 200):
        q, k = torch.randn(1, 9, 2, 8), torch.randn(1, keys, 2, 8)
        torch.testing.assert_close(compiled(q, k), ops.attention.eager(q, k, k)[0])


def test_info_says_whether_the_speed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    here = losses.kind(torch.device("cpu"))
    monkeypatch.setattr(losses, "measured_on", {})
    assert losses.standing("cpu", torch.device("cpu")) == f"speed not measured on {here}"
    monkeypatch.setattr(losses, "measured_on", {here: "commit c"})
    monkeypatch.setattr(losses, "by_kernel", {})
    said = f"speed measured on {here}, no measured size is left to others"
    assert losses.standing("cpu", torch.device("cpu")) == said
    lost = [losses.Loss(device, backend, "geglu", "fp32", (), "slow")
            for device, backend in ((here, "cpu"), (here, "triton"), ("cuda sm_90", "cpu"))]  # fmt: skip
    monkeypatch.setattr(losses, "by_kernel", {("cpu", "geglu"): tuple(lost)})
    assert losses.standing("cpu", torch.device("cpu")).endswith(", one measured size is left to others")
    monkeypatch.setattr(losses, "by_kernel", {("cpu", "geglu"): (lost[0], lost[0])})
    assert losses.standing("cpu", torch.device("cpu")).endswith(", 2 measured sizes are left to others")
    (backend,) = [b for b in fastdiff.info().backends if b.name == "cpu"]
    if backend.available:
        assert losses.standing("cpu", torch.device("cpu")) in backend.detail


def test_pages_and_losing_sizes_are_what_the_results_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(report, monkeypatch, "--check") == 0, capsys.readouterr().err

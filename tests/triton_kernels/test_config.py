"""The configuration table and its tuning, with a stopwatch that is made up."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdiff import cli
from fastdiff.backends import losses
from fastdiff.backends import triton as backend
from fastdiff.backends.triton import _config

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(losses, "fastest", {})
    _config.forget()
    yield
    _config.forget()


def test_entries_of_buckets_architectures_and_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "architecture", lambda _: (9, 0))
    assert _config.config("attention", CPU, 512) == _config.DEFAULT["attention/512"]
    assert _config.config("attention", CPU, 1024) == _config.DEFAULT["attention"]
    assert _config.config("attention", CPU, "fp32/64") == _config.DEFAULT["attention/fp32"]
    assert _config.config("attention", CPU, "fp32/512") == _config.DEFAULT["attention/fp32/512"]
    with pytest.raises(KeyError):
        _config.config("of no op", CPU, "fp32/512")
    assert _config.config("torch_attention", CPU)["many"] == [64, 128]
    entry = {"m": 64, "n": 64, "warps": 4, "stages": 3}
    _config.cache_file(CPU).write_text(json.dumps({"attention/512": entry, "rows": {"of another version": 1}}))
    _config.forget()
    assert _config.config("attention", CPU, 512) == entry
    assert _config.config("rows", CPU) == _config.DEFAULT["rows"]


def test_torch_serves_what_it_is_faster_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "architecture", lambda _: (9, 0))
    for depth, keys, dtype, left in (
        (64, 4096, torch.bfloat16, True),
        (64, 77, torch.bfloat16, False),
        (72, 4096, torch.bfloat16, False),
        (64, 4096, torch.float32, False),
    ):
        q, k = (torch.empty(1, n, 1, depth, dtype=dtype) for n in (4096, keys))
        reason = _config.torch_is_faster(q, k, k, scale=1.0)
        assert (reason is not None) == left
        assert not left or f"head dimension {depth} and more than 512 keys (published figures" in reason


def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.backends.triton import tune

    def measure(_: Any) -> float:
        """Two warps are best for one entry; the other's shipped one is, by less than is believed."""
        rows = _config.config("rows", CPU, 1024)
        return 1.0 + (rows["warps"] != 2) * 0.5 + (_config.config("elementwise", CPU)["warps"] != 1) * 0.02

    planned = [
        tune.Task("rows/1024", {"warps": (1, 2, 8)}, lambda: None),
        tune.Task("elementwise", {"warps": (1, 2)}, lambda: None),
    ]
    monkeypatch.setattr(tune, "tasks", lambda _: iter(planned))
    monkeypatch.setattr(_config, "architecture", lambda _: (8, 0))
    monkeypatch.setattr(tune, "DEPTHS", (40, 64))

    def measure_all(call: Any) -> float:
        """Torch's attention is the faster one at 64 with many keys, and at 40 by less than is believed."""
        function = getattr(call, "func", None)
        if function is None:
            return measure(call)
        _, keys, _, depth = call.args[1].shape if "run" in function.__name__ else call.args[1].transpose(1, 2).shape
        return 1.0 if "run" in function.__name__ else {(64, 4096): 0.5, (40, 4096): 0.99}.get((depth, keys), 2.0)

    found = tune.tune(CPU, measure_all)
    chosen = {"many": [64], "few": [], "source": "measured by tune"}
    assert found == {"rows/1024": _config.DEFAULT["rows"] | {"warps": 2}, "torch_attention": chosen}
    q = torch.empty(1, 4096, 1, 64, dtype=torch.bfloat16)
    assert "measured by tune" in str(_config.torch_is_faster(q, q, q))
    assert json.loads(_config.cache_file(CPU).read_text()) == found
    assert _config.config("rows", CPU, 1024)["warps"] == 2


def test_a_configuration_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.backends.triton import tune

    class OutOfResources(Exception):
        pass

    def measure(_: Any) -> float:
        warps = _config.config("rows", CPU)["warps"]
        if warps == 8:
            raise OutOfResources
        return 1 / warps

    monkeypatch.setattr(_config, "architecture", lambda _: (8, 0))
    task = tune.Task("rows", {"warps": (8, 16)}, lambda: None)
    assert tune.best(task, CPU, measure) == (_config.DEFAULT["rows"] | {"warps": 16}, 4.0)
    assert _config.config("rows", CPU) == _config.DEFAULT["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 1
    assert "nothing to tune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("__version__ = '3.5.0+git1234'", None), ('__version__ = "3.4.0"', "older than 3.5"), ("", "not installed")],
)
def test_version_of_any_distribution(
    text: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROCm's and Intel's Triton is another distribution, whose metadata has another name."""
    (tmp_path / "__init__.py").write_text(f'"""isort:skip_file"""\n{text}\n')
    spec = importlib.machinery.ModuleSpec("triton", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(backend, "INTERPRETED", True)
    _config.triton_version.cache_clear()
    try:
        found = backend.why_not()
    finally:
        _config.triton_version.cache_clear()
    assert found is None if reason is None else reason in str(found)


def test_what_the_kernels_ask_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, ROCm and XPU name it differently."""
    from fastdiff.backends.triton import _launch, attention

    for device, properties, facts in (
        ("cuda", {"multi_processor_count": 132, "shared_memory_per_block_optin": 232448}, (132, 232448)),
        ("cuda", {"multi_processor_count": 304}, (304, 1 << 16)),
        ("xpu", {"gpu_subslice_count": 20, "local_mem_size": 131072}, (20, 131072)),
    ):
        module = getattr(torch, device)
        monkeypatch.setattr(module, "get_device_properties", lambda _, p=properties: SimpleNamespace(**p))
        asked = (_launch.processors, attention.on_chip)
        assert tuple(f.__wrapped__(torch.device(device, 0)) for f in asked) == facts


def test_a_gpu_without_fp64_takes_no_scheduler_step(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {0: SimpleNamespace(has_fp64=True), 1: SimpleNamespace(has_fp64=False)}
    monkeypatch.setattr(backend, "device_type", lambda: "xpu")
    monkeypatch.setattr(torch.xpu, "get_device_properties", properties.__getitem__)
    backend.without_fp64.cache_clear()
    assert backend.without_fp64(0) is None and backend.without_fp64(1) == "GPU 1 has no fp64"
    backend.without_fp64.cache_clear()

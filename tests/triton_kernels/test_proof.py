"""What ``python -m fastdiff tune`` proves lets kernels serve unasked: driven with made-up kernels and times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import backends, cli, ops
from fastdiff.backends import _gpu, _proof, cuda, losses
from fastdiff.backends import triton as triton_backend
from fastdiff.backends.triton import tune
from fastdiff.ops._library import OPS

CPU = torch.device("cpu")


def gelu(x: Tensor) -> Tensor:
    return ops.gelu_tanh.eager(x)


def fast_gelu(x: Tensor) -> Tensor:
    return ops.gelu_tanh.eager(x)


def wrong_geglu(x: Tensor) -> Tensor:
    return ops.geglu.eager(x) * 1.01


def slow_geglu(x: Tensor) -> Tensor:
    return ops.geglu.eager(x)


def broken_swiglu(gate: Tensor, x: Tensor) -> Tensor:
    raise RuntimeError("PassManager::run failed")


def one_swiglu(gate: Tensor, x: Tensor) -> Tensor:
    return ops.swiglu.eager(gate, x).index_fill(0, torch.tensor([0]), torch.nan)


MILLISECONDS = {"gelu": 0.5, "fast_gelu": 0.25, "wrong_geglu": 0.01, "slow_geglu": 2.0, "one_swiglu": 0.1}


def measure(call: Callable[[], Any]) -> float:
    assert isinstance(call, partial)
    call()
    return MILLISECONDS.get(call.func.__name__, 1.0)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def kernel(op: str, backend: str, run: Callable[..., Any], **options: Any) -> backends.Kernel:
        refuse = options.get("refuse", lambda *_: None)
        return backends.Kernel(op, backend, run, refuse, on_request=True)

    def examples(device: torch.device, dtype: torch.dtype) -> Iterator[_proof.Example]:
        for size in (64, 4096):
            x = torch.randn(size, 8, device=device, dtype=dtype)
            yield "gelu_tanh", (x,), {}
            yield "geglu", (x,), {}
            yield "swiglu", (x, x), {}

    registered = {
        "gelu_tanh": [
            kernel("gelu_tanh", "cuda", gelu),
            kernel("gelu_tanh", "triton", fast_gelu, refuse=lambda x: "it is small" if len(x) < 100 else None),
        ],
        "geglu": [kernel("geglu", "cuda", slow_geglu), kernel("geglu", "triton", wrong_geglu)],
        "swiglu": [kernel("swiglu", "cuda", broken_swiglu), kernel("swiglu", "triton", one_swiglu)],
    }
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "_kernels", registered)
    monkeypatch.setattr(_proof, "examples", examples)
    monkeypatch.setattr(losses, "fastest", {})
    losses.own.cache_clear()
    yield
    losses.own.cache_clear()


def test_the_command_lets_what_is_proven_serve(
    made_up: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton_backend, "why_not", lambda: None)
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda device: {"torch_attention": {"many": [64], "few": [], "source": "here"}})
    monkeypatch.setattr(tune, "milliseconds", measure)
    x = torch.randn(4096, 8, dtype=torch.bfloat16)
    assert losses.UNPROVEN in ops.gelu_tanh.choose(x).reason

    assert cli.main(["tune", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    # Twice as fast at both sizes is as good as four times at one; the first of equals is taken.
    assert "gelu_tanh in bf16: served by cuda from now on, 2.00 times as fast" in said
    assert "geglu in fp32: left to eager" in said and "swiglu in fp16: left to eager" in said
    assert ops.gelu_tanh.choose(x).run is gelu
    assert f"eager is the faster one on {losses.kind(CPU)} in bf16, as measured" in ops.geglu.choose(x).reason

    assert cli.main(["tune", "--device", "cpu", "--reset"]) == 0
    assert losses.UNPROVEN in ops.gelu_tanh.choose(x).reason


def test_another_version_is_another_proof(made_up: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _proof.prove(CPU, measure)
    assert losses.by_speed(losses.kind(CPU), "gelu_tanh", "bf16") == ["cuda", "triton", "eager"]
    monkeypatch.setattr(losses, "own_versions", lambda: {"fastdiff": "0", "torch": "0"})
    losses.own.cache_clear()
    assert losses.by_speed(losses.kind(CPU), "gelu_tanh", "bf16") == []


@pytest.mark.parametrize("text", ["{cut", "{}", "[]", '{"versions": VERSIONS, "fastest": {"gelu_tanh": "cuda"}}'])
def test_a_file_that_is_none(text: str, made_up: None) -> None:
    """What another version wrote, or was cut, counts as no proof."""
    file = losses.own_file(losses.kind(CPU))
    file.write_text(text.replace("VERSIONS", json.dumps(losses.own_versions())))
    assert losses.by_speed(losses.kind(CPU), "gelu_tanh", "bf16") == []


@pytest.mark.parametrize("dtype", losses.DTYPES)
def test_examples_are_calls_of_every_gpu_op(dtype: torch.dtype) -> None:
    refuse, count = _gpu.refusals("meta"), 0
    seen = set()
    for name, args, kwargs in _proof.examples(torch.device("meta"), dtype):
        check = OPS[name]._check
        assert check is None or check(*args, **kwargs) is None
        assert refuse[name](*args, **kwargs) is None, name
        seen.add(name)
        count += 1
    assert seen == set(cuda.OPS) and count == _proof.COUNT

"""What every op shares: the choice of a backend, forward-mode derivatives, pickling, tracing."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdiff
from fastdiff import backends, ops
from fastdiff.backends import losses
from fastdiff.ops._library import OPS


@pytest.mark.parametrize("call", [ops.gelu_tanh, ops.gelu_tanh.overload], ids=["public", "overload"])
def test_forward_mode(call: object) -> None:
    """A kernel would drop the tangent without a word; the op runs eager instead."""
    x, direction = torch.randn(3, 8), torch.randn(3, 8)
    expected = torch.func.jvp(lambda x: F.gelu(x, approximate="tanh"), (x,), (direction,))
    for ours, eager in zip(torch.func.jvp(call, (x,), (direction,)), expected, strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in ops.gelu_tanh.choose(x).reason


def test_copies_are_the_op() -> None:
    for op in OPS.values():
        assert pickle.loads(pickle.dumps(op)) is op
        assert copy.deepcopy(op) is op


def test_unknown_backend() -> None:
    message = "backend is 'cuda9'; expected one of cuda, triton, cpu, eager"
    with pytest.raises(ValueError, match=message), fastdiff.use_backend("cuda9"):
        pass
    assert ops.gelu_tanh.choose(torch.randn(4)).backend == "cpu"


def test_use_backend_is_of_the_thread_and_the_block() -> None:
    x, seen = torch.randn(4), []
    with fastdiff.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(ops.gelu_tanh.choose(x).backend))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), fastdiff.use_backend("cpu"):
            raise KeyError
        assert ops.gelu_tanh.choose(x).backend == "eager"
    assert seen == ["cpu"]


def test_strict_names_the_reason() -> None:
    x = torch.randn(4, dtype=torch.float64)
    with fastdiff.use_backend("cpu"):
        torch.testing.assert_close(ops.gelu_tanh(x), F.gelu(x, approximate="tanh"))
    with fastdiff.use_backend("cpu", strict=True), pytest.raises(fastdiff.BackendError, match="float64"):
        ops.gelu_tanh(x)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (ops.group_norm_silu, (torch.randn(2, 8, 3), 4, torch.ones(2))),
        (ops.geglu, (torch.randn(3, 5),)),
        (ops.cfg_combine, (torch.randn(2, 8), torch.randn(4, 4), 2.0)),
    ],
    ids=["short weight", "odd axis", "two shapes"],
)
def test_overload_checks_what_it_reads(op: Any, arguments: tuple[Any, ...]) -> None:
    """A compiled graph calls the overload without the op's own checks."""
    with pytest.raises(RuntimeError, match="fastdiff: "):
        op.overload(*arguments)


def test_integers_are_refused() -> None:
    x = torch.arange(8).reshape(1, 8)
    for op, arguments in (
        (ops.gelu_tanh, (x,)),
        (ops.geglu, (x,)),
        (ops.group_norm_silu, (x, 4)),
        (ops.scheduler_step, (x, x, [], None, [1.0, 1.0, 0.0, 0.0], [])),
    ):
        with pytest.raises(ValueError, match="floating point"):
            op(*arguments)


def test_compiled_graph_follows_use_backend() -> None:
    """torch.compile guards on the override, so backends can be compared on a compiled model."""
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    compiled = torch.compile(lambda x: ops.gelu_tanh(x) * 2, fullgraph=True, backend=backend)
    x = torch.randn(3, 8)
    with torch.no_grad():
        compiled(x)
        with fastdiff.use_backend("eager"):
            compiled(x)
    assert ["fastdiff.gelu_tanh" in code for code in graphs] == [True, False]


def test_unproven_kernels_serve_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4)
    kernel = backends.Kernel("gelu_tanh", "triton", torch.neg, lambda x: None, on_request=True)
    monkeypatch.setitem(backends._kernels, "gelu_tanh", [kernel])
    monkeypatch.setattr(losses, "fastest", {})
    choice = ops.gelu_tanh.choose(x)
    assert choice.backend == "eager" and "triton: not proven on a GPU yet" in choice.reason
    with fastdiff.use_backend("triton"):
        assert torch.equal(ops.gelu_tanh(x), -x)


def test_the_measured_table_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, op and dtype; a request overrides it, and the reason names what was faster."""
    kernels = [
        backends.Kernel("gelu_tanh", name, function, lambda x: None, on_request=True)
        for name, function in (("cuda", torch.neg), ("triton", torch.abs))
    ]
    monkeypatch.setitem(backends._kernels, "gelu_tanh", kernels)
    monkeypatch.setattr(losses, "kind", lambda device: "cuda sm_90")
    x = -torch.rand(4)

    def chosen(x: torch.Tensor = x, **entries: str) -> backends.Choice:
        here = {op: {"fp32": backend, "fp16": "eager"} for op, backend in entries.items()}
        monkeypatch.setattr(losses, "fastest", {"cuda sm_90": here, "cuda sm_80": {"gelu_tanh": {"fp32": "eager"}}})
        return ops.gelu_tanh.choose(x)

    assert chosen(gelu_tanh="cuda").backend == "cuda"
    assert chosen(gelu_tanh="triton").backend == "triton"
    unmeasured = chosen(geglu="cuda")
    assert unmeasured.backend == "eager" and "cuda: not proven on a GPU yet" in unmeasured.reason
    assert "eager is the faster one on cuda sm_90 in fp16" in chosen(x.half(), gelu_tanh="cuda").reason
    assert "cuda: not proven on a GPU yet" in chosen(x.bfloat16(), gelu_tanh="cuda").reason
    slower = chosen(gelu_tanh="eager")
    assert slower.backend == "eager"
    assert "cuda: eager is the faster one on cuda sm_90 in fp32, as measured" in slower.reason
    with fastdiff.use_backend("cuda"):
        assert ops.gelu_tanh.choose(x).backend == "cuda"


def test_the_next_fastest_serves_what_the_fastest_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the measured order, whatever the order of registration; eager where nothing else takes the call."""

    def refuse_long(limit: int) -> backends.Refuse:
        return lambda x: f"x is longer than {limit}" if len(x) > limit else None

    limits = {"cuda": 8, "triton": 4, "cpu": 6}
    kernels = [
        backends.Kernel("gelu_tanh", name, torch.neg, refuse_long(limit), on_request=True)
        for name, limit in limits.items()
    ]
    monkeypatch.setitem(backends._kernels, "gelu_tanh", kernels)
    monkeypatch.setattr(losses, "kind", lambda device: "cuda sm_90")
    measured = {"fp32": "triton, cpu, cuda", "fp16": "triton"}
    monkeypatch.setattr(losses, "fastest", {"cuda sm_90": {"gelu_tanh": measured}})
    found = {n: ops.gelu_tanh.choose(torch.ones(n)) for n in (4, 5, 7, 9)}
    assert [choice.backend for choice in found.values()] == ["triton", "cpu", "cuda", "eager"]
    assert found[4].reason == "" and found[5].reason.startswith("cuda: triton is the faster one on cuda sm_90 in fp32")
    assert found[7].reason == "triton: x is longer than 4; cpu: x is longer than 6"
    # What was not measured to be faster than eager does not take its place.
    slow = ops.gelu_tanh.choose(torch.ones(5).half())
    assert slow.backend == "eager" and "cuda: triton is the faster one" in slow.reason

"""What serves a call on a GPU, as on an H100: asked of CPU tensors, with a driver that stands for the GPU's."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import BackendError, backends, ops, use_backend
from fastdiff.backends import Kernel, _gpu, cuda, losses, triton
from fastdiff.backends.triton import _config
from fastdiff.ops._library import OPS

pytestmark = pytest.mark.skipif(triton.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is asked of a GPU")

#: Of attention, as registered: where it is left to torch.
ATTENTION = {"cuda": cuda.torch_is_faster, "triton": _config.torch_is_faster}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The driver's answers are those of an H100; torch.compile cannot trace it, as it cannot trace the real one."""
    questions: list[Any] = []

    def capability(device: Any = None) -> tuple[int, int]:
        zlib.crc32(b"a call into C")
        questions.append(device)
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(losses, "fastest", {})
    monkeypatch.setattr(_config, "architecture", capability)
    monkeypatch.setattr(cuda._extension, "build_info", lambda: {"cuda": {"architectures": ["sm_90a"]}})
    facts = (cuda.device_reason, cuda._torch_depths, triton.why_not_on, triton.without_fp64)

    def forget() -> None:
        _config.forget()
        for fact in facts:
            fact.cache_clear()

    forget()
    yield questions
    forget()


@pytest.fixture
def kernels(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both GPU backends for CPU tensors; their kernels are eager, by operators of their own."""
    library = torch.library.Library("fastdiff_test_choice", "DEF")
    found = {}
    for name in ("adaln_modulate", "attention", "scheduler_step"):
        overload = OPS[name].define_in(library, OPS[name].eager)
        shared = _gpu.refusals("cpu")[name]
        limit = cuda._LIMITS.get(name)
        refusals = {
            "cuda": lambda *a, shared=shared, limit=limit, **k: (
                shared(*a, **k) or (limit and limit(*a, **k)) or cuda.device_reason(-1)
            ),
            "triton": triton._refuse(name, shared),
        }
        found[name] = [
            Kernel(name, backend, overload, refuse, yields=ATTENTION[backend] if name == "attention" else None,
                   on_request=True)
            for backend, refuse in refusals.items()
        ]  # fmt: skip
    monkeypatch.setattr(backends, "_kernels", found)
    yield
    library._destroy()


def calls() -> dict[str, tuple[Any, ...]]:
    def half(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16()

    return {
        "adaln_modulate": (half(2, 3, 8), half(2, 8), half(2, 8)),
        "attention": (half(1, 3, 2, 40), half(1, 600, 2, 40), half(1, 600, 2, 40)),
        "scheduler_step": (half(2, 8), half(2, 8), [half(2, 8)], None, [0.9, 0.1, 0.2, 0.0, 0.3], []),
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [("adaln_modulate", None), ("attention", "cuda"), ("attention", "triton"), ("scheduler_step", "triton")],
)
def test_compile_without_a_break(name: str, backend: str | None, kernels: None, asked: list[Any]) -> None:
    """The driver is asked while torch.compile traces, and its answers are constants; nothing breaks the graph."""
    graphs: list[str] = []

    def watching(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    def call(*arguments: Any) -> Any:
        if backend is None:
            return OPS[name](*arguments)
        with use_backend(backend):
            return OPS[name](*arguments)

    torch._dynamo.reset()
    losses.kind.cache_clear()
    with torch.no_grad():
        torch.compile(call, fullgraph=True, backend=watching)(*calls()[name])
    assert len(graphs) == 1
    assert (f"fastdiff_test_choice.{name}" in graphs[0]) == (backend is not None)
    assert asked or backend is None


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_torch_attends_where_it_is_faster_unless_ours_is_demanded(backend: str, kernels: None) -> None:
    def call(depth: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (torch.randn(1, n, 1, depth).bfloat16() for n in (3, keys))
        return q, k, k

    for depth, keys, left in ((64, 600, True), (128, 600, True), (72, 600, False), (64, 77, False)):
        with use_backend(backend):
            choice = ops.attention.choose(*call(depth, keys))
        assert choice.backend == ("eager" if left else backend), choice
        assert not left or f"head dimension {depth} and more than 512 keys (published figures" in choice.reason
        with use_backend(backend, strict=True):
            assert ops.attention.choose(*call(depth, keys)).backend == backend
    with use_backend(backend, strict=True), pytest.raises(BackendError, match="520, more than 512"):
        ops.attention.choose(*call(520, 600))


def test_measurements_take_the_place_of_published_figures(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.randn(1, n, 1, 128).bfloat16() for n in (3, 600))
    assert all(yields(q, k, k) for yields in ATTENTION.values())
    monkeypatch.setattr(losses, "is_measured", lambda device, op: True)
    monkeypatch.setattr(cuda, "is_measured", lambda device, op: True)
    _config.forget()
    cuda._torch_depths.cache_clear()
    assert not any(yields(q, k, k) for yields in ATTENTION.values())

"""The launch itself, with a driver that stands for a GPU: Triton compiles, and what would run is recorded."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)


class Gpu:
    """As much of a driver as Triton's launch asks for."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            load_binary=lambda *_: ("module", "function", 32, 0, 1024),
            unload_module=lambda _: None,
        )

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.compiled.append(source.name)
        return lambda *args: self.launched.append(args)


def _forget() -> None:
    """What the kernels know of a GPU."""
    from fastdiff.backends.triton import _launch

    for kernel in _launch.KERNELS:
        kernel._launches.clear()
        for function in (kernel.aligned, kernel.loose):
            function.device_caches.clear()


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    from triton.runtime import driver

    from fastdiff.backends.triton import _config, _rows, attention, group_norm_silu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_config, "architecture", lambda _: (9, 0))
    monkeypatch.setattr(attention, "on_chip", lambda _: 227 << 10)
    for module in (_rows, attention, group_norm_silu):
        monkeypatch.setattr(module, "processors", lambda _: 132)
    _config.forget()
    stand_in = Gpu()
    monkeypatch.setattr(type(driver), "active", stand_in)
    _forget()
    yield stand_in
    _forget()
    _config.forget()


def test_new_sizes_compile_nothing(gpu: Gpu) -> None:
    from fastdiff.backends.triton import gelu_tanh

    for n in (8, 16, 64, 4096, 80000):
        gelu_tanh.run(torch.empty(n, dtype=torch.bfloat16))
    assert len(gpu.launched) == 5
    assert len(gpu.compiled) == 1
    for n in (1, 7, 63, 4097):  # not in whole vectors: one more kernel, whatever the alignment
        gelu_tanh.run(torch.empty(n + 1, dtype=torch.bfloat16)[1:])
        gelu_tanh.run(torch.empty(n, dtype=torch.bfloat16))
    assert len(gpu.compiled) == 2
    gelu_tanh.run(torch.empty(8, dtype=torch.float32))
    assert len(gpu.compiled) == 3


def test_the_short_way_passes_what_the_long_way_does(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.backends.triton import _launch, gelu_tanh

    x = torch.empty(4096, dtype=torch.bfloat16)
    gelu_tanh.run(x)
    monkeypatch.setattr(_launch, "_stream", lambda *_: 7)
    gelu_tanh.run(x)
    long, short = gpu.launched
    assert len(gpu.compiled) == 1
    grid = slice(0, 3)
    assert long[grid] == short[grid] == (4, 1, 1)
    assert long[3:6] == short[3:6]  # stream, function, metadata
    assert short[6:9] == (None, None, None)  # no hooks of profilers
    assert long[9].data_ptr() == short[9].data_ptr() == x.data_ptr()
    assert long[11:] == short[11:]


def _calls() -> dict[str, Callable[[], Any]]:
    from fastdiff.backends.triton import (
        adaln_modulate,
        attention,
        cfg_combine,
        gate_residual,
        gate_residual_adaln,
        geglu,
        gelu_tanh,
        group_norm_silu,
        qk_norm_rope,
        rms_norm_silu,
        scheduler_step,
        swiglu,
    )

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    x, m, image, w = t(1, 16, 64), t(1, 384).chunk(6, 1), t(2, 64, 64, 64), t(64)
    q, k, norm, table = t(1, 600, 4, 40), t(1, 77, 4, 40), t(40), t(600, 40, dtype=torch.float32)
    return {
        "gelu_tanh": lambda: gelu_tanh.run(x),
        "adaln_modulate": lambda: adaln_modulate.run(x, m[0], m[1]),
        "gate_residual": lambda: gate_residual.run(x, m[2], x),
        "gate_residual_adaln": lambda: gate_residual_adaln.run(x, m[2], x, m[3], m[4]),
        "group_norm_silu": lambda: group_norm_silu.run(image, 32, w, w),
        "rms_norm_silu": lambda: rms_norm_silu.run(image, w),
        "geglu": lambda: geglu.run(x),
        "swiglu": lambda: swiglu.run(x, x),
        "qk_norm_rope": lambda: qk_norm_rope.run(q, q, norm, norm, None, None, table, table),
        "attention, 600 keys": lambda: attention.run(q, q, q),
        "attention, 77 keys": lambda: attention.run(q, k, k),
        "scheduler_step": lambda: scheduler_step.run(x, x, [x], None, [1.0] * 5, []),
        "cfg_combine": lambda: cfg_combine.run(x, x, 7.5),
    }


def test_host_path(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python does for a call after the first, counted, as time would depend on the machine; ``-s`` prints both,
    and the processor's seconds for the first."""
    from fastdiff.backends.triton import _launch

    monkeypatch.setattr(_launch, "_stream", lambda *_: 7)
    for name, call in _calls().items():
        begin = sum(os.times()[:4])
        call()
        first = sum(os.times()[:4]) - begin
        call()
        launched, functions = len(gpu.launched), 0

        def count(_: Any, event: str, __: Any) -> None:
            nonlocal functions
            functions += event in ("call", "c_call")

        sys.setprofile(count)
        call()
        sys.setprofile(None)
        launches = len(gpu.launched) - launched
        start = time.perf_counter()
        for _ in range(100):
            call()
        each = (time.perf_counter() - start) * 1e4
        print(f"{name}: first {first:.2f} s, then {each:.1f} us for {launches} launches, {functions} function calls")
        assert launches == (2 if name in ("group_norm_silu", "qk_norm_rope") else 1), name
        assert functions <= 60 * launches, (name, functions)

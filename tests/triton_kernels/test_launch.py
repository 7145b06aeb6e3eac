"""The launch itself, with a driver that stands for a GPU: Triton compiles, and what would run is recorded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
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


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    from triton.runtime import driver

    from fastdiff.backends.triton import _config, gelu_tanh

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_config, "architecture", lambda _: (9, 0))
    _config.config.cache_clear()
    _config.table.cache_clear()
    stand_in = Gpu()
    monkeypatch.setattr(type(driver), "active", stand_in)
    gelu_tanh._kernel._launches.clear()
    yield stand_in
    gelu_tanh._kernel._launches.clear()
    for function in (gelu_tanh._kernel.aligned, gelu_tanh._kernel.loose):
        function.device_caches.clear()
    _config.config.cache_clear()
    _config.table.cache_clear()


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

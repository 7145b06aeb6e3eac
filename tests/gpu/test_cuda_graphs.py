"""CUDA graphs on a GPU: replays against the same model without graphs, changes between them, and the memory."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import _graph_calls, patch_of
from fastdiff.patching._graphs import GraphStats

sys.path.insert(0, str(Path(__file__).parents[1] / "patching"))

from actions import add_lora
from models import CASES, run_sd, sd15_unet, sd_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

DENOISERS = [case for case in CASES if case.name != "AutoencoderKL"]
SD = CASES[0]


def inputs(seed: int = 0, case: Any = SD, **changes: Any) -> dict[str, Any]:
    found = case.inputs(torch.Generator().manual_seed(seed), torch.float32) | changes
    return {k: on_gpu(v) for k, v in found.items()}


def on_gpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: on_gpu(v) for k, v in value.items()}
    return value.cuda() if isinstance(value, Tensor) else value


def pair_of(build: Callable[[], Any] = sd15_unet, **options: Any) -> tuple[Any, Any]:
    """A model with graphs, and the same without."""
    return fastdiff.patch(build().cuda(), cuda_graphs=True, **options), fastdiff.patch(build().cuda(), **options)


def same(pair: tuple[Any, Any], seed: int, case: Any = SD, **changes: Any) -> None:
    with torch.no_grad():
        a, b = (model(**inputs(seed, case, **changes), return_dict=False)[0] for model in pair)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def stats_of(model: Any) -> GraphStats:
    return patch_of(model).graphs.stats()


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("case", DENOISERS, ids=lambda case: case.name)
def test_replays(case: Any, backend: str | None) -> None:
    pair = pair_of(case.build, backend=backend)
    for seed in range(5):
        same(pair, seed, case)
    stats = stats_of(pair[0])
    assert (stats.captures, stats.replays) == (1, 4), fastdiff.report(pair[0])


def test_a_pipeline() -> None:
    pipes = [sd_pipeline().to("cuda") for _ in range(2)]
    fastdiff.patch(pipes[0], cuda_graphs=True)
    fastdiff.patch(pipes[1])
    for seed in range(2):
        a, b = (run_sd(pipe, seed, num_inference_steps=6) for pipe in pipes)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert stats_of(pipes[0].unet).replays >= 10


def test_other_sizes_and_back() -> None:
    pair = pair_of()
    for size in (8, 16, 24):
        for seed in range(3):
            same(pair, seed, sample=torch.randn(2, 4, size, size))
    same(pair, 3)
    assert stats_of(pair[0]).captures == 3


def test_outputs_are_kept() -> None:
    model, plain = pair_of()
    with torch.no_grad():
        held = [model(**inputs(seed), return_dict=False)[0] for seed in range(6)]
        for seed, result in enumerate(held):
            torch.testing.assert_close(result, plain(**inputs(seed), return_dict=False)[0], rtol=1e-5, atol=1e-5)


def test_loras_come_and_go() -> None:
    pair = pair_of()
    for seed in range(5):
        same(pair, seed)
    for change in (
        lambda m: (add_lora(m), m.cuda()),
        lambda m: m.set_adapters(["default"], weights=[0.3]),
        lambda m: m.fuse_lora(),
        lambda m: m.unfuse_lora(),
        lambda m: m.delete_adapters("default"),
        lambda m: m.conv_in.weight.data.mul_(2),  # seen without another capture
    ):
        for model in pair:
            change(model)
        for seed in range(5):
            same(pair, seed)
    assert stats_of(pair[0]).replays >= 24


def test_to_the_cpu_and_back() -> None:
    """Patched and looked at on the CPU, too."""
    pair = fastdiff.patch(sd15_unet(), cuda_graphs=True), fastdiff.patch(sd15_unet())
    assert fastdiff.report(pair[0]).graphs[0].reason == "its weights are on cpu; CUDA is needed"
    for model in pair:
        model.cuda()
    for seed in range(3):
        same(pair, seed)
    for model in pair:
        model.to("cpu").to("cuda")
    for seed in range(3):
        same(pair, seed)
    assert stats_of(pair[0]).captures == 2


def test_memory_goes_back() -> None:
    model = sd15_unet().cuda()
    arguments = inputs(sample=torch.randn(2, 4, 128, 128))
    with torch.no_grad():
        model(**arguments)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):  # a leak would add up
        fastdiff.patch(model, cuda_graphs=True)
        with torch.no_grad():
            for _ in range(3):
                model(**arguments)
        assert stats_of(model).graphs == 1
        assert torch.cuda.memory_reserved() > before
        fastdiff.unpatch(model)
        torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (64 << 20)  # cuBLAS's workspaces


class Reading(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.sum().item() > 0 else 1.0)


Reading.__module__ = "diffusers.test"


@pytest.mark.parametrize("watched", [True, False])
def test_host_syncs(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the capture; and where not, the capture fails, and everything goes on."""
    if not watched:
        monkeypatch.setattr(_graph_calls, "_WAITING", frozenset())
    pair = pair_of()
    stock = pair[0].conv_act
    for model in pair:
        model.conv_act = Reading()
    for seed in range(3):
        same(pair, seed)
    stats = stats_of(pair[0])
    assert stats.captures == 0
    reason = "makes the host wait" if watched else "the capture failed"
    assert any(reason in r for r in stats.ordinary), stats
    torch.cuda.empty_cache()  # the allocator is sane
    for model in pair:
        model.conv_act = stock
    for seed in range(4):
        same(pair, seed)
    assert stats_of(pair[0]).captures == 1, stats_of(pair[0])


def test_threads_on_streams_of_their_own() -> None:
    model, plain = pair_of()
    with torch.no_grad():
        expected = [plain(**inputs(seed), return_dict=False)[0] for seed in range(4)]
        for seed in range(3):
            model(**inputs(seed))
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            arguments = inputs(seed)
            for _ in range(20):
                result = model(**arguments, return_dict=False)[0]
                if not torch.allclose(result, expected[seed], rtol=1e-5, atol=1e-5):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert stats_of(model).replays >= 60


def test_graphs_of_compile_do_not_disturb() -> None:
    """They clear cuBLAS's workspaces, which a captured graph must not share."""
    pair = pair_of()
    for seed in range(3):
        same(pair, seed)
    compiled = torch.compile(nn.Linear(256, 256).cuda().requires_grad_(False), mode="reduce-overhead")
    for _ in range(4):
        compiled(torch.randn(64, 256, device="cuda"))
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    for seed in range(3):
        same(pair, seed)
    del junk


def test_the_check_costs_little() -> None:
    """No device is waited for: a check while the device is busy returns before the device is done."""
    model, _ = pair_of()
    for seed in range(3):
        with torch.no_grad():
            model(**inputs(seed))
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)
    done.record()
    assert patch_of(model).graphs._state.changed() is None
    assert not done.query()
    torch.cuda.synchronize()

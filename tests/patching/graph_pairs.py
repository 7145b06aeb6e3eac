"""Pairs of equal patched models, one of them with CUDA graphs from a fake recorder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from actions import add_lora
from fake_recorder import FakeRecorder
from models import CASES, sd15_unet
from torch import Tensor
from transformer_case import outputs

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._graphs import GraphStats, ModelGraphs

SD, SDXL, DIT = CASES[0], CASES[1], CASES[-1]
FIRST = "its first calls with such inputs are ordinary ones"


def stats_of(model: Any) -> GraphStats:
    graphs = patch_of(model).graphs
    assert isinstance(graphs, ModelGraphs)
    return graphs.stats()


def recorder_of(model: Any) -> FakeRecorder:
    return patch_of(model).graphs._recorder


_built = functools.cache(lambda build: build())


def pair_of(build: Callable[[], Any] = sd15_unet) -> tuple[Any, Any]:
    """A model with graphs, and the same without."""
    model = _built(build)
    return fastdiff.patch(copy.deepcopy(model), cuda_graphs=True), fastdiff.patch(copy.deepcopy(model))


def inputs(seed: int = 0, case: Any = SD, **changes: Any) -> dict[str, Any]:
    return case.inputs(torch.Generator().manual_seed(seed), torch.float32) | changes


def same(pair: tuple[Any, Any], seed: int, case: Any = SD, **changes: Any) -> Tensor:
    """Call both; the outputs must be bitwise equal."""
    results = []
    for model in pair:
        torch.manual_seed(seed)
        results.append(outputs(model, inputs(seed, case, **changes)))
    assert torch.equal(*results)
    assert results[0].isfinite().all()
    return results[0]


def captured(build: Callable[[], Any] = sd15_unet) -> tuple[Any, Any]:
    """Such a pair, of which one has a graph that was replayed."""
    pair = pair_of(build)
    for seed in range(3):
        same(pair, seed)
    assert (stats_of(pair[0]).captures, stats_of(pair[0]).replays) == (1, 2)
    return pair


def with_lora() -> Any:
    model = sd15_unet()
    add_lora(model)
    return model


def assign(model: Any) -> None:
    model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()}, assign=True)

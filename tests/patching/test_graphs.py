"""CUDA graphs of denoisers, driven by a recorder that repeats operations on the CPU: see ``fake_recorder.py``.

Everything is compared bitwise with the same patched model without graphs. A replay that ran on old weights, on the
inputs of another call, or into a tensor that the caller still holds would differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from graph_pairs import FIRST, SDXL, captured, inputs, pair_of, recorder_of, same, stats_of
from models import CASES, randomized, run_sd, sd15_unet, sd_pipeline
from torch import Tensor
from transformer_case import outputs
from transformer_models import TRANSFORMERS

import fastdiff
from fastdiff.patching import _graph_calls, _graphs, patch_of
from fastdiff.patching._graph_calls import HostWatch
from fastdiff.patching._graphs import GraphStats

pytestmark = pytest.mark.usefixtures("fake_graphs")


# replays


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replays_are_the_ordinary_forward(case: Any) -> None:
    pair = pair_of(case.build)
    results = [same(pair, seed, case) for seed in range(4)]
    assert not any(torch.equal(a, results[0]) for a in results[1:])
    if case.name == "AutoencoderKL":
        assert patch_of(pair[0]).graphs == "only denoisers are captured, which are called at every step"
    else:
        assert stats_of(pair[0]) == GraphStats(1, 1, 3, {FIRST: 1}, 0, {}, "")


@pytest.mark.parametrize("name", ["Flux dev", "SD3.5 medium", "Wan T2V", "Z-Image", "HunyuanVideo", "PixArt"])
def test_transformers(name: str) -> None:
    """Among them arguments in lists, empty ones, and masks."""
    row = next(row for row in TRANSFORMERS if row.name == name)
    pair = pair_of(row.build)
    arguments = row.inputs(0, model=pair[1])
    for factor in (1.0, 0.5, 0.25, 2.0):
        scaled = _scaled(arguments, factor)
        assert torch.equal(outputs(pair[0], scaled), outputs(pair[1], scaled))
    assert stats_of(pair[0]).replays >= 2  # Z-Image computes its rotary tables at the first call, and keeps them


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, dict):
        return {k: _scaled(v, factor) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_scaled(v, factor) for v in value)
    return value * factor if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 else value


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DPMSolverMultistepScheduler])
def test_samplers_keep_earlier_outputs(scheduler: Any) -> None:
    """Samplers of several steps hold outputs of the model over the next replays."""
    pipes = [sd_pipeline(scheduler=scheduler()) for _ in range(2)]
    fastdiff.patch(pipes[0], cuda_graphs=True)
    fastdiff.patch(pipes[1])
    for seed in range(2):
        results = [run_sd(pipe, seed, num_inference_steps=6) for pipe in pipes]
        assert torch.equal(*results)
    stats = stats_of(pipes[0].unet)
    assert stats.captures == 1
    assert stats.replays > 10


def test_outputs_stay_what_they_were() -> None:
    model, plain = captured()
    with torch.no_grad():
        held = [model(**inputs(seed)).sample for seed in range(3)]
        assert all(torch.equal(a, plain(**inputs(seed)).sample) for seed, a in enumerate(held))
        held[0].add_(1)  # nor does writing into one harm
        assert torch.equal(model(**inputs(1)).sample, held[1])


def test_structure_of_outputs() -> None:
    model, plain = captured()
    with torch.no_grad():
        for _ in range(3):
            result, expected = model(**inputs(5)), plain(**inputs(5))
            assert type(result) is UNet2DConditionOutput and result.keys() == expected.keys()
            assert torch.equal(result.sample, expected.sample) and result.sample is result[0]
            assert result.sample.stride() == expected.sample.stride()
    assert stats_of(model).captures == 2  # return_dict is a constant like others


def test_lists_in_outputs() -> None:
    def build() -> Any:
        unet = sd15_unet()
        return randomized(ControlNetModel.from_unet(unet, conditioning_channels=3))

    pair, results = pair_of(build), []
    for seed in range(4):
        cond = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found = [m(**inputs(seed), controlnet_cond=cond, conditioning_scale=0.5, return_dict=False) for m in pair]
        assert isinstance(found[0][0], type(found[1][0]))
        for a, b in zip([*found[0][0], found[0][1]], [*found[1][0], found[1][1]], strict=True):
            assert torch.equal(a, b)
        results.append(found[0])
    assert stats_of(pair[0]).replays == 3
    assert all(r[1].isfinite().all() for r in results)


def test_inference_mode_and_no_grad_share_graphs() -> None:
    model, plain = captured()
    with torch.inference_mode():
        result = model(**inputs(7), return_dict=False)[0]
        assert result.is_inference()
        assert torch.equal(result, plain(**inputs(7), return_dict=False)[0])
    assert stats_of(model).captures == 1
    same((model, plain), 8)


# kinds of input


def _with_batch(n: int) -> dict[str, Any]:
    found = inputs(0)
    return {k: v[:1].repeat(n, *[1] * (v.dim() - 1)) for k, v in found.items()}


_OTHER_INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "batch": lambda: _with_batch(3),
    "size": lambda: {"sample": torch.randn(2, 4, 16, 8)},
    "length of the text": lambda: {"encoder_hidden_states": torch.randn(2, 20, 32)},
    "channels last": lambda: {"sample": torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)},
    "strided": lambda: {"sample": torch.randn(2, 8, 8, 8)[:, ::2]},
    "expanded timestep": lambda: {"timestep": torch.tensor(300).expand(2)},
    "one timestep": lambda: {"timestep": torch.tensor([300])},
    "timestep of no dimension": lambda: {"timestep": torch.tensor(300)},
    "timestep of another dtype": lambda: {"timestep": torch.tensor([300.0, 20.0])},
    "a mask": lambda: {"encoder_attention_mask": torch.arange(77).repeat(2, 1) < 60},
    "nested": lambda: {"cross_attention_kwargs": {"scale": 0.5}},
    "nested, another constant": lambda: {"cross_attention_kwargs": {"scale": 0.25}},
    "None given": lambda: {"class_labels": None},
}


def test_every_kind_of_input_has_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graphs, "MAX_GRAPHS", 100)
    pair = captured()
    for count, (name, changes) in enumerate(_OTHER_INPUTS.items(), 1):
        for seed in range(3):
            same(pair, seed, **changes())
        stats = stats_of(pair[0])
        assert stats.captures == stats.graphs == stats.ordinary[FIRST] == count + 1, name
        assert stats.replays == 2 * (count + 1), name
    same(pair, 5)
    assert stats_of(pair[0]).captures == len(_OTHER_INPUTS) + 1


def test_tensors_in_nested_arguments() -> None:
    pair = pair_of(SDXL.build)
    for seed in range(3):
        same(pair, seed, SDXL)
    more = inputs(0, SDXL)["added_cond_kwargs"] | {"time_ids": torch.zeros(2, 6)}
    same(pair, 0, SDXL, added_cond_kwargs=more)
    assert stats_of(pair[0]).replays == 3
    same(pair, 0, SDXL, added_cond_kwargs={**more, "unused": 1})
    assert stats_of(pair[0]).ordinary[FIRST] == 2


def test_positional_arguments() -> None:
    pair = pair_of()
    with torch.no_grad():
        for seed in range(4):
            arguments = tuple(inputs(seed).values())
            a, b = (model(*arguments, return_dict=False)[0] for model in pair)
            assert torch.equal(a, b)
    assert stats_of(pair[0]).replays == 3


def test_timesteps_on_the_host() -> None:
    """A number in a CPU tensor is put on the model's device, whatever that is."""
    call = _graph_calls.Call(("t",), (torch.tensor(5),), {}, "meta")
    static = _graph_calls.StaticArguments(call, torch.device("meta"))
    assert static.arguments()[0][0].device.type == "meta"
    with pytest.raises(_graph_calls.NotCapturable, match="argument t is on cpu"):
        _graph_calls.Call(("t",), (torch.tensor([5]),), {}, "meta")


def test_settings_of_the_process() -> None:
    pair = captured()
    with fastdiff.use_backend("eager"):
        same(pair, 3)
        same(pair, 4)
    assert stats_of(pair[0]).captures == 2
    earlier = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            seen = _graphs._settings()
            torch.set_float32_matmul_precision("medium")
            assert seen != _graphs._settings()
    finally:
        torch.set_float32_matmul_precision(earlier)
    same(pair, 5)
    assert stats_of(pair[0]).captures == 2


# which graphs are kept


def test_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_graphs, "MAX_GRAPHS", 2)
    pair = pair_of()
    size = {n: {"sample": torch.randn(2, 4, n, 8)} for n in (8, 16, 24)}
    for n in (8, 16):
        for _ in range(5):
            same(pair, 0, **size[n])
    same(pair, 0, **size[8])
    for _ in range(2):
        same(pair, 0, **size[24])
    assert (stats_of(pair[0]).graphs, stats_of(pair[0]).evicted, stats_of(pair[0]).captures) == (2, 1, 3)
    assert len(recorder_of(pair[0]).recordings) == 2
    same(pair, 0, **size[8])
    assert stats_of(pair[0]).captures == 3  # it was used after the other
    before = stats_of(pair[0]).ordinary[FIRST]
    same(pair, 0, **size[16])
    assert stats_of(pair[0]).ordinary[FIRST] == before + 1


def test_captures_that_do_not_pay_get_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of input more than there may be graphs: each of them is gone when it is needed."""
    monkeypatch.setattr(_graphs, "MAX_GRAPHS", 2)
    pair = pair_of()
    sizes = [{"sample": torch.randn(2, 4, n, 8)} for n in (8, 16, 24)]
    for i in range(45):
        outputs(pair[0], inputs(0, **sizes[i % 3]))
    assert 3 <= stats_of(pair[0]).captures <= 12
    same(pair, 0, **sizes[1])


def test_tables_that_only_a_cache_holds_are_kept() -> None:
    """A replay reads a table (rotary frequencies in an lru_cache) where it was, after the cache has let go of it."""
    weight, table, cache = torch.randn(4), torch.randn(4), []
    with HostWatch(torch.device("cpu"), {}, frozenset({id(weight)})) as watch:
        cache.append(torch.cos(table))
        y = cache[0] * weight + 1
        del y
    assert {id(t) for t in watch.outside()} == {id(table), id(cache[0])}

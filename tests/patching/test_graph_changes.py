"""CUDA graphs: what is done to a model between replays is seen, and what cannot be captured is not."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from actions import OwnProcessor, wrap_forwards
from extent import ALL
from fake_recorder import FakeRecorder
from graph_pairs import DIT, FIRST, assign, captured, inputs, pair_of, recorder_of, same, stats_of, with_lora
from hazards import HAZARDS
from models import sd15_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_case import outputs

import fastdiff
from fastdiff.patching import _graph_calls, _graph_state, _graphs, patch_of

pytestmark = pytest.mark.usefixtures("fake_graphs")


# changes of the model


def _data(model: Any) -> None:
    model.conv_in.weight.data = 1.5 * model.conv_in.weight.data


def _new_block(model: Any) -> None:
    model.mid_block.resnets[0] = copy.deepcopy(model.mid_block.resnets[1])


def _cast_twice(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _padding(model: Any) -> None:
    model.conv_out.padding_mode = "circular"
    model.conv_out._reversed_padding_repeated_twice = [1, 1, 1, 1]


#: What is done -> what the report says of the graph that went; ``None``: nothing goes, and the change is seen.
_CHANGES: dict[str, tuple[Callable[[Any], Any], str | None, Callable[[], Any]]] = {
    "weights in place": (lambda m: m.conv_in.weight.mul_(1.5), None, sd15_unet),
    "weights through .data, in place": (lambda m: m.conv_in.weight.data.mul_(1.5), None, sd15_unet),
    "state dict": (
        lambda m: m.load_state_dict({k: 1.5 * v for k, v in m.state_dict().items()}), None, sd15_unet
    ),
    "state dict, assigned": (assign, "parameters were replaced", sd15_unet),
    "parameter": (
        lambda m: setattr(m.conv_in, "weight", nn.Parameter(1.5 * m.conv_in.weight, requires_grad=False)),
        "parameters were replaced", sd15_unet,
    ),
    "data of a parameter": (_data, "parameters were moved or cast", sd15_unet),
    "cast and back": (_cast_twice, "parameters were moved or cast", sd15_unet),
    "block": (_new_block, "its modules or their attributes changed", sd15_unet),
    "attribute": (
        lambda m: setattr(m.mid_block.resnets[0], "output_scale_factor", 3.0),
        "its modules or their attributes changed", sd15_unet,
    ),
    "padding": (_padding, "its modules or their attributes changed", sd15_unet),
    "new attribute": (
        lambda m: setattr(m.mid_block.resnets[0].conv1, "note", 1), "modules, hooks or attributes were added", sd15_unet
    ),
    "LoRA scale": (
        lambda m: m.set_adapters(["default"], weights=[0.3]), "its modules or their attributes changed", with_lora
    ),
    "LoRA off": (lambda m: m.disable_adapters(), "its modules or their attributes changed", with_lora),
    "LoRA weights": (
        lambda m: [p.mul_(2) for n, p in m.named_parameters() if "lora_B" in n], None, with_lora
    ),
    "LoRA fused": (lambda m: m.fuse_lora(), "modules, hooks or attributes were added", with_lora),
}  # fmt: skip


@pytest.mark.parametrize("name", _CHANGES)
@torch.no_grad()
def test_changes_are_seen(name: str) -> None:
    change, dropped, build = _CHANGES[name]
    pair = captured(build)
    before = same(pair, 3)
    for model in pair:
        change(model)
    after = same(pair, 3)
    assert torch.equal(after, before) == (name == "new attribute")
    same(pair, 4)
    stats = stats_of(pair[0])
    if dropped is None:
        assert (stats.captures, stats.dropped) == (1, {})
    else:
        assert sum(stats.dropped.values()) == 1
        assert stats.captures == 2
        if name != "LoRA fused":
            assert stats.dropped == {dropped: 1}


def test_a_model_that_keeps_changing_is_looked_at_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(_graphs, "State", lambda *args: looked.append(args) or _graph_state.State(*args))
    pair = pair_of(DIT.build)
    for call in range(40):
        pair[0].transformer_blocks[0].note = call
        outputs(pair[0], inputs(call, DIT))
    assert 3 <= len(looked) <= 7
    assert stats_of(pair[0]).captures == 0
    for seed in range(75):
        outputs(pair[0], inputs(seed, DIT))
    same(pair, 0, DIT)
    assert stats_of(pair[0]).replays > 0


def test_equal_attributes_drop_nothing() -> None:
    pair = captured()
    norm = pair[0].mid_block.resnets[0].norm1
    earlier, norm.eps = norm.eps, float(str(norm.eps))
    assert norm.eps is not earlier
    same(pair, 4)
    assert stats_of(pair[0]).dropped == {}


#: The rest takes minutes.
_SOME = ("two LoRAs", "model offload", "Diffusers hook", "fused projections", "FreeU", "first block cache")


@pytest.mark.parametrize("name", HAZARDS if ALL else _SOME)
def test_hazards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that Diffusers, PEFT, accelerate and users do to a model, between and after replays."""
    monkeypatch.setattr(_graph_state, "_KNOWN", (*_graph_state._KNOWN, "hazards"))
    hazard = HAZARDS[name]
    pair = pair_of(hazard.case.build)

    def compare() -> Tensor:
        results = [[hazard.run(model) for _ in range(3)] for model in pair]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        return results[0][-1]

    before = compare()
    if hazard.calls == 1:  # else an attribute counts the calls
        assert stats_of(pair[0]).replays >= 2
    for model in pair:
        torch.manual_seed(0)
        hazard.apply(model)
    changed = compare()
    if hazard.changes:
        assert not torch.equal(changed, before)
    if hazard.undo is not None:
        for model in pair:
            hazard.undo(model)
        compare()


def test_a_replaced_parameter_is_freed_at_once() -> None:
    model = sd15_unet()
    state = _graph_state.State(model, "cpu")
    old = weakref.ref(model.conv_in.weight)
    model.conv_in.weight = nn.Parameter(torch.randn_like(model.conv_in.weight), requires_grad=False)
    assert old() is None
    assert state.changed() == "parameters were replaced"


def test_moving_to_the_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the parameters, and changes where they are."""
    state = _graph_state.State(sd15_unet(), "cuda")
    assert state.reason == "its weights are on cpu; CUDA is needed"
    assert state.changed() is None
    monkeypatch.setattr(_graph_state, "_device", lambda tensor: torch.device("cuda"))
    assert state.changed() == "parameters were moved or cast"


def test_the_check_reads_no_tensor() -> None:
    """So it cannot wait for a device."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called")

    model = with_lora()
    state = _graph_state.State(model, "cpu")
    with Nothing():
        assert state.changed() is None
    model.set_adapters(["default"], weights=[0.3])
    with Nothing():
        assert state.changed() == "its modules or their attributes changed"


# what is not captured


class _Rounding(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.sum().item() > 0 else 1.0)


class _Writing(nn.Module):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


_Rounding.__module__ = _Writing.__module__ = "diffusers.test"


@contextlib.contextmanager
def _hook_for_all() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _someone_captures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(FakeRecorder, "capturing", True)
        yield


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


_NOT_NOW: dict[str, tuple[Callable[[], Any], str]] = {
    "gradients": (torch.enable_grad, "gradients are enabled"),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
    "dispatch mode": (_Mode, "a dispatch mode wants to see every operation"),
    "function mode": (_FunctionMode, "a dispatch mode wants to see every operation"),
    "hooks for all": (_hook_for_all, "hooks for all modules have to see every call"),
    "another capture": (_someone_captures, "within another capture"),
}


@pytest.mark.parametrize("name", _NOT_NOW)
def test_calls_that_need_python(name: str) -> None:
    context, reason = _NOT_NOW[name]
    pair = captured()
    with torch.no_grad(), context():
        a, b = (model(**inputs(3), return_dict=False)[0] for model in pair)
    assert torch.equal(a, b)
    stats = stats_of(pair[0])
    assert stats.replays == 2
    assert next(r for r in stats.ordinary if r != FIRST).startswith(reason)
    same(pair, 4)
    assert stats_of(pair[0]).replays == 3  # the graph is as good as before


def test_default_device_is_no_obstacle() -> None:
    pair = captured()
    with torch.device("cpu"):
        same(pair, 4)
    assert stats_of(pair[0]).replays == 3


_NO_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"timestep": 300}, "its timestep is a Python number"),
    "on another device": ({"sample": torch.empty(2, 4, 8, 8, device="meta")}, "argument sample is on meta"),
    "sparse": ({"sample": torch.zeros(2, 4, 8, 8).to_sparse()}, "argument sample is a sparse_coo tensor"),
    "an object": ({"cross_attention_kwargs": {"a": [object()]}}, "argument cross_attention_kwargs['a'][0] is"),
    "an array": ({"cross_attention_kwargs": {"a": np.zeros(1)}}, "argument cross_attention_kwargs['a'] is a ndarray"),
    "a generator": ({"class_labels": torch.Generator()}, "argument class_labels is a Generator"),
    "a subclass": ({"sample": nn.UninitializedBuffer()}, "argument sample is a UninitializedBuffer"),
}


@pytest.mark.parametrize("name", _NO_INPUT)
def test_arguments_that_have_no_buffer(name: str) -> None:
    changes, reason = _NO_INPUT[name]
    graphs = patch_of(fastdiff.patch(sd15_unet(), cuda_graphs=True)).graphs
    with pytest.raises(_graph_calls.NotCapturable) as found:
        _graph_calls.Call(graphs._names, (), inputs(0, **changes), "cpu")
    assert str(found.value).startswith(reason)


def test_a_number_as_timestep_runs_ordinary() -> None:
    pair = pair_of()
    for t in (300, 200, 100.0):
        same(pair, 0, timestep=t)
    assert sum(stats_of(pair[0]).ordinary.values()) == 3


def test_tensors_that_overlap_themselves() -> None:
    pair = pair_of()
    for seed in range(3):
        base = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(seed)).flatten()
        same(pair, seed, sample=base.as_strided((2, 4, 8, 8), (288, 72, 4, 1)))
    assert stats_of(pair[0]).ordinary == {FIRST: 1, "a tensor among its arguments overlaps itself": 2}


_NO_MODEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dropout": (
        lambda m: setattr(m.mid_block.resnets[0].dropout.train(), "p", 0.1),
        "mid_block.resnets.0.dropout, a Dropout, is in training mode",
    ),
    "hooks": (
        lambda m: m.mid_block.register_forward_hook(lambda *_: None),
        "mid_block has forward hooks, which have to see every call",
    ),
    "processor": (
        lambda m: m.set_attn_processor(OwnProcessor()),
        "the processor of down_blocks.0.attentions.0.transformer_blocks.0.attn1, a OwnProcessor, may do more",
    ),
    "closures": (wrap_forwards, "the forward of down_blocks.0 was replaced by actions.wrap_forwards"),
    "offload": (
        lambda m: HAZARDS["sequential offload"].apply(m), "accelerate's hook AlignDevicesHook is on the model"
    ),
    "layerwise casting": (lambda m: HAZARDS["layerwise casting"].apply(m), "Diffusers' hook layerwise_casting is on"),
    "a user's module": (lambda m: setattr(m, "conv_act", _Users()), "conv_act is a _Users of test_graph_changes"),
    "meta": (lambda m: m.to("meta"), "its weights are on meta (offloaded)"),
    "a value is read": (lambda m: setattr(m, "conv_act", _Rounding()), "a forward makes the host wait"),
    "an argument is written": (
        lambda m: setattr(m, "time_proj", nn.Sequential(_Writing(), m.time_proj)), "it writes into its arguments"
    ),
}  # fmt: skip


class _Users(nn.SiLU):
    pass


@pytest.mark.parametrize("name", _NO_MODEL)
def test_models_that_cannot_be_captured(name: str) -> None:
    change, reason = _NO_MODEL[name]
    pair = pair_of()
    for model in pair:
        change(model)
    if name == "meta":
        assert stats_of(pair[0]).unavailable.startswith(reason)
        return
    for seed in range(4):
        same(pair, seed)
    stats = stats_of(pair[0])
    assert (stats.captures, stats.replays) == (0, 0)
    assert next(r for r in stats.ordinary if r != FIRST).startswith(reason)
    assert reason in str(fastdiff.report(pair[0]))


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRecorder, "fail_at", "convolution")
    pair = pair_of()
    for seed in range(4):
        same(pair, seed)
    reason = "the capture failed: RuntimeError: CUDA error: operation not permitted when stream is capturing"
    assert stats_of(pair[0]).ordinary == {FIRST: 1, reason: 3}
    assert recorder_of(pair[0]).recordings == []
    monkeypatch.setattr(FakeRecorder, "fail_at", "")
    pair[0].conv_in.weight.data = pair[0].conv_in.weight.data.clone()  # another state is another chance
    for seed in range(4):
        same(pair, seed)
    assert stats_of(pair[0]).captures == 1


def test_an_interrupted_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of()
    same(pair, 0)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patcher:
        patcher.setattr(FakeRecorder, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outputs(pair[0], inputs(0))
    for seed in range(3):
        same(pair, seed)
    assert stats_of(pair[0]).replays == 3


def test_errors_of_a_call_are_those_of_the_forward() -> None:
    pair = captured()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="channels"):
            outputs(pair[0], inputs(0, sample=torch.randn(2, 3, 8, 8)))
    same(pair, 4)

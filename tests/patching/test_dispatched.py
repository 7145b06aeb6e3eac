"""Attention of processors that dispatch, in families without a table and where a processor is not the family's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ErnieImageTransformer2DModel, FluxTransformer2DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from models import randomized
from torch import Tensor, nn
from transformer_case import outputs
from transformer_models import TRANSFORMERS

import fastdiff
from fastdiff._attention_backend import PATCHED, attention_of, registered
from fastdiff._launches import count_launches
from fastdiff.backends import use_backend
from fastdiff.patching._site import site_of

pytestmark = pytest.mark.kernel

LAYERS = 2


class Unknown(FluxAttnProcessor):
    """One that no row knows: it doubles what it gives."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        return tuple(2 * t for t in out) if isinstance(out, tuple) else 2 * out


@pytest.fixture(autouse=True)
def _same_backend_after() -> Iterator[None]:
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def _model() -> tuple[Any, dict[str, Any]]:
    """A family without a table."""
    torch.manual_seed(0)
    model = ErnieImageTransformer2DModel(
        hidden_size=60, num_attention_heads=3, num_layers=LAYERS, ffn_hidden_size=50, in_channels=4, out_channels=4,
        text_in_dim=28, rope_axes_dim=(4, 8, 8),
    )  # fmt: skip
    return randomized(model), {
        "hidden_states": torch.randn(2, 4, 5, 3), "timestep": torch.tensor([500.0, 200.0]),
        "text_bth": torch.randn(2, 7, 28), "text_lens": torch.tensor([7, 4]),
    }  # fmt: skip


def _flux() -> tuple[Any, dict[str, Any]]:
    case = next(c for c in TRANSFORMERS if c.name == "Flux dev")
    model = case.build()
    return model, case.inputs(0, model=model)


def _processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def _attention_launches(model: nn.Module, inputs: dict[str, Any]) -> int:
    return count_launches(lambda: outputs(model, inputs))["attention"]


def _rows(model: Any) -> list[Any]:
    return [row for row in fastdiff.report(model).rows if "Attention" in row.cls]


def test_family_without_a_table() -> None:
    """Its attention runs by the kernel, with its masks, and unpatch leaves nothing behind."""
    model, inputs = _model()
    before = [dict(vars(m)) for m in (*model.modules(), *_processors(model))]
    eager, active = outputs(model, inputs), _AttentionBackendRegistry._active_backend
    fastdiff.patch(model)
    assert [p._attention_backend.value for p in _processors(model)] == ["fastdiff"] * LAYERS
    ours = outputs(model, inputs)
    assert not torch.equal(ours, eager)
    assert (ours - eager).norm() <= 1e-5 * eager.norm()
    assert _attention_launches(model, inputs) == LAYERS
    assert [(row.fused, row.backend, row.reason) for row in _rows(model)] == [(True, "cpu", "")] * LAYERS
    assert _AttentionBackendRegistry._active_backend is active
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)
    for m, state in zip((*model.modules(), *_processors(model)), before, strict=True):
        assert vars(m).keys() == state.keys()
        assert all(vars(m)[name] is value for name, value in state.items())


def test_numerics() -> None:
    """No further from fp64 than eager, pooled over ten seeds."""
    model, inputs = _model()
    exact = copy.deepcopy(model).double()
    calls = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        random = {n: torch.randn(v.shape, generator=generator) for n, v in inputs.items() if v.dim() > 1}
        calls.append(inputs | random)
    doubles = [{n: v.double() if v.is_floating_point() else v for n, v in call.items()} for call in calls]
    truth = torch.stack([outputs(exact, call) for call in doubles])
    eager = torch.stack([outputs(model, call) for call in calls])
    fastdiff.patch(model)
    ours = torch.stack([outputs(model, call) for call in calls])
    assert (ours - truth).norm() <= 1.05 * (eager - truth).norm()


@pytest.mark.parametrize("first", ["processor", "patch"])
def test_unknown_processor(first: str) -> None:
    """Its attention is the kernel's, whether it came before patching or after; the rest is stock and says so."""
    model, inputs = _flux()
    for step in ("processor", "patch") if first == "processor" else ("patch", "processor"):
        if step == "patch":
            fastdiff.patch(model)
        else:
            model.set_attn_processor({name: Unknown() for name in model.attn_processors})
    ours = outputs(model, inputs)
    count = len(_processors(model))
    assert _attention_launches(model, inputs) == count
    for row in _rows(model):
        assert (row.served_by, row.fused) == ({"attention": "cpu", "call": "eager"}, False)
        assert row.reason == "its processor is Unknown"
    fastdiff.unpatch(model)
    assert all("_attention_backend" not in vars(p) and not vars(p) for p in _processors(model))
    expected = outputs(model, inputs)
    assert _attention_launches(model, inputs) == 0
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    model.set_attn_processor(FluxAttnProcessor())
    assert (outputs(model, inputs) - expected).norm() > 1e-2 * expected.norm(), "the processor does nothing"


def test_table_is_used_again_with_the_familys_processor() -> None:
    model, inputs = _flux()
    model.set_attn_processor({name: Unknown() for name in model.attn_processors})
    fastdiff.patch(model)
    outputs(model, inputs)
    outputs(model, inputs)
    for site in (site_of(module) for module in model.modules() if hasattr(module, "processor")):
        assert site is not None
        site.served["attention 2"] = site.served["attention"]  # as of a processor that attends to two things
    model.set_attn_processor(FluxAttnProcessor())
    outputs(model, inputs)
    assert all(row.fused for row in _rows(model))
    assert not any("attention 2" in row.served_by for row in _rows(model))


def test_native_that_was_chosen() -> None:
    """By name for the model it is a choice, also where a table would fuse."""
    model, inputs = _flux()
    fastdiff.patch(model)
    model.set_attention_backend("native")
    assert _attention_launches(model, inputs) == 0
    model.reset_attention_backend()
    assert _attention_launches(model, inputs) == len(_processors(model))


def test_made_the_active_one() -> None:
    """Who saves a processor's backend and restores it as the process's own finds the default."""
    model, inputs = _model()
    expected = outputs(model, inputs)
    fastdiff.patch(model)
    _AttentionBackendRegistry.set_active_backend(_processors(model)[0]._attention_backend)
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("first", ["user", "patch"])
@pytest.mark.parametrize("how", ["model", "processor", "context"])
def test_backend_of_the_user_wins(first: str, how: str) -> None:
    """Set before patching or after, for the model or its processors; and it is there after unpatch."""
    model, inputs = _model()
    other = AttentionBackendName("_native_math")

    def choose() -> None:
        if how == "model":
            model.set_attention_backend("_native_math")
        elif how == "processor":
            for processor in _processors(model):
                processor._attention_backend = other
        else:
            _AttentionBackendRegistry.set_active_backend(other)  # as within attention_backend("_native_math")

    for step in (choose, lambda: fastdiff.patch(model)) if first == "user" else (lambda: fastdiff.patch(model), choose):
        step()
    ours = outputs(model, inputs)
    assert _attention_launches(model, inputs) == 0
    assert [row.reason for row in _rows(model)] == ["the attention backend is _native_math"] * LAYERS
    fastdiff.unpatch(model)
    expected = None if how == "context" else other
    assert all(processor._attention_backend is expected for processor in _processors(model))
    assert torch.equal(outputs(model, inputs), ours)


def test_context_ends() -> None:
    """After ``with attention_backend``, the kernels are back."""
    model, inputs = _model()
    fastdiff.patch(model)
    with attention_backend("_native_math"):
        assert _attention_launches(model, inputs) == 0
    assert _attention_launches(model, inputs) == LAYERS
    with attention_backend("fastdiff"):
        assert _attention_launches(model, inputs) == LAYERS
    assert all(row.fused for row in _rows(model))


def test_reset_and_choice_of_fastdiff() -> None:
    """``reset_attention_backend`` means the default, which patched is the kernel; ``None`` that was there stays."""
    model, inputs = _model()
    model.reset_attention_backend()
    fastdiff.patch(model)
    model.reset_attention_backend()
    assert _attention_launches(model, inputs) == LAYERS
    fastdiff.unpatch(model)
    assert [vars(p) for p in _processors(model)] == [{"_attention_backend": None}] * LAYERS
    fastdiff.patch(model)
    model.set_attention_backend("fastdiff")
    assert _attention_launches(model, inputs) == LAYERS
    assert all(row.fused for row in _rows(model))
    fastdiff.unpatch(model)
    assert _attention_launches(model, inputs) == LAYERS
    assert all(p._attention_backend is AttentionBackendName("fastdiff") for p in _processors(model))


def test_shared_processors() -> None:
    """Another model with the same processors, patched or not, is what it would be with its own."""
    model, inputs = _model()
    other = copy.deepcopy(model)
    for module, like in zip(other.modules(), model.modules(), strict=True):
        if hasattr(module, "processor"):
            module.processor = like.processor
    eager = outputs(other, inputs)
    fastdiff.patch(model)
    assert all("_attention_backend" in vars(p) for p in _processors(other))
    assert torch.equal(outputs(other, inputs), eager)
    assert _attention_launches(other, inputs) == 0
    fastdiff.patch(other)
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)
    assert _attention_launches(other, inputs) == LAYERS
    fastdiff.unpatch(other)
    assert torch.equal(outputs(other, inputs), eager)
    assert not any(vars(p) for p in _processors(other))


def test_processors_that_were_taken_out() -> None:
    """They are restored too, and do not live on for that."""
    model, inputs = _model()
    first = _processors(model)
    fastdiff.patch(model)
    attentions = [module for module in model.modules() if hasattr(module, "processor")]
    for module in attentions:
        module.processor = type(module.processor)()
    assert _attention_launches(model, inputs) == LAYERS
    fastdiff.unpatch(model)
    assert not any(vars(p) for p in (*first, *_processors(model)))


def test_copies(tmp_path: Any) -> None:
    """deepcopy, pickle, ``save_pretrained``; a pickled processor brings fastdiff with it."""
    model, inputs = _model()
    eager = outputs(model, inputs)
    ours = outputs(fastdiff.patch(model), inputs)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(clone, inputs), ours)
        fastdiff.unpatch(clone)
        assert torch.equal(outputs(clone, inputs), eager)
        assert not any(vars(p) for p in _processors(clone))
    assert torch.equal(outputs(model, inputs), ours)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), inputs), eager)
    kept = pickle.dumps(_processors(model)[0])
    assert b"fastdiff._attention_backend" in kept  # which registers the backend that is unpickled then
    assert pickle.loads(kept)._attention_backend is _processors(model)[0]._attention_backend


def test_eager_is_eager() -> None:
    """Where eager is asked for, the report says so and no kernel runs; autocast and modes run what is stock."""
    model, inputs = _model()
    eager = outputs(model, inputs)
    fastdiff.patch(model)
    with use_backend("eager"):
        outputs(model, inputs)
    assert [(row.backend, row.reason) for row in _rows(model)] == [
        ("eager", "attention: use_backend('eager') is in effect")
    ] * LAYERS
    fastdiff.patch(model, backend="eager")
    outputs(model, inputs)
    assert {row.backend for row in _rows(model)} == {"eager"}
    fastdiff.patch(model, skip="layers.1.*")
    assert _attention_launches(model, inputs) == 1
    fastdiff.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert _attention_launches(model, inputs) == 0
    assert {row.reason for row in _rows(model)} == {"autocast is on"}
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)


def test_compiles() -> None:
    """Without a break, with the kernel in the graph."""
    model, inputs = _model()
    fastdiff.patch(model)
    expected, seen = outputs(model, inputs), set()

    def watch(graph: torch.fx.GraphModule, example: Any) -> torch.fx.GraphModule:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    block = torch.compile(model.layers[0].self_attention, fullgraph=True, backend=watch)
    x = torch.randn(2, 9, 60)
    with torch.no_grad():
        assert (block(x) - model.layers[0].self_attention(x)).norm() <= 1e-5 * x.norm()
    assert any(name.startswith("fastdiff.attention") for name in seen), seen
    assert torch.equal(outputs(model, inputs), expected)


def test_context_parallelism_is_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the active backend's, as if there were no other; one that cannot is refused."""
    model, inputs = _model()
    fastdiff.patch(model)
    native, configs = AttentionBackendName.NATIVE, []

    def watch(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Any = None, **others: Any) -> Tensor:
        configs.append(_parallel_config)
        return query

    monkeypatch.setitem(_AttentionBackendRegistry._backends, native, watch)
    config = SimpleNamespace()
    for processor in _processors(model):
        assert _AttentionBackendRegistry._is_context_parallel_available(processor._attention_backend)
        processor._parallel_config = config
    assert _attention_launches(model, inputs) == 0
    assert configs == [config] * LAYERS
    assert {row.reason for row in _rows(model)} == {"context parallelism is on"}
    fastdiff.patch(model)  # sets the backend again
    with attention_backend("_native_math"), pytest.raises(ValueError, match="'_native_math' does not support context"):
        model.layers[0].self_attention.processor(model.layers[0].self_attention, torch.randn(2, 9, 60))


def test_nobody_can_choose_it() -> None:
    """It is no backend of the user's: not listed, and refused by Diffusers' setters."""
    assert "FASTDIFF_PATCHED" not in AttentionBackendName.__members__
    with pytest.raises(ValueError, match="must be one of"):
        FluxTransformer2DModel.set_attention_backend(nn.Module(), "fastdiff_patched")


def test_gradients_and_verify() -> None:
    """Of all weights, eager's; and ``verify`` compares the attention with the stock processor's."""
    model, inputs = _model()

    def gradients() -> list[Tensor]:
        model.requires_grad_(True)
        out = model(**inputs, return_dict=False)[0]
        return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))

    expected = gradients()
    fastdiff.patch(model)
    for ours, eager in zip(gradients(), expected, strict=True):
        assert (ours - eager).norm() <= 1e-4 * eager.norm()
    model.requires_grad_(False)
    found = fastdiff.verify(model, **inputs)
    assert found.ok
    assert len(found.sites) == LAYERS


@pytest.mark.parametrize("shape", [(1, 7, 3, 8), (2, 7, 1, 8)], ids=["over the batch", "over heads"])
def test_keys_that_broadcast(shape: tuple[int, ...]) -> None:
    """A processor may count on it: torch's attention does it, the op does not."""
    model, _ = _model()
    fastdiff.patch(model)
    site = next(site_of(module) for module in model.modules() if hasattr(module, "processor"))
    query, key = torch.randn(2, 5, 3, 8), torch.randn(shape)
    with attention_of(site):
        ours = dispatch_attention_fn(query, key, key, backend=registered(PATCHED))
    assert torch.equal(ours, dispatch_attention_fn(query, key, key))

"""What Diffusers and its users do to a transformer, on every family: one table of changes, each made before and after
patching, compared with the same change to a stock model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from transformer_case import Transformer, outputs, tensors, to_dtype
from transformer_models import OWN_BLOCKS, TRANSFORMERS

import fastdiff
from fastdiff.patching._site import site_of

pytestmark = pytest.mark.kernel

BY_NAME = pytest.mark.parametrize("case", OWN_BLOCKS, ids=lambda c: c.name)
#: One model for each shape of block, where a family's own details do not matter.
SHAPES = [c for c in TRANSFORMERS if c.name in ("Flux dev", "Wan T2V", "Qwen-Image", "Z-Image", "PixArt", "SD3")]
TRACED = [c for c in SHAPES if c.name in ("Flux dev", "Wan T2V", "SD3")]


def _block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers in blocks of which there are several."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in linears if any(part.isdigit() for part in name.split("."))]


def _lora(model: nn.Module) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=_block_linears(model))
    peft.inject_adapter_in_model(config, model)


def _group_offload(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _casting(model: nn.Module) -> None:
    keep = ("norm", "embed", "time", "proj_in", "proj_out", "final", "rope", "caption", "guidance")
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=keep)


class Quantized(nn.Module):
    """A linear layer whose weight is no matrix to compute with."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8).flatten(), requires_grad=False)
        self.bias, self.shape = linear.bias, linear.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view(self.shape) * self.scale, self.bias)


def _quantized(model: nn.Module) -> None:
    for name in _block_linears(model):
        model.set_submodule(name, Quantized(model.get_submodule(name)))


class _Caching(ModelHook):
    """Runs the block by way of a forward of its own, as Diffusers' caches do."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


def _hooks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                HookRegistry.check_if_exists_or_initialize(block).register_hook(_Caching(), "caching")


def _sequential_offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "LoRA": _lora,
    "group offload": _group_offload,
    "layerwise casting": _casting,
    "quantized": _quantized,
    "hooks": _hooks,
}


@pytest.mark.parametrize(
    ("case", "first", "change"),
    [(c, "change", change) for c in TRANSFORMERS for change in CHANGES if c in OWN_BLOCKS or change == "LoRA"]
    + [(c, "patch", change) for c in TRANSFORMERS for change in CHANGES if c in SHAPES or change == "LoRA"],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_changed(case: Transformer, first: str, change: str) -> None:
    """The same result as a stock model changed alike, by the same kernels."""
    apply, stock = CHANGES[change], case.build()
    inputs = case.inputs(0, model=stock)
    model = copy.deepcopy(stock)
    base = outputs(stock, inputs)
    try:
        apply(stock)
    except AttributeError:
        if change != "group offload" or torch.accelerator.current_accelerator() is not None:
            raise
        pytest.skip("group offload of this Diffusers needs an accelerator")
    expected = outputs(stock, inputs)
    if change in ("LoRA", "quantized"):
        assert (expected - base).norm() > 1e-3 * base.norm(), "the change does nothing"
    for step in (apply, fastdiff.patch) if first == "change" else (fastdiff.patch, apply):
        step(model)
    ours = outputs(model, inputs)
    tolerance = 2e-2 if change == "layerwise casting" else 1e-4
    assert (ours - expected).norm() <= tolerance * expected.norm()
    for row in fastdiff.report(model).rows:
        # Offloading puts hooks on every leaf, norms among them, which then run themselves.
        assert row.fused or row.backend == "stock" or (change == "group offload" and "hooks" in row.reason), row
    fastdiff.unpatch(model)
    assert not any(site_of(m) for m in model.modules())


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_sequential_offload(case: Transformer) -> None:
    """Weights on meta outside of their own layer's call, and back again."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    eager = outputs(model, inputs)
    _sequential_offload(model)
    fastdiff.patch(model)
    assert (outputs(model, inputs) - eager).norm() <= 1e-4 * eager.norm()
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)


@BY_NAME
def test_copies(case: Transformer) -> None:
    """deepcopy and pickle carry the replacements."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    fastdiff.patch(model)
    ours = outputs(model, inputs)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(clone, inputs), ours)
        assert all(row.fused or row.backend == "stock" for row in fastdiff.report(clone).rows)


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_autocast_runs_stock(case: Transformer) -> None:
    model = case.build()
    inputs = case.inputs(0, model=model)
    with torch.autocast("cpu", torch.bfloat16):
        eager = outputs(model, inputs)
        fastdiff.patch(model)
        assert torch.equal(outputs(model, inputs), eager)
    assert all(not row.fused for row in fastdiff.report(model).rows)


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_gradients(case: Transformer) -> None:
    """Of all weights, eager's, and no further from fp64's."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    seed = torch.randn(outputs(model, inputs).shape, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    exact = copy.deepcopy(model).double()

    def gradients(m: nn.Module, arguments: dict[str, Any], direction: Tensor) -> list[Tensor]:
        result = torch.cat([t.flatten() for t in tensors(m(**arguments, return_dict=False))])
        found = torch.autograd.grad((result * direction).sum(), list(m.parameters()), allow_unused=True)
        return [g for g in found if g is not None]

    truth = gradients(exact, to_dtype(inputs, torch.float64), seed.double())
    expected = gradients(model, inputs, seed)
    fastdiff.patch(model)
    ours = gradients(model, inputs, seed)
    assert len(ours) == len(expected) > 20
    for got, want, true in zip(ours, expected, truth, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 4 * (want - true).norm()


@pytest.mark.parametrize("case", TRACED, ids=lambda c: c.name)
def test_traces_without_breaks(case: Transformer) -> None:
    """One graph for the whole model, with the kernels in it."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    fastdiff.patch(model)
    expected = outputs(model, inputs)
    seen: set[str] = set()

    def watch(graph: torch.fx.GraphModule, example: Any) -> torch.fx.GraphModule:
        targets = [str(node.target) for node in graph.graph.nodes]
        seen.update(t.split(".")[1] for t in targets if t.startswith("fastdiff."))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=watch)
    assert (outputs(compiled, inputs) - expected).norm() <= 1e-4 * expected.norm()
    assert {"attention", "adaln_modulate"} <= seen


def test_compile_repeated_blocks() -> None:
    case = TRANSFORMERS[0]
    model = fastdiff.patch(case.build())
    inputs = case.inputs(0, model=model)
    expected = outputs(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert (outputs(model, inputs) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["Flux dev", "Wan T2V"])
def test_other_attention_backend(name: str) -> None:
    """A backend that somebody chose serves the attention, fused or not the rest."""
    case = next(c for c in TRANSFORMERS if c.name == name)
    model = case.build()
    inputs = case.inputs(0, model=model)
    eager = outputs(model, inputs)
    fastdiff.patch(model)
    with attention_backend("_native_math"):
        assert (outputs(model, inputs) - eager).norm() <= 1e-4 * eager.norm()
    attentions = [site for module in model.modules() if (site := site_of(module)) and "rotation" in site.what]
    assert attentions
    assert all(site.served.keys() == {"norm and rotation"} for site in attentions)

"""What Diffusers and its users do to a model: adapters, hooks, offloading, compilation, autocast, processors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from models import CASES, Case, output, run_sd, sd15_unet, sd_pipeline, vae
from peft import LoraConfig
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
ORDER = pytest.mark.parametrize("first", ["hook", "patch"])


def _inputs(case: Case = CASES[0]) -> dict[str, Any]:
    return case.inputs(torch.Generator().manual_seed(0), torch.float32)


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _in_order(first: str, model: nn.Module, hook: Callable[[], Any]) -> Any:
    if first == "hook":
        found = hook()
        fastdiff.patch(model)
        return found
    fastdiff.patch(model)
    return hook()


# LoRA


def _add_lora(model: Any) -> None:
    config = LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1",
                        "conv2", "time_emb_proj", "conv_shortcut"],
    )  # fmt: skip
    torch.manual_seed(1)
    model.add_adapter(config)


@ORDER
@pytest.mark.parametrize("index", [0, 1], ids=["SD1.5", "SDXL"])
def test_lora(first: str, index: int) -> None:
    """Adapters with non-zero B on linears and convolutions: loaded, scaled, fused, unfused, deleted."""
    case = CASES[index]
    model, inputs = case.build(), _inputs(case)
    base = output(model, inputs)
    stock = copy.deepcopy(model)
    _add_lora(stock)
    _in_order(first, model, lambda: _add_lora(model))
    expected = output(stock, inputs)
    assert (expected - base).abs().max() > 0.1
    _close(output(model, inputs), expected)
    assert fastdiff.report(model).coverage == 1.0

    for m in (stock, model):
        m.set_adapters(["default"], weights=[0.5])
    half = output(stock, inputs)
    assert (half - expected).abs().max() > 0.01
    _close(output(model, inputs), half)
    for m in (stock, model):
        m.set_adapters(["default"], weights=[1.0])
        m.fuse_lora()
    _close(output(model, inputs), expected)
    model.unfuse_lora()
    _close(output(model, inputs), expected)
    model.disable_adapters()
    _close(output(model, inputs), base)
    model.enable_adapters()
    model.delete_adapters(["default"])
    _close(output(model, inputs), base)
    assert fastdiff.report(model).coverage == 1.0
    fastdiff.unpatch(model)
    assert not any(site_of(m) or "forward" in vars(m) for m in model.modules())


# hooks


class _Double(ModelHook):
    calls = 0

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.calls += 1
        return 2 * output


class _Replacing(_Double):
    """A hook with a forward of its own, as Diffusers' caches have."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.fn_ref.original_forward(*args, **kwargs)


@ORDER
@pytest.mark.parametrize("hook_class", [_Double, _Replacing])
def test_diffusers_hook(first: str, hook_class: type[_Double]) -> None:
    """A hook on a site sees its calls whichever came first, and what it calls is the replacement."""
    model, inputs = sd15_unet(), _inputs()
    block = model.mid_block.resnets[1]
    eager = output(model, inputs)
    hook = hook_class()

    def register() -> None:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "double")

    reference = copy.deepcopy(model)
    HookRegistry.check_if_exists_or_initialize(reference.mid_block.resnets[1]).register_hook(hook_class(), "double")
    expected = output(reference, inputs)
    assert (expected - eager).abs().max() > 0.1

    _in_order(first, model, register)
    _close(output(model, inputs), expected)
    assert hook.calls == 1
    assert fastdiff.report(model).coverage == 1.0
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), expected)
    assert hook.calls == 2
    block._diffusers_hook.remove_hook("double")
    assert block.forward.__func__ is type(block).forward
    assert torch.equal(output(model, inputs), eager)


@ORDER
def test_hook_removed_while_patched(first: str) -> None:
    model, inputs = sd15_unet(), _inputs()
    block = model.mid_block.resnets[1]
    eager = output(model, inputs)
    _in_order(first, model, lambda: accelerate.hooks.add_hook_to_module(block, accelerate.hooks.ModelHook()))
    output(model, inputs)
    accelerate.hooks.remove_hook_from_module(block)
    output(model, inputs)
    assert fastdiff.report(model).coverage == 1.0
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)
    assert block.forward.__func__ is type(block).forward
    assert site_of(block) is None


@BY_NAME
@ORDER
def test_model_offload(case: Case, first: str) -> None:
    """accelerate's hook on the model, as enable_model_cpu_offload sets it: kernels run, the hook too."""
    model, inputs = case.build(), _inputs(case)
    eager = output(model, inputs)
    _, hook = _in_order(first, model, lambda: accelerate.cpu_offload_with_hook(model, execution_device="cpu"))
    _close(output(model, inputs), eager)
    assert fastdiff.report(model).coverage == 1.0
    hook.remove()
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)
    assert "_old_forward" not in vars(model)
    assert patch_of(model) is None


@BY_NAME
@ORDER
def test_sequential_offload(case: Case, first: str) -> None:
    """Every leaf's weights are on meta except within its own call: what needs a norm's weights runs stock."""
    model, inputs = case.build(), _inputs(case)
    eager = output(model, inputs)
    _in_order(first, model, lambda: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True))
    assert next(model.parameters()).device.type == "meta"
    _close(output(model, inputs), eager)
    report = fastdiff.report(model)
    for row in report.rows:
        if row.cls == "ResnetBlock2D":
            assert (row.backend, row.reason) == ("eager", "a norm has hooks"), row
        if row.path.endswith("conv_norm_out"):
            assert (row.backend, row.reason) == ("eager", "the norm or the activation has hooks"), row
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(output(model, inputs), eager)


@ORDER
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload(first: str, level: str) -> None:
    model, inputs = sd15_unet(), _inputs()
    eager = output(model, inputs)
    cpu = torch.device("cpu")
    arguments: dict[str, Any] = {"onload_device": cpu, "offload_device": cpu, "offload_type": level}
    if level == "block_level":
        arguments["num_blocks_per_group"] = 1
    try:
        apply_group_offloading(copy.deepcopy(model), **arguments)
    except AttributeError:
        if torch.accelerator.current_accelerator() is not None:
            raise
        pytest.skip("group offload of this Diffusers needs an accelerator")
    _in_order(first, model, lambda: apply_group_offloading(model, **arguments))
    _close(output(model, inputs), eager)
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)


@ORDER
def test_layerwise_casting(first: str) -> None:
    """Linear and convolution weights stored in another dtype, and cast by hooks at their own calls."""
    stock, model, inputs = sd15_unet(), sd15_unet(), _inputs()

    def cast(m: nn.Module) -> None:
        apply_layerwise_casting(m, torch.bfloat16, torch.float32, skip_modules_pattern=("norm",))

    cast(stock)
    _in_order(first, model, lambda: cast(model))
    _close(output(model, inputs), output(stock, inputs))
    assert model.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    assert fastdiff.report(model).coverage == 1.0


def test_users_hooks_on_norms_see_stock_outputs() -> None:
    model, inputs = sd15_unet(), _inputs()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, result: seen.__setitem__(name, result.clone())

    handles = [
        model.conv_norm_out.register_forward_hook(keep("conv_norm_out")),
        model.mid_block.resnets[0].norm2.register_forward_hook(keep("norm2")),
    ]
    eager = output(model, inputs)
    stock = dict(seen)
    seen.clear()
    fastdiff.patch(model)
    _close(output(model, inputs), eager)
    assert seen.keys() == stock.keys() == {"conv_norm_out", "norm2"}
    for name, value in stock.items():
        _close(seen[name], value)
    rows = {row.path: row for row in fastdiff.report(model).rows}
    assert rows["conv_norm_out"].backend == rows["mid_block.resnets.0"].backend == "eager"
    assert rows["mid_block.resnets.0"].reason == "a norm has hooks"
    for handle in handles:
        handle.remove()
    output(model, inputs)
    assert fastdiff.report(model).coverage == 1.0


def test_hook_on_a_convolution_keeps_its_output() -> None:
    """The residual is not added into a tensor that a hook may hold."""
    model, inputs = sd15_unet(), _inputs()
    fastdiff.patch(model)
    conv = model.mid_block.resnets[0].conv2
    held: list[Tensor] = []
    conv.register_forward_hook(lambda module, args, result: held.extend([result, result.clone()]))
    output(model, inputs)
    assert torch.equal(held[0], held[1])


# processors and switches


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=lambda p: type(p).__name__)
def test_other_processors_run(processor: Any) -> None:
    model, inputs = fastdiff.patch(sd15_unet()), _inputs()
    model.set_attn_processor(processor)
    output(model, inputs)
    rows = [row for row in fastdiff.report(model).rows if row.cls == "Attention"]
    assert {row.reason for row in rows} == {f"its processor is {type(processor).__name__}"}
    model.set_attn_processor(AttnProcessor2_0())
    output(model, inputs)
    assert fastdiff.report(model).coverage == 1.0


def test_processors_are_not_touched() -> None:
    model = sd15_unet()
    before = model.attn_processors
    fastdiff.patch(model)
    assert all(model.attn_processors[name] is p for name, p in before.items())
    model.set_default_attn_processor()  # raises for classes it does not know


def test_fused_projections() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    eager = sd_pipeline()
    for p in (pipe, eager):
        p.fuse_qkv_projections()
    _close(run_sd(pipe), run_sd(eager))
    pipe.unfuse_qkv_projections()
    run_sd(pipe)
    assert all(row.fused for row in fastdiff.report(pipe).rows if row.path.startswith("unet"))


@pytest.mark.parametrize("kind", ["bias", "per query", "encoder"])
def test_attention_masks(kind: str) -> None:
    model, inputs = sd15_unet(), _inputs()
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn2
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, 16, 48, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    if kind == "encoder":
        inputs["encoder_attention_mask"] = torch.arange(77).expand(2, 77) < torch.tensor([[5], [60]])
        call = lambda: output(model, inputs)  # noqa: E731
    else:
        rows = 1 if kind == "bias" else 16
        mask = torch.randn(2, rows, 77, generator=generator) * 4
        call = lambda: attn(tokens, text, attention_mask=mask)  # noqa: E731
    with torch.no_grad():
        eager = call()
        fastdiff.patch(model)
        _close(call(), eager)
        assert site_of(attn).served["attention"].backend == "cpu"


def test_chunked_feed_forward_runs_stock() -> None:
    case = CASES[-1]
    model, inputs = fastdiff.patch(case.build()), _inputs(case)
    fused = output(model, inputs)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    _close(output(model, inputs), fused)
    rows = [row for row in fastdiff.report(model).rows if row.cls == "BasicTransformerBlock"]
    assert {row.reason for row in rows} == {"its feed-forward runs in chunks"}


def test_vae_tiling_and_slicing() -> None:
    model = vae()
    z = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    for enable in (model.enable_slicing, model.enable_tiling):
        enable()
        with torch.no_grad():
            eager = model.decode(z, return_dict=False)[0]
            with fastdiff.patched(model):
                _close(model.decode(z, return_dict=False)[0], eager)
                assert all(r.fused for r in fastdiff.report(model).rows if r.path.startswith("decoder"))


# modes of torch


def test_autocast_runs_stock() -> None:
    model, inputs = sd15_unet(), _inputs()
    with torch.autocast("cpu", torch.bfloat16):
        eager = output(model, inputs)
        fastdiff.patch(model)
        assert torch.equal(output(model, inputs), eager)
    for row in fastdiff.report(model).rows:
        assert not row.fused
        assert "autocast is on" in row.reason
    output(model, inputs)
    assert fastdiff.report(model).coverage == 1.0


class _MidBlock(nn.Module):
    """The middle of a U-Net: every kind of site that a U-Net has inside of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = sd15_unet(use_linear_projection=True)

    def forward(self, sample: Tensor, temb: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.unet.mid_block(sample, temb, encoder_hidden_states=text),)


class _OneBlockDiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dit = CASES[-1].build()
        del self.dit.transformer_blocks[1:]

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        return self.dit(**inputs)


def _mid_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"sample": (2, 48, 4, 4), "temb": (2, 96), "text": (2, 77, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("build", "inputs", "ops"),
    [
        (_MidBlock, _mid_inputs(), {"group_norm_silu", "attention", "geglu"}),
        (_OneBlockDiT, _inputs(CASES[-1]),
         {"adaln_modulate", "gate_residual_adaln", "gate_residual", "gelu_tanh", "attention"}),
    ],
    ids=["U-Net", "DiT"],
)  # fmt: skip
def test_compile_fullgraph(build: Callable[[], nn.Module], inputs: dict[str, Any], ops: set[str]) -> None:
    """The real inductor, no graph break, and the kernels are in the graph."""
    model = build()
    (inner,) = model.children()
    fastdiff.patch(inner)
    expected = output(model, inputs)
    seen, compiled = _compiled(model, "inductor")
    _close(output(compiled, inputs), expected)
    assert seen == ops
    fastdiff.unpatch(inner)
    assert not torch.equal(output(model, inputs), expected)
    assert patch_of(inner) is None


def test_compiled_model_is_unwrapped() -> None:
    model = sd15_unet()
    compiled = torch.compile(model)
    assert fastdiff.patch(compiled) is compiled
    assert patch_of(model) is not None
    fastdiff.unpatch(compiled)
    assert patch_of(model) is None


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 4, 5)], ids=lambda c: c.name)
def test_trace_fullgraph(case: Case) -> None:
    """A family's whole model is one graph."""
    model, inputs = case.build(), _inputs(case)
    eager = output(model, inputs)
    fastdiff.patch(model)
    seen, compiled = _compiled(model, "eager")
    _close(output(compiled, inputs), eager)
    assert len(seen) >= 2


def _compiled(model: nn.Module, backend: str) -> tuple[set[str], Any]:
    """The compiled model, and the names of the fused ops in its graph once it ran."""
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    seen: set[str] = set()

    def watching(graph: torch.fx.GraphModule, example: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        seen.update(t.split(".")[1] for t in targets if t.startswith("fastdiff."))
        return lookup_backend(backend)(graph, example)

    return seen, torch.compile(model, fullgraph=True, backend=watching)

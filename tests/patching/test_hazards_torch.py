"""Modes of torch: autocast, torch.compile, training, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from actions import OwnProcessor, skip_scores
from extent import REPEATED
from models import CASES, Case, dit, inputs_of, output, sd15_unet
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_runs_stock() -> None:
    model, inputs = sd15_unet(), inputs_of()
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


ONCE = pytest.mark.skipif(
    REPEATED, reason="what inductor makes of a graph was tested with the newest Diffusers (FASTDIFF_TEST_ALL=1 runs it)"
)


@ONCE
@pytest.mark.parametrize(
    ("build", "inputs", "ops"),
    [
        (_MidBlock, _mid_inputs(),
         {"group_norm_silu", "attention", "geglu", "adaln_modulate", "gate_residual_adaln"}),
        (_OneBlockDiT, inputs_of(CASES[-1]),
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
    model, inputs = case.build(), inputs_of(case)
    eager = output(model, inputs)
    fastdiff.patch(model)
    seen, compiled = _compiled(model, "eager")
    _close(output(compiled, inputs), eager)
    assert len(seen) >= 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: skip_scores(m, "mid_block.attentions.0.transformer_blocks"),
        lambda m: m.set_attn_processor(OwnProcessor()),
        lambda m: m.mid_block.resnets[0].norm1.register_forward_hook(lambda module, args, result: 2 * result),
    ],
    ids=["attention scores skipped", "processors", "hook on a norm"],
)
def test_places_that_run_stock_compile_too(change: Callable[[Any], Any]) -> None:
    """Without a graph break, and with the stock code's result."""
    model, inputs = sd15_unet(), inputs_of()
    plain = output(model, inputs)
    change(model)
    expected = output(model, inputs)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    fastdiff.patch(model)
    _, compiled = _compiled(model, "eager")
    _close(output(compiled, inputs), expected)


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


def _graphs(patched: bool, mode: str) -> list[int]:
    """How many graphs are compiled after each of four calls, blocks by themselves or the model as a whole."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    cross = ("DownBlock2D", "CrossAttnDownBlock2D")
    model = sd15_unet(down_block_types=cross) if mode == "blocks" else _OneBlockDiT().dit
    if patched:
        fastdiff.patch(model)
    counts = []
    if mode == "blocks":
        blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        for width in (8, 16, 24, 32):
            generator = torch.Generator().manual_seed(0)
            inputs = {
                "hidden_states": torch.randn(2, width, 48, generator=generator),
                "encoder_hidden_states": torch.randn(2, 77, 32, generator=generator),
            }
            for block in blocks:
                if block.norm1.normalized_shape == (48,):
                    with torch.no_grad():
                        block(**inputs)
            counts.append(counter.frame_count)
        return counts
    model.compile(backend=counter, fullgraph=True)
    for batch in (2, 3, 4, 5):
        inputs = {k: torch.cat([v] * 3)[:batch] for k, v in inputs_of(CASES[-1]).items()}
        output(model, inputs)
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_compiles_as_seldom_as_stock(mode: str) -> None:
    """Equal blocks share a graph, and new sizes compile no more than without fastdiff."""
    stock, patched = _graphs(False, mode), _graphs(True, mode)
    assert patched == stock
    assert patched[-1] == patched[-2] < 6


@ONCE
def test_reduce_overhead() -> None:
    """CUDA graphs where there is CUDA; elsewhere it has to work all the same."""
    model, inputs = _OneBlockDiT(), inputs_of(CASES[-1])
    fastdiff.patch(model.dit)
    expected = output(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        with torch.profiler.profile() as profiled:
            _close(output(compiled, inputs), expected)
    assert {"fastdiff::adaln_modulate", "fastdiff::gate_residual"} <= {event.key for event in profiled.key_averages()}


def test_gradient_checkpointing() -> None:
    """The gradients of eager, with the blocks run twice."""
    grads, calls = [], []
    for patched in (False, True):
        model = sd15_unet().requires_grad_(True).train()
        model.enable_gradient_checkpointing()
        model.mid_block.resnets[1].conv1.register_forward_hook(lambda module, args, result: calls.append(module))
        if patched:
            fastdiff.patch(model)
        model(**inputs_of()).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        assert len(calls) == 2 * len(grads)
    assert all("a gradient is needed" in row.reason for row in fastdiff.report(model).rows)
    for ours, eager in zip(grads[1], grads[0], strict=True):
        assert (ours - eager).norm() <= 1e-4 * eager.norm() + 1e-7


def test_threads() -> None:
    """Several threads in one patched model, another in a second one, and one that asks for reports."""
    model, other = fastdiff.patch(sd15_unet()), fastdiff.patch(dit())
    calls = [CASES[0].inputs(torch.Generator().manual_seed(i), torch.float32) for i in range(3)]
    expected = [output(model, inputs) for inputs in calls]
    others = output(other, inputs_of(CASES[-1]))

    def run(i: int) -> bool:
        if i == 3:
            return all(torch.equal(output(other, inputs_of(CASES[-1])), others) for _ in range(8))
        if i == 4:
            return all(len(fastdiff.report(model).rows) > 20 for _ in range(30))
        return all(torch.equal(output(model, calls[i]), expected[i]) for _ in range(8))

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(run, range(5)))
    assert fastdiff.report(model).coverage == fastdiff.report(other).coverage == 1.0

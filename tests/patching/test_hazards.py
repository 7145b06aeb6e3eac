"""What Diffusers and its users do to a model: the table in ``hazards.py``, and what does not fit into it."""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from hazards import HAZARDS, Hazard
from models import CASES, inputs_of, is_fused, output, run_sd, sd15_unet, sd_pipeline, vae
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of


def _close(a: Tensor, b: Tensor) -> None:
    assert (a - b).norm() <= 1e-4 * b.norm(), ((a - b).norm() / b.norm()).item()


def _is_stock(model: nn.Module, wrapped: bool = False) -> bool:
    """Whether nothing of fastdiff is left; unless ``wrapped``, every forward is the stock one."""
    for module in model.modules():
        if site_of(module) is not None:
            return False
        # What a wrapper puts back may be a replacement, which without a site does what the stock method does.
        if not wrapped and not hasattr(module.forward, "func") and module.forward.__func__ is not type(module).forward:
            return False
    return patch_of(model) is None


@functools.cache
def _built(build: Callable[[], Any]) -> Any:
    return build()


def _model(hazard: Hazard) -> Any:
    return copy.deepcopy(_built(hazard.case.build))


@functools.cache
def _stock(name: str) -> list[Tensor]:
    """The outputs of a stock model: before, twice during and, where there is a way back, after."""
    hazard = HAZARDS[name]
    model = _model(hazard)
    outputs = [hazard.run(model)]
    hazard.apply(model)
    outputs += [hazard.run(model), hazard.run(model)]
    if hazard.undo is not None:
        hazard.undo(model)
        outputs.append(hazard.run(model))
    return outputs


_ORDERS = [
    (first, last, name)
    for first in ("hazard", "patch")
    for last in ("unpatch", "undo")
    for name, hazard in HAZARDS.items()
    if hazard.undo is not None or last == "unpatch"
]


@pytest.mark.parametrize(("first", "last", "name"), _ORDERS)
def test_there_and_back(first: str, last: str, name: str) -> None:
    """In either order: the stock model's outputs and the stated report; and back, in either order."""
    hazard = HAZARDS[name]
    model = _model(hazard)
    base, expected, again, *back = _stock(name)
    if hazard.changes:
        assert (expected - base).norm() > 1e-3 * base.norm()
    else:
        _close(expected, base)

    if first == "hazard":
        hazard.apply(model)
        fastdiff.patch(model)
    else:
        fastdiff.patch(model)
        hazard.apply(model)
    _close(hazard.run(model), expected)
    rows = [row for row in fastdiff.report(model).rows if row.kernel]
    assert {row.cls for row in rows} >= hazard.eager.keys()
    for row in rows:
        assert row.fused == (row.cls not in hazard.eager), row
        assert row.fused or re.search(hazard.eager[row.cls], row.reason), row

    if last == "unpatch":
        fastdiff.unpatch(model)
        output = hazard.run(model)
        _close(output, again)
        assert torch.equal(output, again) or not hazard.exact
        assert _is_stock(model, wrapped=True)
        if hazard.undo is None:
            return
        hazard.undo(model)
    else:
        assert hazard.undo is not None
        hazard.undo(model)
        _close(hazard.run(model), base)
        if first == "hazard" and hazard.stays:
            stay = {row.cls for row in fastdiff.report(model).rows if row.kernel and not row.fused}
            assert stay == set(hazard.stays)
            fastdiff.patch(model)
            hazard.run(model)
        assert fastdiff.report(model).coverage == 1.0
        fastdiff.unpatch(model)
    assert _is_stock(model)
    assert torch.equal(hazard.run(model), back[0])
    fastdiff.patch(model)
    hazard.run(model)
    assert fastdiff.report(model).coverage == 1.0


def test_a_hook_sees_every_call_once() -> None:
    """Whichever came first; and it survives unpatch."""
    for first in ("hook", "patch"):
        model = sd15_unet()
        if first == "patch":
            fastdiff.patch(model)
        HAZARDS["Diffusers hook"].apply(model)
        fastdiff.patch(model)
        hook = model.mid_block.resnets[1]._diffusers_hook.get_hook("double")
        output(model, inputs_of())
        assert hook.calls == 1
        fastdiff.unpatch(model)
        output(model, inputs_of())
        assert hook.calls == 2


def test_users_hooks_on_norms_see_stock_outputs() -> None:
    model, inputs = sd15_unet(), inputs_of()
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
    model, inputs = sd15_unet(), inputs_of()
    fastdiff.patch(model)
    conv = model.mid_block.resnets[0].conv2
    held: list[Tensor] = []
    conv.register_forward_hook(lambda module, args, result: held.extend([result, result.clone()]))
    output(model, inputs)
    assert torch.equal(held[0], held[1])


def test_processors_are_not_touched() -> None:
    model = sd15_unet()
    before = model.attn_processors
    fastdiff.patch(model)
    assert all(model.attn_processors[name] is p for name, p in before.items())
    model.set_default_attn_processor()  # raises for classes it does not know


@pytest.mark.parametrize("kind", ["bias", "per query", "encoder"])
def test_attention_masks(kind: str) -> None:
    model, inputs = sd15_unet(), inputs_of()
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


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package xformers, on a CPU; the shapes of the queries it was called with."""
    shapes: list[Any] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, **options: Any) -> Tensor:
        assert attn_bias is None
        shapes.append(q.shape)
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=options.get("scale"))

    package = types.SimpleNamespace(
        ops=types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    )
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    return shapes


def _enable_xformers(pipe: Any) -> None:
    """Diffusers asks for CUDA, and tries the kernel there."""
    randn = torch.randn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "randn", lambda *size, device=None, **options: randn(*size, **options))
        pipe.enable_xformers_memory_efficient_attention()


@pytest.mark.parametrize("first", ["xformers", "patch"])
def test_xformers(xformers: list[Any], first: str) -> None:
    """Switched on, its processors run, from a pipeline's patched U-Net and VAE too; switched off, ours again."""
    stock, pipe = sd_pipeline(), sd_pipeline()
    _enable_xformers(stock)
    expected, calls = run_sd(stock, output_type="pt"), len(xformers)
    assert calls > 0
    xformers.clear()
    steps = [_enable_xformers, fastdiff.patch]
    for step in steps if first == "xformers" else reversed(steps):
        step(pipe)
    _close(run_sd(pipe, output_type="pt"), expected)
    assert len(xformers) == calls
    rows = [row for row in fastdiff.report(pipe).rows if row.backend != "not run yet"]
    assert {row.cls for row in rows if not row.fused} == {"Attention"}
    assert all("its processor is XFormersAttnProcessor" in row.reason for row in rows if row.cls == "Attention")
    pipe.disable_xformers_memory_efficient_attention()
    xformers.clear()
    run_sd(pipe, output_type="pt")
    assert not xformers
    assert is_fused(pipe)


def test_device_map(tmp_path: Any) -> None:
    """A model loaded with some blocks on disk: their weights come for each call of a layer, and go."""
    stock, inputs = sd15_unet(), inputs_of()
    stock.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in stock.named_children()} | {"mid_block": "disk", "down_blocks": "disk"}
    model = type(stock).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in model.mid_block.parameters()} == {"meta"}
    fastdiff.patch(model)
    _close(output(model, inputs), output(stock, inputs))
    for row in fastdiff.report(model).rows:
        assert row.fused == (row.cls in ("Attention", "GEGLU")), row
        assert row.fused or "hooks" in row.reason
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), output(stock, inputs))


def test_chunked_feed_forward_runs_stock() -> None:
    case = CASES[-1]
    model, inputs = fastdiff.patch(case.build()), inputs_of(case)
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

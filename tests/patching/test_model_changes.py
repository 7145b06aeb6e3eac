"""What users change in a model after it was patched: submodules replaced, attributes set, hooks registered."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from models import CASES, Case, dit, improved_ddpm_unet, inputs_of, output, sd15_unet
from torch import nn

import fastdiff
from fastdiff.patching.blocks import activated_once

SD, IMPROVED, DIT = CASES[0], CASES[3], CASES[5]


def _resnet(model: Any) -> Any:
    return model.mid_block.resnets[0]


def _cross_attention(model: Any) -> Any:
    return model.mid_block.attentions[0].transformer_blocks[0].attn2


def _new_resnet(model: Any) -> None:
    torch.manual_seed(0)
    model.mid_block.resnets[0] = ResnetBlock2D(in_channels=48, out_channels=48, temb_channels=96, groups=8).eval()


def _new_norm(model: Any) -> None:
    model.conv_norm_out = nn.GroupNorm(8, 24)


CHANGES: dict[str, tuple[Case, Callable[[Any], Any]]] = {
    "conv_act": (SD, lambda m: setattr(m, "conv_act", nn.ReLU())),
    "conv_norm_out": (SD, _new_norm),
    "no conv_norm_out": (SD, lambda m: setattr(m, "conv_norm_out", nn.Identity())),
    "nonlinearity": (SD, lambda m: setattr(_resnet(m), "nonlinearity", nn.ReLU())),
    "a ResNet block": (SD, _new_resnet),
    "time_embed_act": (SD, lambda m: setattr(m, "time_embed_act", nn.GELU())),
    "post_act": (IMPROVED, lambda m: setattr(m.time_embedding, "post_act", nn.Tanh())),
    "norm_q": (SD, lambda m: setattr(_cross_attention(m), "norm_q", nn.LayerNorm(48 // _cross_attention(m).heads))),
    "norm_cross": (SD, lambda m: setattr(_cross_attention(m), "norm_cross", nn.LayerNorm(32))),
    "a LayerNorm for a GroupNorm": (SD, lambda m: setattr(_resnet(m), "norm1", nn.LayerNorm(4))),
    "pos_embed": (DIT, lambda m: setattr(m.transformer_blocks[0], "pos_embed", nn.Linear(48, 48))),
    "approximate": (DIT, lambda m: setattr(m.transformer_blocks[0].ff.net[0], "approximate", "none")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_patching_are_obeyed(name: str) -> None:
    case, change = CHANGES[name]
    inputs, results = inputs_of(case), []
    unchanged = output(case.build(), inputs)
    for patched in (False, True):
        model = case.build()
        if patched:
            fastdiff.patch(model)
        torch.manual_seed(1)
        change(model)
        results.append(output(model, inputs))
    assert (results[0] - unchanged).abs().max() > 5e-5 * unchanged.abs().max()
    scale = results[0].abs().max().item()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=5e-6 * scale)


HOOKED: dict[str, tuple[Case, Callable[[Any], nn.Module]]] = {
    "nonlinearity": (SD, lambda m: _resnet(m).nonlinearity),
    "dropout": (SD, lambda m: _resnet(m).dropout),
    "to_out": (SD, lambda m: _cross_attention(m).to_out[1]),
    "norm1": (SD, lambda m: _resnet(m).norm1),
    "conv_norm_out": (SD, lambda m: m.conv_norm_out),
    "conv_act": (SD, lambda m: m.conv_act),
    "norm3": (DIT, lambda m: m.transformer_blocks[0].norm3),
}


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_see_what_they_see_in_stock_code(name: str, kind: str) -> None:
    case, find = HOOKED[name]
    seen: list[list[float]] = []
    for patched in (False, True):
        model = case.build()
        if patched:
            fastdiff.patch(model)
        sums: list[float] = []

        def hook(module: nn.Module, *values: Any, sums: list[float] = sums) -> None:
            value = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
            sums.append(value.double().square().sum().item())

        getattr(find(model), f"register_{kind}")(hook)
        inputs = inputs_of(case)
        if kind == "full_backward_hook":
            model.requires_grad_(True)
            model(**inputs, return_dict=False)[0].square().sum().backward()
        else:
            output(model, inputs)
        seen.append(sums)
    assert len(seen[0]) > 0
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_hooks_for_all_modules_see_every_call() -> None:
    counts, model, inputs = [], sd15_unet(), inputs_of(SD)
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        counts[-1] += 1
        if isinstance(result, torch.Tensor):
            held.append((result, result.clone()))

    for patched in (False, True):
        if patched:
            fastdiff.patch(model)
        counts.append(0)
        handle = nn.modules.module.register_module_forward_hook(hook)
        try:
            output(model, inputs)
        finally:
            handle.remove()
    assert counts[0] == counts[1] > 100
    assert all(torch.equal(now, then) for now, then in held)


def test_silu_of_the_time_embedding_is_computed_once() -> None:
    temb, silu = torch.randn(2, 16), nn.SiLU()
    with torch.no_grad():
        first = activated_once(silu, temb)
        assert torch.equal(first, nn.functional.silu(temb))
        assert activated_once(silu, temb) is first
        temb.add_(1)
        assert torch.equal(activated_once(silu, temb), nn.functional.silu(temb))
        kept = weakref.ref(activated_once(silu, temb))
    temb.requires_grad_(True)
    assert activated_once(silu, temb).requires_grad
    del temb, first
    gc.collect()
    assert kept() is None
    with torch.inference_mode():
        untracked = torch.randn(2, 16)
        activated_once(silu, untracked)
        untracked.add_(1)
        assert torch.equal(activated_once(silu, untracked), nn.functional.silu(untracked))


@pytest.mark.parametrize(("samples", "embeddings"), [(3, 1), (1, 3)])
def test_time_embedding_of_another_batch_size_is_broadcast(samples: int, embeddings: int) -> None:
    for model in (sd15_unet(), improved_ddpm_unet()):
        block = _resnet(model)
        width = block.time_emb_proj.in_features
        x, temb = torch.randn(samples, block.in_channels, 4, 4), torch.randn(embeddings, width)
        with torch.no_grad():
            expected = block(x, temb)
            fastdiff.patch(model)
            assert torch.equal(block(x, temb), expected)


def test_scale_and_shift_without_time_embedding_is_stocks_error() -> None:
    model = improved_ddpm_unet()
    block, errors = _resnet(model), []
    for patched in (False, True):
        if patched:
            fastdiff.patch(model)
        with pytest.raises((TypeError, ValueError, AttributeError)) as raised:
            block(torch.randn(1, block.in_channels, 4, 4), None)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_nothing_stays_on_tensors_of_a_forward() -> None:
    model = fastdiff.patch(dit())
    result = output(model, inputs_of(DIT))
    assert not result.__dict__
    model = fastdiff.patch(sd15_unet())
    kept: list[torch.Tensor] = []
    model.conv_out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    output(model, inputs_of(SD))
    assert not kept[0].__dict__

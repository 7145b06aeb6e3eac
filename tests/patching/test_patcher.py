"""The patcher's promises that hold for every family: instances only, exact restore, options, live weights."""

from __future__ import annotations

import pickle
import types

import pytest
import torch
from diffusers import DDIMScheduler
from models import (
    CASES,
    inputs_of,
    is_fused,
    is_stock,
    output,
    run_sd,
    sd15_unet,
    sd_pipeline,
)
from torch import nn

import fastdiff
from fastdiff.patching import patch_of


def test_pipeline_there_and_back() -> None:
    """A whole pipeline: same latents but for rounding, full coverage, and bitwise eager after unpatch."""
    pipe = sd_pipeline()
    classes = {name: type(c) for name, c in pipe.components.items()}
    eager = run_sd(pipe)
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    assert fastdiff.patch(pipe) is pipe
    patched = run_sd(pipe)
    assert not torch.equal(patched, eager)
    torch.testing.assert_close(patched, eager, rtol=1e-3, atol=1e-3)
    report = fastdiff.report(pipe)
    ran = [row for row in report.rows if row.backend != "not run yet"]
    assert all(row.fused for row in ran)
    assert {row.path.split(".")[0] for row in ran} == {"unet", "scheduler"}
    assert {name: type(c) for name, c in pipe.components.items()} == classes
    assert fastdiff.unpatch(pipe) is pipe
    assert vars(pipe).keys() == before.keys()
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe)[name] is c for name, c in before.items() if name in pipe.components)
    assert is_stock(pipe.unet)
    assert is_stock(pipe.vae)
    assert pipe.scheduler.step.__func__ is DDIMScheduler.step
    assert torch.equal(run_sd(pipe), eager)


def test_patching_twice_is_patching_once() -> None:
    model = fastdiff.patch(sd15_unet())
    once = output(model, inputs_of())
    rows = fastdiff.report(model).rows
    fastdiff.patch(fastdiff.patch(model))
    assert torch.equal(output(model, inputs_of()), once)
    assert fastdiff.report(model).rows == rows
    for module in model.modules():
        if "forward" in vars(module):
            assert isinstance(vars(module)["forward"].func, types.FunctionType)
    fastdiff.unpatch(model)
    assert is_stock(model)


def test_patching_again_reconfigures() -> None:
    model = fastdiff.patch(sd15_unet(), only="*attn1")
    output(model, inputs_of())
    assert fastdiff.report(model).fused == 4
    fastdiff.patch(model, skip=["*attn?", "mid_block.*"])
    output(model, inputs_of())
    left = [row for row in fastdiff.report(model).rows if not row.fused]
    assert all("attn" in row.path or row.path.startswith("mid_block") for row in left)
    assert len(left) == 13
    assert {row.reason for row in left} == {"excluded by skip=..."}
    assert patch_of(model).savings == ["SiLU of the time embedding once instead of 6 times"]
    fastdiff.unpatch(model)
    assert is_stock(model)


def test_context_manager() -> None:
    model = sd15_unet()
    eager = output(model, inputs_of())
    with fastdiff.patched(model) as inside:
        assert inside is model
        assert not torch.equal(output(model, inputs_of()), eager)
    assert is_stock(model)
    assert torch.equal(output(model, inputs_of()), eager)
    with pytest.raises(RuntimeError), fastdiff.patched(model):
        raise RuntimeError
    assert is_stock(model)
    fastdiff.patch(model, only="*attn1")
    with fastdiff.patched(model):
        output(model, inputs_of())
        assert fastdiff.report(model).coverage == 1.0
    output(model, inputs_of())
    assert fastdiff.report(model).fused == 4


def test_live_parameters() -> None:
    """Weights are read at every call: in-place updates, replaced parameters and dtype changes are seen."""
    model = fastdiff.patch(sd15_unet())
    first = output(model, inputs_of())
    norm = model.mid_block.resnets[0].norm1
    with torch.no_grad():
        norm.weight.mul_(2)
    second = output(model, inputs_of())
    norm.weight = nn.Parameter(norm.weight / 2, requires_grad=False)
    assert not torch.equal(first, second)
    assert torch.equal(output(model, inputs_of()), first)
    model.to(torch.bfloat16)
    half = output(model, CASES[0].inputs(torch.Generator().manual_seed(0), torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert is_fused(model)


def test_signature_is_stocks() -> None:
    import inspect

    for case in CASES:
        model = case.build()
        modules = [m for m in model.modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
        stock = [list(inspect.signature(m.forward).parameters) for m in modules]
        fastdiff.patch(model)
        assert [list(inspect.signature(m.forward).parameters) for m in modules] == stock, case.name
        assert isinstance(pickle.loads(pickle.dumps(model)), type(model))


def test_a_displaced_replacement_is_not_fused() -> None:
    model = fastdiff.patch(sd15_unet())
    output(model, inputs_of())
    total = fastdiff.report(model).fused
    stock = type(model.mid_block.resnets[0]).forward
    model.mid_block.resnets[0].forward = stock.__get__(model.mid_block.resnets[0])
    output(model, inputs_of())
    report = fastdiff.report(model)
    (row,) = (r for r in report.rows if r.path == "mid_block.resnets.0")
    assert (row.backend, row.fused) == ("stock", False)
    assert report.fused == total - 1
    assert report.summary().startswith(f"{total - 1} of {total} places fused")


def test_packed_weights_are_counted_apart() -> None:
    model = fastdiff.patch(sd15_unet().bfloat16(), prepack_weights=True)
    output(model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs_of().items()})
    report = fastdiff.report(model)
    packed = [row for row in report.rows if not row.kernel]
    assert {"Conv2d"} <= {row.cls for row in packed} <= {"Conv2d", "Linear"}
    assert not any(row.fused for row in packed)
    assert report.coverage == 1.0
    assert f"{report.fused} of {len(report.rows) - len(packed)} places" in report.summary()
    assert "packed weights:" in report.summary()

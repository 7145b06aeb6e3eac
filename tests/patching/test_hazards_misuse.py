"""Hostile use: interrupted patching, exceptions in a forward, odd inputs, wrapped models, changes mid-generation."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from models import (
    CASES,
    Case,
    ddpm_pipeline,
    ddpm_unet,
    dit,
    inputs_of,
    is_stock,
    output,
    run_sd,
    sd15_unet,
    sd_pipeline,
)
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import CLAIM, patch_of

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def _each(function: Callable[[Tensor], Tensor], inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: _each(function, v) if isinstance(v, dict) else function(v) for k, v in inputs.items()}


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _pipe_is_stock(pipe: Any) -> bool:
    names = vars(pipe.scheduler).keys() | vars(pipe).keys()
    return is_stock(pipe.unet) and not any(k.startswith("_fastdiff") or k == "step" for k in names)


# interruptions


def _interrupted(call: Callable[[], Any], at: int | None) -> int:
    """``call``, with a KeyboardInterrupt at the given line run in the patcher; returns how many were run."""
    root, count = os.path.dirname(fastdiff.patching.__file__), 0

    def lines(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        if event == "line" and count == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return lines

    def calls(frame: FrameType, event: str, arg: Any) -> Any:
        return lines if frame.f_code.co_filename.startswith(root) else None

    sys.settrace(calls)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def test_interrupted_patch() -> None:
    """Wherever Ctrl-C strikes, the pipeline is stock, or as it was patched before."""
    pipe = ddpm_pipeline()
    fastdiff.unpatch(fastdiff.patch(pipe))  # everything is imported and cached
    total = _interrupted(lambda: fastdiff.patch(pipe), None)
    fastdiff.unpatch(pipe)
    assert total > 500
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(1, total, (40,), generator=generator).tolist():
        _interrupted(lambda: fastdiff.patch(pipe), at)
        assert _pipe_is_stock(pipe), at
    fastdiff.patch(pipe, skip="*norm_out")
    earlier = [patch_of(pipe.unet), patch_of(pipe.scheduler)]
    expected = output(pipe.unet, inputs_of(CASES[2]))
    for at in torch.randint(1, total, (20,), generator=generator).tolist():
        _interrupted(lambda: fastdiff.patch(pipe, backend="eager"), at)
        assert [patch_of(pipe.unet), patch_of(pipe.scheduler)] == earlier, at
        assert all(replacement.installed() for site in earlier[0].sites for replacement in site.replacements)
    assert torch.equal(output(pipe.unet, inputs_of(CASES[2])), expected)
    fastdiff.unpatch(pipe)
    assert _pipe_is_stock(pipe)


def test_interrupted_unpatch_can_be_repeated() -> None:
    pipe = ddpm_pipeline()
    fastdiff.patch(pipe)
    total = _interrupted(lambda: fastdiff.unpatch(pipe), None)
    for at in torch.randint(1, total, (20,), generator=torch.Generator().manual_seed(0)).tolist():
        fastdiff.patch(pipe)
        _interrupted(lambda: fastdiff.unpatch(pipe), at)
        if CLAIM in vars(pipe):
            fastdiff.unpatch(pipe)
        assert _pipe_is_stock(pipe), at


class _Stop(BaseException):
    pass


@BY_NAME
def test_exception_in_a_forward(case: Case) -> None:
    """Wherever it strikes, the next forward is as if nothing had been."""
    model, inputs = fastdiff.patch(case.build()), inputs_of(case)
    expected = output(model, inputs)
    rows = fastdiff.report(model).rows
    leaves = [m for m in model.modules() if not list(m.children()) and isinstance(m, (nn.Conv2d, nn.Linear))]

    def stop(*args: Any) -> None:
        raise _Stop

    for leaf in leaves[:: max(1, len(leaves) // 6)]:
        handle = leaf.register_forward_hook(stop)
        with pytest.raises(_Stop):
            output(model, inputs)
        handle.remove()
        assert torch.equal(output(model, inputs), expected)
    assert fastdiff.report(model).rows == rows


# wrong arguments


UNET = sd15_unet()

WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fastdiff.patch(type(UNET)), TypeError, "expected a Diffusers pipeline.* got type"),
    (lambda: fastdiff.patch([UNET]), TypeError, "expected .* got list"),
    (lambda: fastdiff.patch(UNET.state_dict()), TypeError, "expected .* got OrderedDict"),
    (lambda: fastdiff.patch(nn.DataParallel(UNET)), TypeError, "expected .* got DataParallel"),
    (lambda: fastdiff.patch(UNET, only=b"mid_block"), ValueError, "only is .*; expected a pattern"),
    (lambda: fastdiff.patch(UNET, only=None), ValueError, "only is None; expected a pattern"),
    (lambda: fastdiff.patch(UNET, skip=0), ValueError, "skip is 0; expected a pattern"),
    (lambda: fastdiff.patch(UNET, backend=["cpu"]), ValueError, r"backend is \['cpu'\]; expected None or one of"),
    (lambda: fastdiff.patch(UNET, backend=""), ValueError, "backend is ''; expected None or one of"),
    (lambda: fastdiff.patch(UNET, prepack_weights=1), ValueError, "prepack_weights is 1; expected True or False"),
    (lambda: fastdiff.patch(), TypeError, "missing 1 required positional argument: 'x'"),  # type: ignore[call-arg]
    (lambda: fastdiff.patch(UNET, "*attn1"), TypeError, "positional"),  # type: ignore[misc]
    (lambda: fastdiff.patched(UNET, fast=1).__enter__(), TypeError, "unexpected keyword argument 'fast'"),
    (lambda: fastdiff.unpatch(UNET), ValueError, "this UNet2DConditionModel is not patched"),
    (lambda: fastdiff.verify(3), TypeError, "expected .* got int"),
    (lambda: fastdiff.report(fastdiff.ops), TypeError, "expected .* got module"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert is_stock(UNET)


@pytest.mark.parametrize("launches", [3, "yes", None, {"sample": None}])
def test_wrong_arguments_of_report(launches: Any) -> None:
    model = fastdiff.patch(ddpm_unet())
    before = output(model, inputs_of(CASES[2]))
    message = "launches is .*; expected" if not isinstance(launches, dict) else ""  # that is the forward's own error
    with pytest.raises((TypeError, ValueError, AttributeError), match=message):
        fastdiff.report(model, launches=launches)
    assert torch.equal(output(model, inputs_of(CASES[2])), before)
    assert fastdiff.report(model).coverage == 1.0


# odd inputs and states


@BY_NAME
@pytest.mark.parametrize("where", ["model and all", "patch only", "use only"])
def test_inference_mode(case: Case, where: str) -> None:
    with torch.inference_mode(where == "model and all"):
        model, stock = case.build(), case.build()
    with torch.inference_mode(where != "use only"):
        fastdiff.patch(model)
    inputs = inputs_of(case)
    with torch.inference_mode():
        expected = output(stock, inputs)
        _close(output(model, inputs), expected)
    assert fastdiff.report(model).coverage == 1.0
    _close(output(model, inputs), expected)
    assert fastdiff.report(model).coverage == 1.0
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), output(stock, inputs))


@BY_NAME
def test_no_samples(case: Case) -> None:
    model, inputs = case.build(), inputs_of(case)
    empty = _each(lambda t: t[:0], inputs)
    results: list[Any] = []
    for patched in (False, True):
        if patched:
            fastdiff.patch(model)
        try:
            results.append(output(model, empty).shape)
        except RuntimeError as error:
            results.append(type(error))
    assert results[0] == results[1]


@BY_NAME
def test_fp64_runs_stock(case: Case) -> None:
    model, inputs = case.build(), inputs_of(case, torch.float64)
    fastdiff.patch(model).double()
    ours = output(model, inputs)
    for row in fastdiff.report(model).rows:
        assert not row.fused
        assert "float64" in row.reason
    fastdiff.unpatch(model)
    _close(ours, output(model, inputs))


@BY_NAME
def test_meta_device(case: Case) -> None:
    """Shapes only, as in stock code; and back, with weights."""
    model, inputs = case.build(), inputs_of(case)
    weights = model.state_dict()
    fastdiff.patch(model)
    expected = output(model, inputs)
    model.to("meta")
    got = output(model, _each(lambda t: t.to("meta"), inputs))
    assert (got.device.type, got.shape) == ("meta", expected.shape)
    assert not any(row.fused for row in fastdiff.report(model).rows)
    if case.name != "DiT":  # DiT's positions are in no state dict
        model.load_state_dict(weights, assign=True)
        assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_dropout_in_training_mode(grad: bool) -> None:
    model = sd15_unet(dropout=0.3).train()
    results = []
    for patched in (False, True):
        if patched:
            fastdiff.patch(model)
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            results.append(model(**inputs_of()).sample)
    _close(results[1], results[0])
    model.eval()
    assert (output(model, inputs_of()) - results[0]).norm() > 0.1 * results[0].norm()
    assert fastdiff.report(model).coverage == 1.0


# wrapped models


def test_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = ddpm_unet().requires_grad_(True)
        inputs = inputs_of(CASES[2])
        model(**inputs).sample.square().sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert fastdiff.patch(wrapped) is wrapped
        assert patch_of(model) is not None
        wrapped(**inputs).sample.square().sum().backward()
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            _close(parameter.grad, grad)
        output(wrapped, inputs)
        assert fastdiff.report(wrapped).coverage == 1.0
        fastdiff.unpatch(wrapped)
        assert is_stock(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["prepare", "patch"])
def test_prepared_by_accelerate(first: str) -> None:
    """Mixed precision wraps the model's forward, and unwrapping binds what it finds inside anew."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        stock, model, inputs = ddpm_unet(), ddpm_unet(), inputs_of(CASES[2])
        eager, expected = output(stock, inputs), output(accelerator.prepare_model(stock), inputs)
        if first == "patch":
            fastdiff.patch(model)
        prepared = accelerator.prepare_model(model)
        if first == "prepare":
            fastdiff.patch(prepared)
        assert torch.equal(output(prepared, inputs), expected)  # autocast: eager
        assert {row.reason for row in fastdiff.report(model).rows if "Resnet" in row.cls} == {"autocast is on"}
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        _close(output(plain, inputs), eager)
        assert fastdiff.report(plain).coverage == 1.0
        fastdiff.unpatch(plain)
        assert torch.equal(output(plain, inputs), eager)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_compiled_component() -> None:
    pipe = ddpm_pipeline()
    model = pipe.unet
    pipe.unet = torch.compile(model)
    fastdiff.patch(pipe)
    assert sum(row.path.startswith("unet.") for row in fastdiff.report(pipe).rows) == 13
    fastdiff.unpatch(pipe)
    assert is_stock(model)


# mid-generation


@pytest.mark.parametrize("start", ["stock", "patched"])
def test_change_between_two_steps(start: str) -> None:
    pipe = sd_pipeline()
    expected = run_sd(pipe, num_inference_steps=4)
    if start == "patched":
        fastdiff.patch(pipe)

    def change(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            (fastdiff.unpatch if start == "patched" else fastdiff.patch)(pipe)
        return kwargs

    _close(run_sd(pipe, num_inference_steps=4, callback_on_step_end=change), expected)
    assert (CLAIM in vars(pipe)) == (start == "stock")


def test_shallow_copy_of_a_pipeline() -> None:
    """It shares the claim; what the one does not hold any more, the other cannot take away."""
    pipe = fastdiff.patch(sd_pipeline())
    twin = copy.copy(pipe)
    fastdiff.unpatch(twin)
    assert is_stock(pipe.unet)
    fastdiff.patch(pipe.unet)
    fastdiff.unpatch(pipe)
    assert not is_stock(pipe.unet)
    output(pipe.unet, inputs_of())
    assert fastdiff.report(pipe.unet).coverage == 1.0


def test_nested_contexts() -> None:
    model, inputs = dit(), inputs_of(CASES[-1])
    eager = output(model, inputs)
    with fastdiff.patched(model):
        fused = output(model, inputs)
        with fastdiff.patched(model, backend="eager"):
            output(model, inputs)
            assert fastdiff.report(model).fused == 0
        assert torch.equal(output(model, inputs), fused)
        fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)
    assert is_stock(model)


def test_functional_call_reads_the_given_weights() -> None:
    model, inputs = sd15_unet(), inputs_of()
    weights = {name: 1.1 * p for name, p in model.named_parameters()}
    call = functools.partial(torch.func.functional_call, model, weights, kwargs=inputs)
    with torch.no_grad():
        expected = call(()).sample
        fastdiff.patch(model)
        assert (output(model, inputs) - expected).norm() > 0.1 * expected.norm()
        _close(call(()).sample, expected)
    assert fastdiff.report(model).coverage == 1.0

"""Every family: kernels run at every site, the numbers are eager's or better, and unpatch gives eager back."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models import CASES, Case, assert_no_further, flat, narrower, output
from zoo import ALL_CASES

import fastdiff
from fastdiff.patching import patch_of

BY_NAME = pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
DTYPES = [pytest.param(torch.float32, marks=pytest.mark.smoke), torch.bfloat16]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _to_fp64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {k: _to_fp64(v) for k, v in inputs.items()}
    if isinstance(inputs, list):
        return [_to_fp64(v) for v in inputs]
    return inputs.double() if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() else inputs


def _in_fp64(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.nn.Module:
    """An fp64 copy of a stock model. In older versions of Diffusers some mix dtypes then."""
    exact = copy.deepcopy(model).double()
    try:
        output(exact, _to_fp64(inputs))
    except RuntimeError as error:
        pytest.skip(f"the stock model of this Diffusers does not run in fp64: {error}")
    return exact


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_numerics(case: Case, dtype: torch.dtype) -> None:
    """Pooled over ten seeds, the patched model is at most 1.05 times as far from fp64 as eager."""
    model = case.build().to(dtype)
    calls = [case.inputs(_generator(seed), dtype) for seed in range(10)]
    exact = _in_fp64(model, calls[0])
    reference = torch.stack([output(exact, _to_fp64(inputs)) for inputs in calls])
    eager = torch.stack([output(model, inputs) for inputs in calls])
    fastdiff.patch(model)
    ours = torch.stack([output(model, inputs) for inputs in calls])
    assert fastdiff.report(model).fused == sum(case.sites.values())
    assert_no_further(ours, eager, reference)


@pytest.mark.smoke
@BY_NAME
def test_sites(case: Case) -> None:
    """The expected sites, all served by the CPU kernels, no place left over; fewer launches on a real forward."""
    model = fastdiff.patch(case.build())
    inputs = case.inputs(_generator(0), torch.float32)
    assert narrower(model) == {}
    before = fastdiff.report(model)
    assert before.coverage == 0.0
    assert set(before.backends) <= {"not run yet", "stock"}
    output(model, inputs)
    report = fastdiff.report(model, launches=inputs)
    assert {row.path: row.reason for row in report.rows if row.backend == "stock"} == case.left
    patched = [row for row in report.rows if row.backend != "stock"]
    assert Counter(row.cls for row in patched) == case.sites
    for row in patched:
        assert (row.backend, row.reason, row.fused) == ("cpu", "", True), row
    (launches,) = report.launches
    assert launches.after <= (1 - case.saved) * launches.before, launches


@pytest.mark.smoke
@BY_NAME
def test_unpatch_is_exact(case: Case) -> None:
    model = case.build()
    inputs = case.inputs(_generator(0), torch.float32)
    eager = output(model, inputs)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    output(model, inputs)
    own = {k for name, module in model.named_modules() for k, v in vars(module).items() if v is not state[name][k]}
    fastdiff.patch(model)
    assert not torch.equal(output(model, inputs), eager)
    fastdiff.unpatch(model)
    assert torch.equal(output(model, inputs), eager)
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys(), name
        # Some forwards set attributes: the caches of VAEs for videos.
        assert all(vars(module)[k] is v for k, v in state[name].items() if k not in own), name


@BY_NAME
def test_gradients_are_eagers(case: Case) -> None:
    """With gradients needed every site runs eager, says so, and inputs and weights get eager's gradients."""

    def gradients(model: torch.nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
        name = next(iter(inputs))
        inputs = inputs | {name: inputs[name].requires_grad_()}
        result = flat(model(**inputs, return_dict=False))
        weight = torch.randn(result.shape, generator=_generator(1)).to(result.dtype)
        leaves = [inputs[name], *model.parameters()]
        found = torch.autograd.grad((result * weight).sum(), leaves, allow_unused=True)
        return [g for g in found if g is not None]

    inputs = case.inputs(_generator(0), torch.float32)
    model = case.build().requires_grad_(True)
    exact = gradients(_in_fp64(model, inputs), _to_fp64(inputs))
    expected = gradients(model, inputs)
    fastdiff.patch(model)
    found = gradients(model, inputs)
    assert len(found) == len(expected) > 20
    for got, want, truth in zip(found, expected, exact, strict=True):
        noise = (want - truth).norm()  # some gradients, as of a key's bias, are zero but for rounding
        assert (got - want).norm() <= 1e-5 * want.norm() + 4 * noise
    for row in fastdiff.report(model).rows:
        assert not row.fused, row
        assert "gradient" in row.reason or row.path in case.left, row


@BY_NAME
def test_backend_option(case: Case) -> None:
    model = fastdiff.patch(case.build(), backend="eager")
    inputs = case.inputs(_generator(0), torch.float32)
    output(model, inputs)
    report = fastdiff.report(model)
    assert report.coverage == 0.0
    patched = [row for row in report.rows if row.path not in case.left]
    assert all(row.backend == "eager" and "use_backend" in row.reason for row in patched)
    fastdiff.patch(model)
    output(model, inputs)
    assert fastdiff.report(model).fused == len(patched)


def test_switches_are_bitwise() -> None:
    """The SiLU of the time embedding and DiT's sinusoid, applied once, change no bit."""
    for case in CASES:
        model = case.build()
        inputs = case.inputs(_generator(0), torch.float32)
        fastdiff.patch(model)
        found = patch_of(model)
        assert found is not None
        assert len(found.savings) == (case.name != "AutoencoderKL"), case.name
        once = output(model, inputs)
        for change in reversed(found._changes):
            change.restore()
        assert torch.equal(output(model, inputs), once), case.name

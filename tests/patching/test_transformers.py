"""Every transformer family: kernels run at every site, the numbers are eager's or better, unpatch gives eager back."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
from transformer_models import TRANSFORMERS, Transformer, outputs, to_dtype

import fastdiff
from fastdiff._launches import count_launches
from fastdiff.patching._site import site_of
from fastdiff.patching.blocks import halves, rejoined

pytestmark = pytest.mark.kernel

BY_NAME = pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda c: c.name)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_numerics(case: Transformer, dtype: torch.dtype) -> None:
    """Pooled over ten seeds, the patched model is at most 1.05 times as far from fp64 as eager."""
    model = case.build().to(dtype)
    exact = copy.deepcopy(model).double()
    calls = [case.inputs(seed, dtype, model) for seed in range(10)]
    reference = torch.stack([outputs(exact, to_dtype(inputs, torch.float64)) for inputs in calls])
    eager = torch.stack([outputs(model, inputs) for inputs in calls])
    fastdiff.patch(model)
    ours = torch.stack([outputs(model, inputs) for inputs in calls])

    def error(value: torch.Tensor) -> float:
        return ((value.double() - reference).square().sum() / reference.square().sum()).sqrt().item()

    assert ours.dtype == eager.dtype
    assert not torch.equal(ours, eager), "bitwise equal: nothing fused ran"
    assert error(ours) <= 1.05 * error(eager), (error(ours), error(eager))


@BY_NAME
def test_sites(case: Transformer) -> None:
    """The expected sites, all served by the CPU kernels; the rest left alone for the reason in the table."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    fastdiff.patch(model)
    outputs(model, inputs)
    rows = fastdiff.report(model).rows
    left = [row for row in rows if row.backend == "stock"]
    assert Counter((row.cls, row.reason) for row in left) == case.left
    fused = [row for row in rows if row.backend != "stock"]
    assert Counter(row.cls for row in fused) == case.sites
    for row in fused:
        assert (row.backend, row.reason, row.fused) == ("cpu", "", True), row


@BY_NAME
def test_launches(case: Transformer) -> None:
    """With the real numbers of blocks, patching removes at least the stated share of the launches."""
    model = case.build(deep=True)
    inputs = case.inputs(0, model=model)
    stock = count_launches(lambda: model(**inputs)).total()
    fastdiff.patch(model)
    fused = count_launches(lambda: model(**inputs)).total()
    assert fused <= (1 - case.saved) * stock, (fused, stock)


@BY_NAME
def test_unpatch_is_exact(case: Transformer) -> None:
    model = case.build()
    inputs = case.inputs(0, model=model)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    eager = outputs(model, inputs)
    fastdiff.patch(model)
    assert not torch.equal(outputs(model, inputs), eager)
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys(), name
        assert all(vars(module)[k] is v for k, v in state[name].items()), name


#: Their own forwards do not run on meta: two read values of tensors, one makes its rotary tables on the CPU, one
#: autocasts.
_NOT_ON_META = {"Lumina2", "Z-Image", "CogView4", "Mochi"}


@BY_NAME
def test_published_sizes(case: Transformer) -> None:
    """With published sizes on the meta device, nothing but the device keeps any site from its kernel."""
    model = case.published()
    fastdiff.patch(model)
    rows = fastdiff.report(model).rows
    stock = Counter((row.cls, row.reason) for row in rows if row.backend == "stock")
    assert stock.keys() == case.left.keys()
    assert {row.cls for row in rows if row.backend != "stock"} == case.sites.keys()
    if case.name in _NOT_ON_META:
        return
    outputs(model, case.inputs(0, model=model))
    for row in fastdiff.report(model).rows:
        if row.backend != "stock":
            assert re.fullmatch(r"([\w' -]+: cpu: a tensor is on meta(; )?)+", row.reason), row


def test_mochi_with_padding_in_front() -> None:
    """Stock code then gives a token's result to another one: that is left to it."""
    case = next(c for c in TRANSFORMERS if c.name == "Mochi")
    model = case.build()
    inputs = case.inputs(0, model=model)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    eager = outputs(model, inputs)
    fastdiff.patch(model)
    assert (outputs(model, inputs) - eager).norm() <= 1e-5 * eager.norm()
    reasons = {site.reason for m in model.modules() if (site := site_of(m)) and type(m).__name__ == "MochiAttention"}
    assert reasons == {"a sample's text is padded at the front"}


def test_halves_are_rejoined_without_a_copy() -> None:
    """Only as they were given out; whoever puts something else in their place gets a concatenation."""
    x, other = torch.randn(2, 7, 3), torch.randn(2, 4, 3)
    with torch.no_grad():
        first, second = halves(x, 3)
        second += 1
        assert rejoined(first, second) is x
        assert torch.equal(x, torch.cat([first, second], dim=1))
        for pair in ((second, first), (first, second + 1), (first.clone(), second), (first, other)):
            joint = rejoined(*pair)
            assert joint is not x
            assert torch.equal(joint, torch.cat(pair, dim=1))
        second.data = other
        assert torch.equal(rejoined(first, second), torch.cat([first, other], dim=1))
    first, second = halves(x, 3)
    assert rejoined(first, second) is not x

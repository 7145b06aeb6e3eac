"""Every transformer family: kernels run at every site, the numbers are eager's or better, unpatch gives eager back."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from extent import ALL
from fakes import CONTRACTS, contracts, fake_tensors
from models import assert_no_further, narrower
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformer_case import Transformer, outputs, to_dtype
from transformer_models import TRANSFORMERS

import fastdiff
from fastdiff._launches import count_launches
from fastdiff.patching._patch import patch_of
from fastdiff.patching._site import site_of
from fastdiff.patching.blocks import halves, rejoined

pytestmark = pytest.mark.kernel

BY_NAME = pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda c: c.name)
DTYPES = [pytest.param(torch.float32, marks=pytest.mark.smoke), torch.bfloat16]


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_numerics(case: Transformer, dtype: torch.dtype) -> None:
    """Pooled over ten seeds, the patched model is at most 1.05 times as far from fp64 as eager."""
    model = case.build().to(dtype)
    exact = copy.deepcopy(model).double()
    calls = [case.inputs(seed, dtype, model) for seed in range(10)]
    reference = torch.stack([outputs(exact, to_dtype(inputs, torch.float64)) for inputs in calls])
    eager = torch.stack([outputs(model, inputs) for inputs in calls])
    fastdiff.patch(model)
    ours = torch.stack([outputs(model, inputs) for inputs in calls])
    assert_no_further(ours, eager, reference)


@pytest.mark.smoke
@BY_NAME
def test_sites(case: Transformer) -> None:
    """The expected sites, all served by the CPU kernels; the rest left alone for the reason in the table."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    fastdiff.patch(model)
    assert narrower(model) == {}
    outputs(model, inputs)
    rows = fastdiff.report(model).rows
    left = [row for row in rows if row.backend == "stock"]
    assert Counter((row.cls, row.reason) for row in left) == case.left
    fused = [row for row in rows if row.backend != "stock"]
    assert Counter(row.cls for row in fused) == case.sites
    for row in fused:
        assert (row.backend, row.reason, row.fused) == ("cpu", "", True), row


#: The project's targets: what patching must remove of the launches on CUDA too, where a stock ``nn.RMSNorm`` is one.
TARGETS = {
    "Flux dev": 0.5, "Flux2": 0.6, "SD3.5 medium": 0.55, "SD3.5 large": 0.55, "Qwen-Image": 0.65, "Wan T2V": 0.55,
    "HunyuanVideo": 0.6, "Z-Image": 0.65, "DiT-XL/2": 0.25,
}  # fmt: skip


@BY_NAME
def test_launches(case: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real numbers of blocks, patching removes at least the stated shares of the launches."""
    model = case.build(deep=True)
    inputs = case.inputs(0, model=model)
    forward, within_norms = nn.RMSNorm.forward, 0

    def counting(self: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        nonlocal within_norms
        found: list[torch.Tensor] = []
        within_norms += count_launches(lambda: found.append(forward(self, x))).total() - 1
        return found[0]

    with monkeypatch.context() as patching:
        patching.setattr(nn.RMSNorm, "forward", counting)
        stock = count_launches(lambda: model(**inputs)).total()
    fastdiff.patch(model)
    fused = count_launches(lambda: model(**inputs)).total()
    assert fused <= (1 - case.saved) * stock, (fused, stock)
    on_cuda = stock - within_norms
    assert fused <= (1 - TARGETS.get(case.name, 0)) * on_cuda, (fused, on_cuda)


@pytest.mark.smoke
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


@BY_NAME
def test_published_sizes(case: Transformer) -> None:
    """The expected sites of the published model are patched on the meta device. In a forward of it in bf16, without
    memory, the CPU's kernels serve them all, and those for a GPU would take every call."""
    rows = fastdiff.report(fastdiff.patch(case.published())).rows
    stock = Counter((row.cls, row.reason) for row in rows if row.backend == "stock")
    assert stock.keys() == case.left.keys()
    assert {row.cls for row in rows if row.backend != "stock"} == case.sites.keys()
    with contracts() as refusals:
        try:
            with fake_tensors():
                rows = _rows_of_forward(case, case.loaded())
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not ALL:
                pytest.skip("its forward reads values of its inputs, and real tensors take long: FASTDIFF_TEST_ALL=1")
            refusals.clear()
            rows = _rows_of_forward(case, case.hollow())
    for row in rows:
        assert row.backend == "stock" or (row.backend, row.reason, row.fused) == ("cpu", "", True), row
    assert not any(refusals.values()), refusals
    ops = {op for op, _ in refusals}
    assert refusals.keys() == {(op, backend) for op in ops for backend in CONTRACTS} and "attention" in ops


def _rows_of_forward(case: Transformer, model: Any) -> Any:
    fastdiff.patch(model)
    outputs(model, case.inputs(0, torch.bfloat16, model))
    return fastdiff.report(model).rows


@pytest.mark.parametrize("name", ["Flux dev", "Flux2", "Chroma", "LongCat-Image", "Ovis-Image"])
def test_savings_are_bitwise(name: str) -> None:
    """Rotary tables of all axes at once, and Flux 2's activation of the time embedding, change no bit."""
    case = next(c for c in TRANSFORMERS if c.name == name)
    model = fastdiff.patch(case.build())
    inputs = case.inputs(0, model=model)
    found = patch_of(model)
    assert found is not None and "rotary tables of all axes at once" in found.savings
    ours, launches = outputs(model, inputs), count_launches(lambda: model(**inputs)).total()
    for change in reversed(found._changes):
        change.restore()
    assert torch.equal(outputs(model, inputs), ours)
    assert count_launches(lambda: model(**inputs)).total() > launches


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

"""The judge is tested too: it must reject kernels that are slightly wrong."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from numerics import Arguments, assert_numerics, assert_same_nonfinite, poison
from torch import Tensor

from fastdiff import _extension, backends
from fastdiff.ops import gelu_tanh

pytestmark = pytest.mark.kernel


def _arguments(dtype: torch.dtype) -> Any:
    def arguments(generator: torch.Generator) -> Arguments:
        return (torch.randn(64, 65, generator=generator).to(dtype),), {}

    return arguments


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The CPU kernel of gelu_tanh, replaced by the test's parameter."""
    kernels = [backends.Kernel("gelu_tanh", "cpu", request.param, lambda x: None)]
    monkeypatch.setitem(backends._kernels, "gelu_tanh", kernels)


def _twice_rounded(x: Tensor) -> Tensor:
    return (gelu_tanh.eager(x.double()).bfloat16() * 1.004).to(x.dtype)


def _one_element_left(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out.view(-1)[:-1] = gelu_tanh.eager(x).view(-1)[:-1]
    return out


@pytest.mark.parametrize("broken", [_twice_rounded, _one_element_left], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_kernel_is_rejected(broken: None, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        assert_numerics(gelu_tanh, _arguments(dtype))


@pytest.mark.parametrize("broken", [lambda x: torch.nan_to_num(gelu_tanh.eager(x))], indirect=True)
def test_lost_nan_is_rejected(broken: None) -> None:
    with pytest.raises(AssertionError, match="NaN"):
        assert_same_nonfinite(gelu_tanh, torch.tensor([1.0, float("nan")]))


def test_poison_reaches_fresh_outputs() -> None:
    x = torch.zeros(64, 65)
    poison((x,), {})
    assert torch.empty_like(x).isnan().any()


@pytest.mark.numerics
def test_the_instruction_set_is_the_one_asked_for() -> None:
    """Here the best; another one where test_instruction_sets.py runs this again."""
    best = _extension.cpu_isa()
    assert best == os.environ.get("FASTDIFF_CPU_ISA", best)

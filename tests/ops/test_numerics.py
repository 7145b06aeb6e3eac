"""The judge is tested too: it must reject kernels that are slightly wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import Arguments, assert_numerics, assert_same_nonfinite, lower_isas, poison, rerun_on
from torch import Tensor

from fastdiff import backends
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


@pytest.mark.parametrize("isa", lower_isas())
def test_rerun_uses_the_isa(isa: str, tmp_path: Any) -> None:
    test = tmp_path / "test_isa.py"
    test.write_text(
        "import pytest\nfrom fastdiff import _extension\n\n@pytest.mark.numerics\ndef test_isa():\n"
        f"    assert _extension.cpu_isa() == {isa!r}\n"
    )
    rerun_on(isa, str(test))

"""cfg_combine: classifier-free guidance, with and without rescaling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff.ops import cfg_combine

pytestmark = pytest.mark.kernel


def _pair(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], offset: float = 0) -> list[Tensor]:
    """The two halves of one batch, as a model returns them."""
    both = torch.randn(2 * shape[0], *shape[1:], generator=generator) + offset
    return list(both.to(dtype).chunk(2))


@pytest.mark.numerics
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(2, 4, 9, 13), (3, 4, 37, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype, shape: tuple[int, ...], rescale: float) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        return (*_pair(generator, dtype, shape), 7.5, rescale), {}

    assert_numerics(cfg_combine, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deviations_where_the_mean_is_large(dtype: torch.dtype) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        uncond, cond = _pair(generator, torch.float32, (2, 4, 33, 32))
        return ((uncond * 20 + 1e3).to(dtype), (cond * 20 + 1e3).to(dtype), 5.0, 1.0), {}

    assert_numerics(cfg_combine, arguments)


def test_eager_is_what_diffusers_computes() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    uncond, cond = _pair(torch.Generator().manual_seed(0), torch.float32, (2, 4, 9, 13))
    guided = uncond + 7.5 * (cond - uncond)
    assert torch.equal(cfg_combine.eager(uncond, cond, 7.5), guided)
    torch.testing.assert_close(cfg_combine.eager(uncond, cond, 7.5, 0.7), rescale_noise_cfg(guided, cond, 0.7))


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    numel=st.integers(2, 6000),
    scale=st.floats(-2, 15),
    rescale=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(batch: int, numel: int, scale: float, rescale: float, dtype: torch.dtype) -> None:
    uncond, cond = _pair(torch.Generator().manual_seed(numel), dtype, (batch, numel))
    ours = run_kernel(cfg_combine, uncond, cond, scale, rescale)
    exact = cfg_combine.eager(uncond.double(), cond.double(), scale, rescale)
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 4e-6 * exact.abs().max()
    assert ((ours.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (2, 0), (3, 4, 128, 128)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    uncond, cond = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(run_kernel(cfg_combine, uncond, cond, 3.0), cfg_combine.eager(uncond, cond, 3.0))


@pytest.mark.numerics
def test_nonfinite() -> None:
    uncond, cond = _pair(torch.Generator().manual_seed(0), torch.float32, (3, 4, 40))
    uncond[0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    cond[0, 1, 0] = -float("inf")
    cond[1] = 2.0
    uncond[1] = 2.0
    for rescale in (0.0, 0.5):
        assert_same_nonfinite(cfg_combine, uncond, cond, 7.5, rescale)


@pytest.mark.filterwarnings("ignore:std")
def test_one_element_has_no_deviation() -> None:
    assert_same_nonfinite(cfg_combine, torch.randn(2, 1), torch.randn(2, 1), 7.5, 0.5)


def test_falls_back_with_a_reason() -> None:
    uncond, cond = _pair(torch.Generator().manual_seed(0), torch.float32, (2, 4, 9, 13))
    assert "float64" in cfg_combine.choose(uncond.double(), cond.double(), 2.0).reason
    assert "not contiguous" in cfg_combine.choose(uncond.mT, cond.mT, 2.0).reason
    assert torch.equal(cfg_combine(uncond.mT, cond.mT, 2.0), cfg_combine.eager(uncond.mT, cond.mT, 2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in cfg_combine.choose(uncond, cond, 2.0).reason


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"uncond has shape \(2, 3\), cond \(2, 4\)"):
        cfg_combine(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)
    with pytest.raises(ValueError, match=r"uncond is torch\.float32 and cond torch\.float16"):
        cfg_combine(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16), 1.0)
    with pytest.raises(ValueError, match=r"guidance_rescale needs tensors"):
        cfg_combine(torch.zeros(3), torch.zeros(3), 1.0, 0.5)


def test_gradients() -> None:
    assert_gradients(cfg_combine, torch.randn(2, 3, 8), torch.randn(2, 3, 8), 5.0, 0.7)


def test_opcheck() -> None:
    torch.library.opcheck(cfg_combine.overload, (torch.randn(2, 3, 8), torch.randn(2, 3, 8), 5.0, 0.7))


def test_compile() -> None:
    assert_compiles(cfg_combine, torch.randn(2, 3, 8), torch.randn(2, 3, 8), 5.0, 0.7)

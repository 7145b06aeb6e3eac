"""rms_norm_silu: numbers of the kernels, layouts, fallbacks, contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    BACKEND,
    DTYPES,
    LAYOUTS,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff.ops import rms_norm_silu

pytestmark = pytest.mark.kernel


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    affine: torch.dtype | None = torch.float32,
    modulation: torch.dtype | None = None,
    size: float = 1.5,
    **options: Any,
) -> Callable[[torch.Generator], Arguments]:
    """Random arguments; ``affine`` and ``modulation`` are the dtypes of those parameters, None for absent."""
    batch, channels = shape[:2]

    def arguments(generator: torch.Generator) -> Arguments:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = LAYOUTS[layout]((random(*shape) * size + 0.3).to(dtype))
        kwargs = dict(options)
        if affine is not None:
            kwargs |= {"weight": random(channels).to(affine), "bias": random(channels).to(affine)}
        if modulation is not None:
            scale, shift = random(batch, 2 * channels).to(modulation).chunk(2, dim=1)
            kwargs |= {"scale": scale.view(batch, channels, *(1,) * (len(shape) - 2)), "shift": shift}
        return (x,), kwargs

    return arguments


def one(*args: Any, **kwargs: Any) -> Arguments:
    return case(*args, **kwargs)(torch.Generator().manual_seed(3))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestNumerics:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("clamp", [True, False])
    def test_layouts(self, dtype: torch.dtype, layout: str, clamp: bool) -> None:
        assert_numerics(rms_norm_silu, case((2, 40, 9, 11), dtype, layout=layout, clamp=clamp))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_modulated(self, dtype: torch.dtype, layout: str) -> None:
        for modulation in {torch.float32, dtype}:
            for affine in (None, dtype):
                arguments = case((2, 24, 5, 7), dtype, layout=layout, modulation=modulation, affine=affine)
                assert_numerics(rms_norm_silu, arguments)

    @pytest.mark.parametrize(
        "shape", [(3, 64), (2, 30, 37), (1, 7, 5, 3), (1, 12, 3, 5, 7), (1, 1100, 1, 2), (1, 4, 50, 52)], ids=str
    )
    @pytest.mark.parametrize("silu", [True, False])
    def test_shapes(self, dtype: torch.dtype, shape: tuple[int, ...], silu: bool) -> None:
        for layout in ("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",):
            assert_numerics(rms_norm_silu, case(shape, dtype, layout=layout, silu=silu))

    @pytest.mark.parametrize("clamp", [True, False])
    def test_small_values(self, dtype: torch.dtype, clamp: bool) -> None:
        """Where epsilon decides: pixels of all sizes around it, and zeros."""

        def arguments(generator: torch.Generator) -> Arguments:
            x = torch.randn(1, 16, 9, 9, generator=generator) * torch.logspace(-4, 0, 9)
            x[..., 0, :] = 0
            return (x.to(dtype),), {"eps": 3e-3, "clamp": clamp, "silu": False}

        assert_numerics(rms_norm_silu, arguments)


@pytest.mark.numerics
def test_most_channels() -> None:
    """As many as the CUDA kernel takes, in packs of half precision along the pixels: its most shared memory."""
    assert_numerics(rms_norm_silu, case((1, 4096, 2, 4), torch.float16, modulation=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_is_what_diffusers_computes(dtype: torch.dtype) -> None:
    """The norm of Wan's VAE; in half precision its own result is rounded more often."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    norm = WanRMS_norm(20, images=False, bias=True).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(2, 20, 3, 5, 7, generator=generator).to(dtype)
        ours = run_kernel(rms_norm_silu, x, norm.gamma.flatten(), norm.bias.flatten(), 1e-12, clamp=True)
        exact = F.silu(norm.double()(x.double()))
        assert (ours.double() - exact).norm() <= 2 * (exact.to(dtype).double() - exact).norm() + 1e-7 * exact.norm()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_call_agrees_with_fp64(data: st.DataObject) -> None:
    """Any shape, layout, dtype, size of values and choice of parameters."""
    dtype = data.draw(st.sampled_from(DTYPES))
    spatial = data.draw(st.lists(st.integers(1, 19), max_size=3))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)), *spatial)
    layouts = [name for name in LAYOUTS if len(shape) > 2 or name in ("contiguous", "sliced")]
    args, kwargs = one(
        shape,
        dtype,
        layout=data.draw(st.sampled_from(layouts)),
        affine=data.draw(st.sampled_from([None, *DTYPES])),
        modulation=data.draw(st.sampled_from([None, *DTYPES])),
        size=data.draw(st.sampled_from([1e-2, 1.0, 100.0])),
        silu=data.draw(st.booleans()),
        clamp=data.draw(st.booleans()),
        eps=data.draw(st.sampled_from([1e-12, 1e-8, 1e-3])),
    )
    got = run_kernel(rms_norm_silu, *args, **kwargs)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    exact = rms_norm_silu.eager(args[0].double(), **double)
    assert got.shape == exact.shape and got.dtype == dtype
    # fp32 arithmetic inside, relative to the terms that are added; then half a unit in the last place of the output,
    # with the twentieth of it that the kernels' SiLU allows itself.
    allowed = 2e-6 * exact.abs().max()
    if dtype != torch.float32:
        allowed = allowed + 0.525 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * 1e-3
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_agree(layout: str) -> None:
    """Every pixel is one thread's: the same bits."""
    args, kwargs = one((1, 24, 61, 67), torch.float32, layout=layout, modulation=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run_kernel(rms_norm_silu, *args, **kwargs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 8, 5, 6), (2, 8, 2, 5, 6)], ids=str)
def test_memory_format_follows_x(shape: tuple[int, ...]) -> None:
    for layout, change in LAYOUTS.items():
        x = change(torch.randn(shape))
        expected = change(x) if layout == "channels_last" else x.contiguous()
        for y in (run_kernel(rms_norm_silu, x), rms_norm_silu.eager(x)):
            assert y.stride() == expected.stride()


@pytest.mark.numerics
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("clamp", [True, False])
def test_nonfinite_spoils_its_pixel_only(value: float, layout: str, clamp: bool) -> None:
    (x,), kwargs = one((2, 16, 9, 9), torch.float32, clamp=clamp)
    x[1, 5, 3, 4] = value
    x = LAYOUTS[layout](x)
    assert_same_nonfinite(rms_norm_silu, x, **kwargs)
    finite = run_kernel(rms_norm_silu, x, **kwargs).isfinite().all(dim=1)
    assert finite.sum() == finite.numel() - 1 and not finite[1, 3, 4]


def test_zeros_and_zero_size() -> None:
    for clamp in (True, False):
        y = run_kernel(rms_norm_silu, torch.zeros(1, 4, 8, 8), bias=torch.ones(4), silu=False, clamp=clamp)
        assert torch.equal(y, torch.ones_like(y))
    for shape in [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 0)]:
        assert run_kernel(rms_norm_silu, torch.randn(shape)).shape == shape


def test_falls_back_with_a_reason() -> None:
    x = torch.randn(2, 8, 4, 4)
    weight = torch.ones(8, requires_grad=True)
    assert rms_norm_silu.choose(x).backend == BACKEND
    assert "float64" in rms_norm_silu.choose(x.double()).reason
    assert "gradient" in rms_norm_silu.choose(x, weight).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in rms_norm_silu.choose(x).reason


def test_gradients() -> None:
    (x,), kwargs = one((2, 8, 4, 5), torch.float32, modulation=torch.float32)
    assert_gradients(rms_norm_silu, x, **kwargs)
    assert_gradients(rms_norm_silu, x, **kwargs, clamp=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    args, kwargs = one((2, 8, 4, 5), torch.bfloat16, layout=layout, modulation=torch.float32)
    torch.library.opcheck(rms_norm_silu.overload, args, kwargs)


def test_compiles() -> None:
    for layout in ("contiguous", "channels_last"):
        args, kwargs = one((2, 8, 4, 5), torch.float32, layout=layout, modulation=torch.float32)
        assert_compiles(rms_norm_silu, *args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(8),), {}, "1 dimensions"),
        ((torch.ones(1, 0, 2),), {}, "no channels"),
        ((torch.ones(1, 8, 2).long(),), {}, "x is int64, expected floating point"),
        ((torch.ones(1, 8, 2), torch.ones(7)), {}, r"weight has shape \(7,\); expected \(8,\)"),
        ((torch.ones(1, 8, 2), None, torch.ones(1, 8)), {}, r"bias has shape \(1, 8\); expected \(8,\)"),
        ((torch.ones(2, 8, 2, 2),), {"scale": torch.ones(2, 8, 2, 1)}, "scale has shape"),
        ((torch.ones(2, 8, 2, 2),), {"shift": torch.ones(2, 8, 1)}, "shift has shape"),
    ],
)
def test_bad_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm_silu: .*{message}"):
        rms_norm_silu(*args, **kwargs)


def test_overload_checks_what_it_reads() -> None:
    """A compiled graph calls the overload without the op's own checks."""
    with pytest.raises(RuntimeError, match=r"fastdiff: rms_norm_silu takes weight \(C,\)"):
        rms_norm_silu.overload(torch.randn(2, 8, 3), torch.ones(2))

"""group_norm_silu: numbers of the kernels, layouts, fallbacks, contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    run_kernel,
)
from torch import Tensor

from fastdiff import use_backend
from fastdiff.ops import group_norm_silu

#: Pixels of an image that takes many tiles, or parts, of every kernel.
LARGE = (40, 41) if INTERPRETED else (100, 100)


def case(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    affine: torch.dtype | None = torch.float32,
    modulation: torch.dtype | None = None,
    offset: float = 0.0,
    **options: Any,
) -> Callable[[torch.Generator], Arguments]:
    """Random arguments; ``affine`` and ``modulation`` are the dtypes of those parameters, None for absent."""
    batch, channels = shape[:2]

    def arguments(generator: torch.Generator) -> Arguments:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = LAYOUTS[layout]((random(*shape) * 1.5 + offset).to(dtype))
        kwargs = dict(options)
        if affine is not None:
            kwargs |= {"weight": random(channels).to(affine), "bias": random(channels).to(affine)}
        if modulation is not None:
            scale, shift = random(batch, 2 * channels).to(modulation).chunk(2, dim=1)
            temb = random(batch, channels, *(1,) * (len(shape) - 2)).to(modulation)
            kwargs |= {"temb": temb, "scale": scale, "shift": shift}
        return (x, groups), kwargs

    return arguments


def one(*args: Any, **kwargs: Any) -> Arguments:
    return case(*args, **kwargs)(torch.Generator().manual_seed(3))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestNumerics:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("silu", [True, False])
    def test_layouts(self, dtype: torch.dtype, layout: str, silu: bool) -> None:
        assert_numerics(group_norm_silu, case((2, 40, 9, 11), 8, dtype, layout=layout, silu=silu))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_modulated(self, dtype: torch.dtype, layout: str) -> None:
        for modulation in {torch.float32, dtype}:
            arguments = case((2, 40, 9, 11), 8, dtype, layout=layout, modulation=modulation)
            assert_numerics(group_norm_silu, arguments)

    @pytest.mark.parametrize(
        ("shape", "groups"),
        [
            ((3, 64), 8),
            ((2, 30, 37), 5),
            ((1, 7, 5, 3), 7),
            ((2, 17, 6, 6), 1),
            ((1, 12, 3, 5, 7), 4),
            ((1, 160, 1, 2), 2),
            ((1, 4, *LARGE), 2),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
    def test_shapes(self, dtype: torch.dtype, shape: tuple[int, ...], groups: int, layout: str) -> None:
        if layout == "tokens":
            assert_numerics(group_norm_silu, case(shape, groups, dtype, tokens=True, modulation=torch.float32))
        elif len(shape) > 2:
            assert_numerics(group_norm_silu, case(shape, groups, dtype, layout=layout))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
    @pytest.mark.parametrize("offset", [1e3, -1e4])
    def test_large_means(self, dtype: torch.dtype, layout: str, offset: float) -> None:
        tokens = layout == "tokens"
        layout = "contiguous" if tokens else layout
        for modulation in (None, torch.float32):
            arguments = case(
                (1, 24, 16, 17), 4, dtype, layout=layout, offset=offset, modulation=modulation, tokens=tokens
            )
            assert_numerics(group_norm_silu, arguments)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_outliers_first(self, dtype: torch.dtype, layout: str) -> None:
        """The values the statistics are centred on at first are not like the others."""

        def arguments(generator: torch.Generator) -> Arguments:
            x = torch.randn(1, 4, *LARGE, generator=generator)
            x[:, :, 0] += 300
            return (LAYOUTS[layout](x.to(dtype)), 2), {"silu": False}

        assert_numerics(group_norm_silu, arguments)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens"])
    @pytest.mark.parametrize(
        ("channels", "groups", "pixels"),
        [(2560, 1, (3,)), (2056, 1, (2, 4)), (2056, 2, (2, 4)), (2062, 2, (3,))],
        ids=str,
    )
    def test_groups_of_many_channels(
        self, dtype: torch.dtype, layout: str, channels: int, groups: int, pixels: tuple[int, ...]
    ) -> None:
        """More than a block has threads: in whole packs, and not; with the pixels split too, and not."""
        tokens = layout == "tokens"
        layout = "contiguous" if tokens else layout
        options = {"layout": layout, "modulation": dtype, "tokens": tokens, "offset": 20}
        assert_numerics(group_norm_silu, case((1, channels, *pixels), groups, dtype, **options))

    def test_no_affine(self, dtype: torch.dtype) -> None:
        assert_numerics(group_norm_silu, case((2, 16, 5, 5), 4, dtype, affine=None))


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_agree(layout: str) -> None:
    """One thread measures and maps slice by slice, several split the pixels: same result to rounding."""
    args, kwargs = one((1, 24, 61, 67), 2, torch.float32, layout=layout, modulation=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [run_kernel(group_norm_silu, *args, **kwargs, tokens=tokens) for tokens in (False, True)]
        torch.set_num_threads(5)
        several = [run_kernel(group_norm_silu, *args, **kwargs, tokens=tokens) for tokens in (False, True)]
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(single, several, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.kernel
def test_tokens_are_the_transposed_result() -> None:
    for layout in LAYOUTS:
        args, kwargs = one((2, 40, 9, 11), 8, torch.bfloat16, layout=layout)
        plain = run_kernel(group_norm_silu, *args, **kwargs)
        tokens = run_kernel(group_norm_silu, *args, **kwargs, tokens=True)
        assert tokens.is_contiguous()
        assert torch.equal(tokens, plain.flatten(2).transpose(1, 2))


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 8, 5, 6), (2, 8, 2, 5, 6)], ids=str)
def test_memory_format_follows_x(shape: tuple[int, ...]) -> None:
    for layout, change in LAYOUTS.items():
        x = change(torch.randn(shape))
        expected = change(x) if layout == "channels_last" else x.contiguous()
        for y in (run_kernel(group_norm_silu, x, 4), group_norm_silu.eager(x, 4)):
            assert y.stride() == expected.stride()


@pytest.mark.numerics
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_spoils_its_group_only(value: float, layout: str, dtype: torch.dtype) -> None:
    (x, groups), kwargs = one((2, 16, 9, 9), 4, dtype)
    x[1, 5, 3, 4] = value
    x = LAYOUTS[layout](x)
    assert_same_nonfinite(group_norm_silu, x, groups, **kwargs)
    finite = run_kernel(group_norm_silu, x, groups, **kwargs).isfinite().all(dim=(2, 3))
    assert finite.sum() == 2 * 16 - 4 and not finite[1, 4:8].any()


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_far_out(dtype: torch.dtype) -> None:
    """Beyond the range of exp, SiLU is 0 or x, never NaN."""
    x = torch.randn(1, 2, 4, 4).to(dtype)
    bias = torch.tensor([-1e4, 1e4], dtype=dtype)
    y = run_kernel(group_norm_silu, x, 2, None, bias)
    for far in (3e38, float("inf")):
        top = run_kernel(group_norm_silu, x.float(), 2, None, torch.full((2,), far))
        assert (top == far).all()
    assert torch.equal(y[:, 0], torch.zeros(1, 4, 4, dtype=dtype))
    assert (y[:, 1].float() > 9e3).all()


@pytest.mark.kernel
def test_constant_group_and_zero_size() -> None:
    y = run_kernel(group_norm_silu, torch.full((1, 4, 8, 8), 3.0), 2, bias=torch.ones(4), silu=False)
    torch.testing.assert_close(y, torch.ones_like(y))
    for shape in [(0, 8, 4, 4), (2, 8, 0, 4), (2, 8, 0)]:
        assert run_kernel(group_norm_silu, torch.randn(shape), 4).shape == shape
        spatial = torch.Size(shape[2:]).numel()
        tokens = run_kernel(group_norm_silu, torch.randn(shape), 4, tokens=True)
        assert tokens.shape == (shape[0], spatial, 8)


@pytest.mark.kernel
def test_falls_back_with_a_reason() -> None:
    x = torch.randn(2, 8, 4, 4)
    weight = torch.ones(8, requires_grad=True)
    assert group_norm_silu.choose(x, 4).backend == "cpu"
    assert "float64" in group_norm_silu.choose(x.double(), 4).reason
    assert "gradient" in group_norm_silu.choose(x, 4, weight).reason
    with torch.no_grad():
        assert group_norm_silu.choose(x, 4, weight).backend == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in group_norm_silu.choose(x, 4).reason
    with use_backend("eager"):
        assert group_norm_silu.choose(x, 4).backend == "eager"
    torch.testing.assert_close(
        group_norm_silu(x.double(), 4),
        torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 4)),
    )


@pytest.mark.kernel
def test_gradients() -> None:
    (x, groups), kwargs = one((2, 8, 4, 5), 4, torch.float32, modulation=torch.float32)
    assert_gradients(group_norm_silu, x, groups, **kwargs)
    assert_gradients(group_norm_silu, x, groups, **kwargs, tokens=True)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [False, True])
def test_opcheck(layout: str, tokens: bool) -> None:
    args, kwargs = one((2, 8, 4, 5), 4, torch.bfloat16, layout=layout, modulation=torch.float32, tokens=tokens)
    torch.library.opcheck(group_norm_silu.overload, args, kwargs)


@pytest.mark.kernel
def test_compiles() -> None:
    for layout in ("contiguous", "channels_last"):
        args, kwargs = one((2, 8, 4, 5), 4, torch.float32, layout=layout, modulation=torch.float32)
        assert_compiles(group_norm_silu, *args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(8), 4), {}, "1 dimensions"),
        ((torch.ones(1, 8, 2), 3), {}, "do not divide"),
        ((torch.ones(1, 8, 2), 0), {}, "do not divide"),
        ((torch.ones(1, 8, 2), 4, torch.ones(7)), {}, r"weight has shape \(7,\); expected \(8,\)"),
        ((torch.ones(2, 8, 2), 4), {"temb": torch.ones(1, 8)}, "temb has shape"),
        ((torch.ones(2, 8, 2, 2), 4), {"scale": torch.ones(2, 8, 2, 1)}, "scale has shape"),
        ((torch.ones(2, 8, 2, 2), 4), {"shift": torch.ones(2, 8, 1)}, "shift has shape"),
    ],
)
def test_bad_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(*args, **kwargs)


@pytest.mark.kernel
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_call_agrees_with_fp64(data: st.DataObject) -> None:
    """Any shape, layout, dtype, group count, mean and choice of parameters."""
    dtype = data.draw(st.sampled_from(DTYPES))
    groups = data.draw(st.integers(1, 6))
    spatial = data.draw(st.lists(st.integers(1, 19), max_size=3))
    shape = (data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 21)), *spatial)
    layouts = [name for name in LAYOUTS if len(shape) > 2 or name in ("contiguous", "sliced")]
    args, kwargs = one(
        shape,
        groups,
        dtype,
        layout=data.draw(st.sampled_from(layouts)),
        affine=data.draw(st.sampled_from([None, *DTYPES])),
        modulation=data.draw(st.sampled_from([None, *DTYPES])),
        offset=data.draw(st.sampled_from([0.0, -30.0, 1e3])),
        silu=data.draw(st.booleans()),
        tokens=data.draw(st.booleans()),
    )
    got = run_kernel(group_norm_silu, *args, **kwargs)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    exact = group_norm_silu.eager(args[0].double(), groups, **double)
    assert got.shape == exact.shape and got.dtype == dtype
    # fp32 arithmetic inside, relative to the terms that are added; then half a unit in the last place of the
    # output, with the twentieth of it that silu_for allows itself.
    allowed = 2e-6 * exact.abs().max()
    if dtype != torch.float32:
        allowed = allowed + 0.525 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * 1e-3
    assert ((got.double() - exact).abs() <= allowed).all()

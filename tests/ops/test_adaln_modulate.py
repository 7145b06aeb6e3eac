"""adaln_modulate: LayerNorm or RMSNorm with adaptive modulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation import LAYOUTS, assert_close_to_exact, modulations, rows
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

from fastdiff.ops import adaln_modulate

pytestmark = pytest.mark.kernel

SHAPE = (2, 9, 77)  # neither a multiple of a register nor of four


def _sample(dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return rows(generator, *shape, dtype=dtype), *modulations(generator, "sample", 2, shape, dtype)


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype, layout: str, rms: bool) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        scale, shift = modulations(generator, layout, 2, SHAPE, dtype)
        return (rows(generator, *SHAPE, dtype=dtype), scale, shift), {"rms": rms}

    assert_numerics(adaln_modulate, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("given_", ["nothing", "weight", "bias", "both", "both and modulation", "scale", "shift"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_and_partial_modulation(dtype: torch.dtype, given_: str, rms: bool) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        scale, shift = modulations(generator, "sample", 2, SHAPE, dtype)
        weight, bias = (torch.randn(SHAPE[-1], generator=generator) for _ in range(2))
        keywords: dict[str, dict[str, Any]] = {
            "nothing": {},
            "weight": {"weight": weight},
            "bias": {"bias": bias.to(torch.bfloat16)},
            "both": {"weight": weight, "bias": bias},
            "both and modulation": {"weight": weight, "bias": bias, "scale": scale, "shift": shift},
            "scale": {"scale": scale},
            "shift": {"shift": shift},
        }
        return (rows(generator, *SHAPE, dtype=dtype),), {"rms": rms, **keywords[given_]}

    assert_numerics(adaln_modulate, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_means(dtype: torch.dtype, offset: float) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        # A spread that bf16 can still show on top of the offset.
        x = (rows(generator, 2, 9, 1152, dtype=torch.float32) * offset / 50 + offset).to(dtype)
        return (x, *modulations(generator, "sample", 2, (2, 9, 1152), dtype)), {}

    assert_numerics(adaln_modulate, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("columns", [8192, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_values_far_from_the_mean(dtype: torch.dtype, columns: int) -> None:
    """The kernel centres a row on its first values, which is right only where they are near the mean."""

    def arguments(generator: torch.Generator) -> Arguments:
        x = rows(generator, 2, 3, columns, dtype=torch.float32)
        x[..., :64] += 1e4
        return (x.to(dtype), *modulations(generator, "sample", 2, (2, 3, columns), dtype)), {}

    assert_numerics(adaln_modulate, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("columns", [8193, 12288])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_longer_than_the_registers(dtype: torch.dtype, columns: int, rms: bool) -> None:
    """Of whole packs and not, and with means that are large beside the deviations."""
    shape = (1, 1, columns)

    def arguments(generator: torch.Generator) -> Arguments:
        scale, shift = modulations(generator, "token", 2, shape, dtype)
        weight, bias = torch.randn(2, columns, generator=generator)
        x = rows(generator, *shape, dtype=dtype, offset=300)
        return (x, scale, shift, weight, bias), {"rms": rms}

    assert_numerics(adaln_modulate, arguments)


@pytest.mark.numerics
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype_and_modulation_of_another_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    def arguments(generator: torch.Generator) -> Arguments:
        modulation = modulations(generator, "token", 2, SHAPE, torch.float32)
        return (rows(generator, *SHAPE, dtype=dtype), *modulation), {"out_dtype": out_dtype}

    assert_numerics(adaln_modulate, arguments)
    args, kwargs = arguments(torch.Generator())
    assert run_kernel(adaln_modulate, *args, **kwargs).dtype == out_dtype


def test_eager_is_what_diffusers_computes() -> None:
    x, scale, shift = _sample(torch.bfloat16)
    stock = F.layer_norm(x, (SHAPE[-1],), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert torch.equal(adaln_modulate.eager(x, scale, shift), stock)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 64, 65, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_lengths(dtype: torch.dtype, columns: int) -> None:
    assert_close_to_exact(adaln_modulate, *_sample(dtype, (2, 3, columns)))


@pytest.mark.parametrize("shape", [(7, 77), (77,), (2, 3, 4, 77), (2, 3, 2, 2, 77), (0, 5, 77), (2, 0, 77), (2, 3, 0)])
def test_ranks_and_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert_close_to_exact(adaln_modulate, x, torch.randn(shape[-1:]), torch.randn(shape))
    if len(shape) > 2:
        assert_close_to_exact(adaln_modulate, x, torch.randn(shape[0], shape[-1]), torch.randn(1, 1, shape[-1]))


def test_strided_rows() -> None:
    x = torch.randn(2, 77, 9, 40).permute(0, 2, 1, 3)[:, ::2, 1:]
    middle = torch.randn(2, 5, 1, 40)
    assert_close_to_exact(adaln_modulate, x, middle, torch.randn(2, 80).chunk(2, 1)[1])
    assert run_kernel(adaln_modulate, x).is_contiguous()


@pytest.mark.numerics
@pytest.mark.parametrize("columns", [77, 8200])
def test_nonfinite(columns: int) -> None:
    x, scale, shift = _sample(shape=(2, 3, columns))
    x[0, 1, 3], x[0, 2, 5], x[1, 1, 7] = float("nan"), float("inf"), -float("inf")
    shift[1, 0], scale[1, 1] = float("inf"), float("nan")
    for rms in (False, True):
        assert_same_nonfinite(adaln_modulate, x, scale, shift, rms=rms)
    constant = torch.full((2, 4, 64), 3.0)
    assert_same_nonfinite(adaln_modulate, constant, eps=0.0)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    columns = data.draw(st.integers(1, 200))
    dtype, other = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    shape = (batch, tokens, columns)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = rows(generator, *shape, dtype=dtype, offset=data.draw(st.sampled_from([0.0, 8.0])))
    x = x[:, :: data.draw(st.integers(1, 3))]
    shape = tuple(x.shape)
    scale, shift = modulations(generator, data.draw(st.sampled_from(LAYOUTS)), 2, shape, other)
    assert_close_to_exact(adaln_modulate, x, scale, shift, rms=data.draw(st.booleans()), eps=1e-5)


def test_falls_back_with_a_reason() -> None:
    x, scale, shift = _sample()
    cases = {
        "float64": (x.double(), scale.double(), shift.double()),
        "last axis": (x.mT.contiguous().mT, scale, shift),
        "more than 5": (x[None, None, None], None, shift[0]),
    }
    for reason, arguments in cases.items():
        choice = adaln_modulate.choose(*arguments)
        assert choice.backend == "eager"
        assert reason in choice.reason
        torch.testing.assert_close(adaln_modulate(*arguments), adaln_modulate.eager(*arguments))
    assert "out_dtype is float64" in adaln_modulate.choose(x, out_dtype=torch.float64).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in adaln_modulate.choose(x, scale, shift).reason


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"scale": torch.zeros(3, 77)}, r"scale has shape \(3, 77\)"),
        ({"shift": torch.zeros(2, 4, 77)}, r"shift has shape \(2, 4, 77\)"),
        ({"shift": torch.zeros(2, 1)}, r"shift has shape \(2, 1\)"),
        ({"scale": torch.zeros(2, 2, 9, 77)}, "scale has shape"),
        ({"weight": torch.zeros(2, 77)}, r"weight has shape \(2, 77\), expected \(77,\)"),
        ({"bias": torch.zeros(76)}, r"bias has shape \(76,\)"),
        ({"out_dtype": torch.int32}, "out_dtype"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaln_modulate(torch.zeros(SHAPE), **keywords)
    with pytest.raises(ValueError, match="int64"):
        adaln_modulate(torch.zeros(SHAPE, dtype=torch.int64))


def test_gradients() -> None:
    x, scale, shift = _sample()
    assert_gradients(adaln_modulate, x, scale, shift, torch.randn(SHAPE[-1]), torch.randn(SHAPE[-1]))
    assert_gradients(adaln_modulate, x, scale, rms=True)


def test_opcheck() -> None:
    x, scale, shift = _sample()
    torch.library.opcheck(adaln_modulate.overload, (x, scale, shift))
    torch.library.opcheck(adaln_modulate.overload, (x,), {"rms": True, "out_dtype": torch.bfloat16})


def test_compile() -> None:
    x, scale, shift = _sample(torch.bfloat16)
    assert_compiles(adaln_modulate, x, scale, shift)

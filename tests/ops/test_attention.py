"""attention: numbers of the kernels, layouts, masks, log-sum-exp, fallbacks, contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    BACKEND,
    DTYPES,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    numerics_on_gpus,
    run_kernel,
)
from torch import Tensor

from fastdiff import use_backend
from fastdiff.ops import attention

LAYOUTS = ("projections", "heads first", "fused projection")
MASKS = ("bool", "bool per key", "additive", "additive fp32, 2 axes", "additive per head", "causal")


def tensors(
    layout: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, random: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (batch, sequence, heads, depth), laid out as different callers hold them."""
    batch, queries, keys, heads, depth = sizes
    if layout == "heads first":
        shapes = [(batch, heads, n, depth) for n in (queries, keys, keys)]
        q, k, v = (random(*shape).to(dtype).transpose(1, 2) for shape in shapes)
    elif layout == "fused projection":
        kv = random(batch, keys, 2 * heads * depth + 3).to(dtype)[..., 1:-2]
        k, v = (t.unflatten(-1, (heads, depth)) for t in kv.chunk(2, dim=-1))
        q = random(batch, queries, heads * depth + 5).to(dtype)[..., 5:].unflatten(-1, (heads, depth))
    else:
        lengths = (queries, keys, keys)
        q, k, v = (random(batch, n, heads * depth).to(dtype).unflatten(-1, (heads, depth)) for n in lengths)
    return q, k, v


def mask(kind: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, random: Callable[..., Tensor]) -> Tensor:
    """A mask that leaves key 0 to every query."""
    batch, queries, keys, heads, _ = sizes
    if kind.startswith("bool"):
        shape = (batch, 1, 1, keys) if "per key" in kind else (batch, 1, queries, keys)
        result = random(*shape) > 0.5
        result[..., 0] = True
        return result
    if kind == "additive per head":
        return random(1, heads, queries, keys).to(dtype)
    if kind == "additive fp32, 2 axes":
        return random(queries, keys)
    return random(batch, heads, queries, keys).to(dtype)


def case(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    layout: str = "projections",
    mask_kind: str | None = None,
    sharpness: float = 1.5,
    offset: float = 0.0,
    **options: Any,
) -> Callable[[torch.Generator], Arguments]:
    """Random arguments; ``sizes`` is (batch, queries, keys, heads, depth), ``offset`` the mean of v."""

    def arguments(generator: torch.Generator) -> Arguments:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        q, k, v = tensors(layout, sizes, dtype, random)
        kwargs = {"return_lse": True} | options
        if mask_kind == "causal":
            kwargs["is_causal"] = True
        elif mask_kind is not None:
            kwargs["attn_mask"] = mask(mask_kind, sizes, dtype, random)
        return (q * sharpness, k, v + offset), kwargs

    return arguments


def one(*args: Any, **kwargs: Any) -> Arguments:
    return case(*args, **kwargs)(torch.Generator().manual_seed(3))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestNumerics:
    @pytest.mark.parametrize(
        "sizes",
        [
            (2, 200, 77, 2, 40),  # one block of keys; three tiles of queries and a part
            (1, 130, 300, 2, 72),
            (1, 70, 1000, 2, 80),  # several blocks
            (1, 48, 2500, 1, 128),  # blocks that do not stay packed
            (1, 40, 500, 1, 160),
            (1, 40, 500, 1, 256),
            (3, 65, 64, 4, 16),
            (2, 33, 31, 3, 33),  # odd depth
            (5, 17, 5, 2, 7),
            (2, 100, 1, 2, 24),  # the only key counts exactly 1
            (2, 13, 300, 2, 64),  # few queries
            (3, 1, 70, 3, 88),
            (1, 16, 20, 1, 256),
            *([(1, 70, 50, 1, 512)] if BACKEND != "cpu" else []),  # the CPU's leaves it to torch
        ],
        ids=str,
    )
    def test_shapes(self, dtype: torch.dtype, sizes: tuple[int, int, int, int, int]) -> None:
        assert_numerics(attention, case(sizes, dtype), rule="eager")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, dtype: torch.dtype, layout: str) -> None:
        assert_numerics(attention, case((2, 70, 90, 3, 40), dtype, layout=layout), rule="eager")

    @pytest.mark.parametrize("keys", [77, 700])
    @pytest.mark.parametrize("kind", MASKS)
    def test_masks(self, dtype: torch.dtype, kind: str, keys: int) -> None:
        assert_numerics(attention, case((2, 70, keys, 2, 40), dtype, mask_kind=kind), rule="eager")

    @pytest.mark.parametrize("queries", [150, 400])
    def test_causal(self, dtype: torch.dtype, queries: int) -> None:
        assert_numerics(attention, case((1, queries, 300, 1, 40), dtype, mask_kind="causal"), rule="eager")

    def test_sharp(self, dtype: torch.dtype) -> None:
        """A few keys carry all the weight, and the running maximum changes often."""
        assert_numerics(attention, case((1, 100, 900, 2, 64), dtype, sharpness=8), rule="eager")

    def test_offset_values(self, dtype: torch.dtype) -> None:
        assert_numerics(attention, case((1, 100, 600, 2, 40), dtype, offset=100.0), rule="eager")

    def test_scale(self, dtype: torch.dtype) -> None:
        assert_numerics(attention, case((1, 100, 600, 2, 40), dtype, scale=0.05), rule="eager")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_agree(dtype: torch.dtype) -> None:
    args, kwargs = one((2, 300, 700, 2, 40), dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run_kernel(attention, *args, **kwargs)
        torch.set_num_threads(5)
        several = run_kernel(attention, *args, **kwargs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(single, several, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result(dtype: torch.dtype) -> None:
    """A call gives a tensor, or the pair on request; the overload gives the pair in any case."""
    args, _ = one((2, 70, 90, 3, 40), dtype, layout="heads first")
    with use_backend("cpu", strict=True):
        out = attention(*args)
        pair = attention(*args, return_lse=True)
    assert isinstance(out, Tensor) and out.is_contiguous() and out.dtype == dtype and out.shape == (2, 70, 3, 40)
    assert pair[1].shape == (2, 70, 3) and pair[1].dtype == torch.float32 and pair[1].is_contiguous()
    # The exponentials are computed more finely for the log-sum-exp: at most a weight in a hundred rounds differently.
    torch.testing.assert_close(pair[0], out, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    empty = torch.ops.fastdiff.attention(*args)[1]
    assert empty.shape == (0,) and empty.dtype == torch.float32


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [50, 700])
def test_fully_masked(dtype: torch.dtype, keys: int) -> None:
    (q, k, v), _ = one((1, 80, keys, 2, 16), dtype)
    attend = torch.rand(1, 1, 80, keys) > 0.5
    attend[:, :, 7] = False
    attend[..., 64:, : keys // 2] = False  # the first blocks are masked, later ones are not
    additive = torch.zeros(attend.shape).masked_fill(~attend, -torch.inf)
    for m in (attend, additive, additive.to(dtype)):
        out, lse = run_kernel(attention, q, k, v, m, return_lse=True)
        assert (out[:, 7] == 0).all() and (lse[:, 7] == -torch.inf).all()
        assert torch.isfinite(out).all() and torch.isfinite(lse[:, 8:]).all()
        expected = attention.eager(q, k, v, m)[0]
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_key", [False, True])
def test_masks_of_the_lowest_float(dtype: torch.dtype, per_key: bool) -> None:
    """They hide keys as -inf does, except from a query all of whose keys are hidden: it attends to all."""
    (q, k, v), _ = one((1, 20, 50, 2, 16), dtype)
    lowest = torch.finfo(dtype).min
    m = torch.zeros(1, 1, 1 if per_key else 20, 50, dtype=dtype)
    m[..., 30:] = lowest
    m[..., 0, :] = lowest
    out = run_kernel(attention, q, k, v, m)[0]
    torch.testing.assert_close(out, attention.eager(q, k, v, m)[0], rtol=0.02, atol=0.02)
    if dtype != torch.float16:  # whose lowest value does not absorb the logits
        torch.testing.assert_close(out[:, 0], v.double().mean(1).to(dtype), rtol=0.02, atol=0.02)
    if not per_key:
        torch.testing.assert_close(out[:, 1:], run_kernel(attention, q[:, 1:], k[:, :30], v[:, :30])[0])


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nonfinite(dtype: torch.dtype, value: float, which: int) -> None:
    for queries, keys in ((80, 50), (80, 700), (5, 50)):
        args, _ = one((1, queries, keys, 2, 16), dtype)
        args[which][0, 3, 1, 5] = value
        out, lse = run_kernel(attention, *args, return_lse=True)
        # In fp32: on half precision torch's softmax turns some NaN into zeros, depending on the number of keys.
        expected, expected_lse = attention.eager(*(t.float() for t in args), return_lse=True)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        if value != value:  # with infinite logits ours may be NaN
            assert torch.equal(lse.isnan(), expected_lse.isnan())


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    """A softmax of logits in the billions is one-hot, as in eager, with no NaN and no row of zeros."""
    q, k, v = (torch.randn(1, 40, 1, 64) for _ in range(3))
    scale = 1e5 if dtype is not torch.float16 else 1e4
    q, k, v = (q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)
    out = run_kernel(attention, q, k, v)[0]
    torch.testing.assert_close(out, attention.eager(q.double(), k.double(), v.double())[0].to(dtype))


@numerics_on_gpus("on a CPU masks are contiguous along the keys")
@pytest.mark.parametrize("sizes", [(2, 70, 90, 2, 40), (2, 3, 300, 2, 64)], ids=["queries", "few queries"])
@pytest.mark.parametrize("kind", ["bool", "additive", "bool, strided", "additive, strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_not_contiguous_along_the_keys(dtype: torch.dtype, kind: str, sizes: tuple[int, ...]) -> None:
    """Broadcast along them, or strided: bit for bit what the same mask gives when it is contiguous."""
    batch, queries, keys, heads, _ = sizes
    args, kwargs = one(sizes, dtype)
    shape = (batch, heads, keys, queries) if "strided" in kind else (batch, 1, 1, queries)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).transpose(-1, -2)
    mask = values > 0 if "bool" in kind else 3 * values.to(dtype)
    assert mask.stride(-1) != 1
    whole = mask.expand(batch, heads, queries, keys).contiguous()
    for got, want in zip(
        run_kernel(attention, *args, mask, **kwargs), run_kernel(attention, *args, whole, **kwargs), strict=True
    ):
        assert torch.equal(got, want)
    assert not torch.equal(want, run_kernel(attention, *args, **kwargs)[1])  # the mask counts


@pytest.mark.numerics
def test_mask_of_nan_with_all_bits_set() -> None:
    (q, k, v), _ = one((1, 6, 5, 2, 8), torch.bfloat16)
    mask = torch.full((6, 5), -1, dtype=torch.int32).view(torch.float32)
    assert run_kernel(attention, q, k, v, mask)[0].isnan().all()


@pytest.mark.kernel
def test_empty() -> None:
    for sizes in ((0, 5, 5, 2, 8), (2, 0, 5, 2, 8), (2, 5, 5, 0, 8)):
        (q, k, v), _ = one(sizes, torch.float32)
        out, lse = run_kernel(attention, q, k, v, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3]


def _fallbacks() -> dict[str, tuple[Callable[[], Arguments], str]]:
    def arguments(**changes: Any) -> Callable[[], Arguments]:
        def make() -> Arguments:
            (q, k, v), _ = one((1, 6, 5, 2, 8), torch.float32)
            named = {"q": q, "k": k, "v": v}
            kwargs = {}
            for name, change in changes.items():
                if name in named:
                    named[name] = change(named[name])
                else:
                    kwargs[name] = change
            return tuple(named.values()), kwargs

        return make

    return {
        "float64": (arguments(q=Tensor.double, k=Tensor.double, v=Tensor.double), "float64"),
        "gradient": (arguments(q=lambda q: q.requires_grad_()), "a gradient is needed"),
        "mask gradient": (arguments(attn_mask=torch.zeros(6, 5).requires_grad_()), "a gradient is needed"),
        "no keys": (arguments(k=lambda k: k[:, :0], v=lambda v: v[:, :0]), "there are no keys"),
        "depths": (arguments(v=lambda v: v[..., :4]), "v's head dimension is 4 and q's 8"),
        "strided": (arguments(k=lambda k: k.transpose(2, 3).contiguous().transpose(2, 3)), "not contiguous"),
        "scale": (arguments(scale=-1.0), "scale is -1.0"),
        "broadcast mask": (arguments(attn_mask=torch.zeros(6, 1)), "broadcast along the keys"),
        "large": (
            arguments(**{n: lambda t: t.repeat(1, 1, 1, 64) for n in "qkv"}),
            "head dimension 512",
        ),
    }


@pytest.mark.kernel
@pytest.mark.parametrize("name", _fallbacks())
def test_fallback(name: str) -> None:
    make, reason = _fallbacks()[name]
    args, kwargs = make()
    choice = attention.choose(*args, **kwargs)
    assert choice.backend == "eager" and reason in choice.reason
    with torch.no_grad():
        wide = [t.double() for t in args]
        if (m := kwargs.get("attn_mask")) is not None:
            kwargs["attn_mask"] = m.double()
        q, k, v = (t.transpose(1, 2) for t in wide)
        logits = q @ k.mT * kwargs.get("scale", q.shape[-1] ** -0.5) + kwargs.get("attn_mask", 0.0)
        expected = (logits.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(attention(*args, **make()[1]).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.kernel
def test_autocast() -> None:
    args, _ = one((1, 6, 5, 2, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.choose(*args).reason == "autocast is on"


def test_bad_arguments() -> None:
    (q, k, v), _ = one((2, 6, 5, 2, 8), torch.float32)
    with pytest.raises(ValueError, match=r"q, k and v have shapes \(6, 2, 8\)"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"expected .B, Sq, H, D."):
        attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"expected .B, Sq, H, D."):
        attention(q, k, v[:, :4])
    with pytest.raises(ValueError, match=r"expected .B, Sq, H, D."):
        attention(q, k[:1], v[:1])
    with pytest.raises(ValueError, match="expected one floating dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match=r"is_causal excludes attn_mask"):
        attention(q, k, v, torch.ones(6, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask is torch.int64"):
        attention(q, k, v, torch.ones(6, 5, dtype=torch.int64))
    for shape in ((5,), (6, 4), (3, 1, 6, 5), (1, 1, 1, 6, 5)):
        with pytest.raises(ValueError, match="not one that broadcasts"):
            attention(q, k, v, torch.zeros(shape))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    for kind in (None, "bool", "additive", "causal"):
        args, kwargs = one((2, 6, 5, 2, 8), dtype, mask_kind=kind)
        for return_lse in (False, True):
            torch.library.opcheck(attention.overload, args, kwargs | {"return_lse": return_lse})


@pytest.mark.kernel
def test_compile() -> None:
    args, kwargs = one((2, 6, 5, 2, 8), torch.bfloat16, mask_kind="bool", layout="heads first")
    assert_compiles(attention, *args, **kwargs)


@pytest.mark.kernel
def test_gradients() -> None:
    args, kwargs = one((2, 6, 5, 2, 8), torch.float32, mask_kind="additive")
    assert_gradients(attention, *args, **kwargs)
    assert_gradients(attention, *args, is_causal=True, return_lse=False)


@pytest.mark.kernel
@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 140, 500, 3, 100))),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from((None, *MASKS)),
    offset=st.sampled_from((0.0, 50.0)),
    seed=st.integers(0, 1000),
)
def test_property(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    kind: str | None,
    offset: float,
    seed: int,
) -> None:
    """The result is a mean of values, so its error is bounded by that of the weights times the largest value."""
    args, kwargs = case(sizes, dtype, layout=layout, mask_kind=kind, offset=offset)(torch.Generator().manual_seed(seed))
    out = run_kernel(attention, *args, **kwargs)[0]
    exact_kwargs = kwargs | {"return_lse": False}
    m = kwargs.get("attn_mask")
    if m is not None and m.dtype != torch.bool:
        exact_kwargs["attn_mask"] = m.double()
    exact = attention.eager(*(t.double() for t in args), **exact_kwargs)[0]
    # bf16: weights to 2^-9 in numerator and denominator, then the result's own rounding, up to 2^-9 again.
    bound = {torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 3 * 2**-9 + 1e-5}[dtype]
    assert (out.double() - exact).abs().max() <= bound * args[2].abs().max().double()

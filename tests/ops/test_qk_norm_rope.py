"""qk_norm_rope: norm of queries and keys, rotary embedding, the joint sequence."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    BACKEND,
    DTYPES,
    INTERPRETED,
    Arguments,
    assert_compiles,
    assert_gradients,
    assert_numerics,
    assert_same_nonfinite,
    numerics_on_gpus,
    run_kernel,
)
from torch import Tensor

from fastdiff.ops import qk_norm_rope

pytestmark = pytest.mark.kernel

#: Of rotary tables, beside float32. The interpreter has no bfloat16, and Triton's kernels refuse float64.
TABLE_DTYPES = [torch.float16, torch.bfloat16, torch.float64][: 1 if INTERPRETED else 2 if BACKEND == "triton" else 3]
B, S, TEXT, H, D = 2, 5, 3, 3, 22  # neither D nor H D a multiple of a register

#: name -> how queries and keys are made into what attention takes; see :func:`_arguments`.
VARIANTS: dict[str, dict[str, Any]] = {
    "rms": {},
    "layer norm": {"rms": False, "biases": True},
    "no norm": {"eps": None, "weights": False, "table": "real"},
    "rms, interleaved": {"table": "real"},
    "rms, half": {"table": "real", "interleaved": False},
    "rms, complex": {"table": "complex"},
    "half, complex": {"table": "complex", "interleaved": False},
    "no weights, rotary part": {"weights": False, "table": "real", "width": 10, "tokens": S - 3, "rope_start": 2},
    "half, rotary part": {"table": "real", "width": 10, "tokens": S - 3, "rope_start": 1, "interleaved": False},
    "layer norm, rotary part": {"rms": False, "biases": True, "table": "complex", "tokens": S - 2, "rope_start": 2},
    "across heads": {"across_heads": True, "table": "real"},
    "across heads, layer norm": {"across_heads": True, "rms": False, "biases": True},
    "across heads, table per head": {"across_heads": True, "table": "per head"},
    "joint, text first": {"text": True, "table": "real"},
    "joint, text last": {"text": True, "table": "complex", "text_first": False},
    "joint, image rotated": {"text": True, "table": "real", "tokens": S, "text_first": False},
    "joint, across heads": {"text": True, "across_heads": True},
    "fewer keys' heads": {"table": "complex", "key_heads": 1},
    "other length": {"key_tokens": S + 4, "across_heads": True},
}


def _arguments(generator: torch.Generator, dtype: torch.dtype, variant: str, offset: float = 0.0) -> Arguments:
    spec = dict(VARIANTS[variant])
    text, table, width = spec.pop("text", False), spec.pop("table", None), spec.pop("width", D)
    weights, biases = spec.pop("weights", True), spec.pop("biases", False)
    total = S + TEXT * text
    tokens = spec.pop("tokens", total)
    heads = {"q": H, "k": spec.pop("key_heads", H)}
    lengths = {"q": S, "k": spec.pop("key_tokens", S)}

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keywords: dict[str, Any] = dict(spec)
    streams: dict[str, Tensor] = {}
    for name, count in heads.items():
        # Slices of one projection, as fused projections give them.
        wide = (randn(B, lengths[name], 3 * count * D) + offset).to(dtype)
        streams[name] = wide.chunk(3, -1)[1].unflatten(-1, (count, D))
        size = D * (count if spec.get("across_heads") else 1)
        if text:
            keywords[f"text_{name}"] = randn(B, TEXT, count * D).to(dtype).unflatten(-1, (count, D))
            keywords[f"text_{name}_weight"] = (1 + randn(size)).to(dtype)
        if weights:
            keywords[f"{name}_weight"] = (1 + randn(size)).to(dtype)
        if biases:
            keywords[f"{name}_bias"] = randn(size)
    angle = 3 * randn(*((B, tokens, H, width // 2) if table == "per head" else (tokens, width // 2)))
    if table == "complex":
        keywords["cos"] = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    elif table is not None:
        full = angle.repeat_interleave(2, -1) if spec.get("interleaved", True) else torch.cat((angle, angle), -1)
        keywords["cos"], keywords["sin"] = full.cos(), full.sin()
    return (streams["q"], streams["k"]), keywords


def _sample(variant: str, dtype: torch.dtype = torch.float32) -> Arguments:
    return _arguments(torch.Generator().manual_seed(0), dtype, variant)


BY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.numerics
@BY_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(dtype: torch.dtype, variant: str) -> None:
    assert_numerics(qk_norm_rope, lambda generator: _arguments(generator, dtype, variant))


@pytest.mark.numerics
@pytest.mark.parametrize("variant", ["layer norm", "across heads, layer norm"])
def test_large_means(variant: str) -> None:
    assert_numerics(qk_norm_rope, lambda generator: _arguments(generator, torch.float32, variant, offset=1e3))


@pytest.mark.numerics
@pytest.mark.parametrize("across", [False, True], ids=["per head", "across heads"])
@pytest.mark.parametrize(("heads", "depth", "width"), [(5, 64, 64), (3, 128, 96), (10, 128, 128), (2, 512, 32)])
def test_sizes_of_models(heads: int, depth: int, width: int, across: bool) -> None:
    """Whole registers and packs, long rows, and both pairings of the elements with both kinds of table."""

    def arguments(generator: torch.Generator, dtype: torch.dtype, interleaved: bool, joined: bool) -> Arguments:
        q, k = (torch.randn(2, 3, heads, depth, generator=generator).to(dtype) for _ in range(2))
        w = (1 + torch.randn(depth * (heads if across else 1), generator=generator)).to(dtype)
        angle = 3 * torch.randn(3, width // 2, generator=generator)
        table = {"cos": torch.view_as_real(torch.polar(torch.ones_like(angle), angle))}
        if not joined:
            angle = torch.cat((angle, angle), -1)
            table = {"cos": angle.cos(), "sin": angle.sin()}
        options = {"across_heads": across, "rms": not across, "interleaved": interleaved}
        return (q, k, w, w), table | options

    for dtype, interleaved, joined in zip(DTYPES, (True, False, False), (True, True, False), strict=False):
        assert_numerics(
            qk_norm_rope, functools.partial(arguments, dtype=dtype, interleaved=interleaved, joined=joined)
        )


@numerics_on_gpus("on a CPU tables are float32")
@pytest.mark.parametrize("table_dtype", TABLE_DTYPES, ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["tables", "pairs"])
@pytest.mark.parametrize("depth", [22, 128])
def test_tables_of_another_dtype(depth: int, joined: bool, table_dtype: torch.dtype) -> None:
    """Without a norm, whose own error would hide the tables'; of whole packs and not."""

    def arguments(generator: torch.Generator, dtype: torch.dtype, interleaved: bool) -> Arguments:
        q, k = (torch.randn(2, 5, 3, depth, generator=generator).to(dtype) for _ in range(2))
        angle = 3 * torch.randn(5, depth // (2 if joined else 1), generator=generator, dtype=torch.float64)
        table = torch.stack((angle.cos(), angle.sin()), -1).to(table_dtype)
        tables = {"cos": table} if joined else {"cos": table[..., 0].contiguous(), "sin": table[..., 1].contiguous()}
        return (q, k), tables | {"eps": None, "interleaved": interleaved}

    for dtype in DTYPES:
        for interleaved in (False, True):
            assert_numerics(qk_norm_rope, functools.partial(arguments, dtype=dtype, interleaved=interleaved))


@pytest.mark.numerics
def test_queries_alone() -> None:
    """Keys without heads: the queries are the same."""
    (q, k), keywords = _sample("layer norm, rotary part")
    expected, _ = run_kernel(qk_norm_rope, q, k, **keywords)
    del keywords["k_weight"], keywords["k_bias"]
    alone, none = run_kernel(qk_norm_rope, q, q[:, :, :0], **keywords)
    assert torch.equal(alone, expected)
    assert none.shape == (B, S, 0, D)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_eager_is_what_diffusers_computes(half: bool) -> None:
    """Bitwise the chain of a joint attention: RMSNorm, concatenation, ``apply_rotary_emb``."""
    (q, k), keywords = _sample("joint, text first", torch.bfloat16)
    keywords["interleaved"] = not half
    ours, _ = qk_norm_rope.eager(q, k, **keywords)

    def norm(x: Tensor, name: str) -> Tensor:
        module = RMSNorm(D, eps=1e-6)
        module.weight = torch.nn.Parameter(keywords[name], requires_grad=False)
        return module(x)

    joint = torch.cat((norm(keywords["text_q"], "text_q_weight"), norm(q, "q_weight")), 1)
    table = keywords["cos"], keywords["sin"]
    stock = apply_rotary_emb(joint, table, use_real_unbind_dim=-2 if half else -1, sequence_dim=1)
    assert torch.equal(ours, stock)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, tokens, heads = (data.draw(st.integers(1, 3)) for _ in range(3))
    depth = 2 * data.draw(st.integers(1, 70))
    width = 2 * data.draw(st.integers(1, depth // 2))
    dtype, generator = data.draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # Heads before tokens in memory, every second element of the batch.
    q, k = torch.randn(2, 2 * batch, heads, tokens, depth, generator=generator).to(dtype)[:, ::2].transpose(2, 3)
    angle = torch.randn(tokens, width // 2, generator=generator)
    table = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    across, rms, interleaved = (data.draw(st.booleans()) for _ in range(3))
    keywords = {"eps": 1e-5, "rms": rms, "across_heads": across, "interleaved": interleaved}

    exact = qk_norm_rope.eager(q.double(), k.double(), cos=table.double(), **keywords)
    ours = run_kernel(qk_norm_rope, q, k, cos=table, **keywords)
    for got, want in zip(ours, exact, strict=True):
        assert got.is_contiguous()
        error = (got.double() - want).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * want.abs() + 4e-6 * want.abs().max() + 1e-7).all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for ours in run_kernel(qk_norm_rope, torch.randn(shape), torch.randn(shape)):
        assert ours.shape == shape


def test_nonfinite() -> None:
    (q, k), keywords = _sample("rms, interleaved")
    q, k = q.contiguous(), k.contiguous()
    q[0, 0, 0, 0], q[0, 1, 1, 5], k[1, 2, 0, 3] = float("nan"), float("inf"), -float("inf")
    assert_same_nonfinite(qk_norm_rope, q, k, **keywords)


def test_falls_back_with_a_reason() -> None:
    (q, k), keywords = _sample("rms, interleaved")
    cos, sin = keywords["cos"], keywords["sin"]
    for reason, (arguments, changes) in {
        "last axis": ((q.transpose(1, 3).contiguous().transpose(1, 3), k), {}),
        "rotary table is float64": ((q, k), {"cos": cos.double(), "sin": sin.double()}),
        "rotary table's last axis": ((q, k), {"cos": cos.mT.contiguous().mT, "sin": sin.mT.contiguous().mT}),
        "laid out differently": ((q, k), {"sin": torch.cat((sin, sin), -1)[:, :D]}),
    }.items():
        choice = qk_norm_rope.choose(*arguments, **keywords | changes)
        assert choice.backend == "eager"
        assert reason in choice.reason
        ours = qk_norm_rope(*arguments, **keywords | changes)
        torch.testing.assert_close(ours, qk_norm_rope.eager(*arguments, **keywords | changes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in qk_norm_rope.choose(q, k).reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_weight": torch.ones(D + 1)}, r"q_weight has shape \(23,\), but expected \(22,\)"),
        ({"k_weight": torch.ones(D), "across_heads": True}, r"expected \(66,\)"),
        ({"eps": None, "q_weight": torch.ones(D)}, "there is no norm"),
        ({"sin": torch.ones(S, D)}, "sin is given without cos"),
        ({"cos": torch.ones(S, D)}, r"there is no sin: expected \(cosine, sine\) pairs"),
        ({"cos": torch.ones(S, 24), "sin": torch.ones(S, 24)}, r"table of shape \(5, 24\)"),
        ({"cos": torch.ones(S, D), "sin": torch.ones(S, D), "rope_start": 1}, "from rope_start=1"),
        ({"cos": torch.ones(S, 11, dtype=torch.complex64)}, "expected"),
        ({"text_q": torch.ones(B, TEXT, H, D)}, "go together"),
        ({"text_q": torch.ones(B, TEXT, H, 8), "text_k": torch.ones(B, TEXT, H, 8)}, "text_q is"),
    ],
    ids=range(10),
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    (q, k), _ = _sample("rms")
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(q, k, **changes)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        qk_norm_rope(q, k.double())
    with pytest.raises(ValueError, match=r"expected \(B, S, H, D\)"):
        qk_norm_rope(q, k[0])


def test_overload_checks_what_it_reads() -> None:
    (q, k), keywords = _sample("rms, interleaved")
    for changes in ({"q_weight": torch.ones(3)}, {"rope_start": 1}, {"cos": keywords["cos"][:, :8]}):
        with pytest.raises(RuntimeError, match="fastdiff: qk_norm_rope"):
            qk_norm_rope.overload(q, k, **keywords | changes)
    with pytest.raises(RuntimeError, match="fastdiff: qk_norm_rope"):
        qk_norm_rope.overload(q, k[..., :8])


@pytest.mark.parametrize("variant", ["layer norm, rotary part", "joint, text first", "across heads, table per head"])
def test_gradients_and_opcheck(variant: str) -> None:
    (q, k), keywords = _sample(variant)
    assert_gradients(qk_norm_rope, q, k, **keywords)
    torch.library.opcheck(qk_norm_rope.overload, (q, k), keywords)


def test_compile() -> None:
    (q, k), keywords = _sample("joint, text first", torch.bfloat16)
    assert_compiles(qk_norm_rope, q, k, **keywords)


@pytest.mark.parametrize("interleaved", [True, False])
def test_queries_alone_with_a_table_per_head(interleaved: bool) -> None:
    """Where keys have other positions, they come with no heads, and the queries are what they are beside keys."""
    (q, k), keywords = _sample("across heads, table per head")
    keywords["interleaved"] = interleaved
    beside, _ = qk_norm_rope(q, k, **keywords)
    del keywords["k_weight"]
    assert qk_norm_rope.choose(q, q[:, :, :0], **keywords).backend != "eager"
    for op in (qk_norm_rope, qk_norm_rope.eager):
        alone, nothing = op(q, q[:, :, :0], **keywords)
        torch.testing.assert_close(alone, beside)
        assert nothing.shape == (B, S, 0, D)

"""The Triton backend in Triton's interpreter: what is chosen and refused, tracing, dispatch modes, gradients.

The numbers are those of tests/ops, run with ``FASTDIFF_TEST_BACKEND=triton`` (``make test-triton``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops, use_backend
from fastdiff._launches import count_launches
from fastdiff.ops._library import OPS

pytestmark = pytest.mark.interpreted


def _calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x = torch.randn(2, 3, 8)
    vector, image = torch.randn(2, 8), torch.randn(2, 8, 3, 3)
    heads = torch.randn(1, 4, 2, 16)
    return {
        "adaln_modulate": ((x, vector, vector), {}),
        "adaln_modulate_dual": ((x, vector, vector, None, vector + 1), {}),
        "attention": ((heads, heads, heads), {"return_lse": True}),
        "cfg_combine": ((x, x + 1, 3.0, 0.5), {}),
        "gate_residual": ((x, vector, x + 1), {}),
        "gate_residual_adaln": ((x, vector, x + 1, vector), {}),
        "geglu": ((x,), {}),
        "gelu_tanh": ((x,), {}),
        "group_norm_silu": ((image, 4), {"temb": vector}),
        "qk_norm_rope": ((heads, heads), {"cos": torch.randn(4, 16), "sin": torch.randn(4, 16)}),
        "rms_norm_silu": ((image, torch.randn(8)), {"scale": vector, "clamp": True}),
        "scheduler_step": ((x, x, [x], None, [0.9, 0.1, 0.2, 0.0, 0.3], [1.0, 0.5]), {}),
        "swiglu": ((x, x + 1), {}),
    }


CALLS = _calls()
EVERY = pytest.mark.parametrize("name", CALLS)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t.numel()]


def test_every_public_op_has_a_kernel() -> None:
    assert set(CALLS) == set(ops.__all__)


@EVERY
def test_is_the_first_choice_and_right(name: str) -> None:
    args, kwargs = CALLS[name]
    op = OPS[name]
    assert op.choose(*args, **kwargs).backend == "triton"
    for got, want in zip(_tensors(op(*args, **kwargs)), _tensors(op.eager(*args, **kwargs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@EVERY
def test_counts_as_one_launch(name: str) -> None:
    args, kwargs = CALLS[name]
    assert dict(count_launches(lambda: OPS[name](*args, **kwargs))) == {name: 1}


@EVERY
def test_opcheck(name: str) -> None:
    args, kwargs = CALLS[name]
    torch.library.opcheck(getattr(torch.ops.fastdiff_triton, name).default, args, kwargs)


@EVERY
def test_gradients_are_eagers(name: str) -> None:
    args, kwargs = CALLS[name]
    op = OPS[name]
    x = args[0].clone().requires_grad_()
    choice = op.choose(x, *args[1:], **kwargs)
    assert choice.backend == "eager" and "gradient" in choice.reason
    found = []
    for function in (getattr(torch.ops.fastdiff_triton, name), op.eager):
        results = [t for t in _tensors(function(x, *args[1:], **kwargs)) if t.requires_grad]
        found += torch.autograd.grad(results, x, [torch.ones_like(t) for t in results])
    torch.testing.assert_close(*found)


def test_compiled_graphs_keep_the_backend() -> None:
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.code)
        return module

    (x, *rest), _ = CALLS["adaln_modulate"]
    compiled = torch.compile(lambda x: ops.adaln_modulate(x, *rest), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ops.adaln_modulate(x, *rest))
    assert len(graphs) == 1 and "fastdiff_triton.adaln_modulate" in graphs[0]


def test_operator_checks_its_arguments() -> None:
    """A compiled graph calls it without the op's own checks."""
    with pytest.raises(ValueError, match="weight has shape"):
        torch.ops.fastdiff_triton.group_norm_silu(torch.randn(2, 8, 3), 4, torch.ones(2))


def test_refuses_with_a_reason() -> None:
    x, vector = torch.randn(2, 3, 8), torch.randn(2, 8)
    five = torch.randn(3, 2, 3, 2, 8)[:, :, ::2].transpose(0, 1)[:, ::2]
    q = torch.randn(1, 4, 1, 520)
    with use_backend("triton"):
        for choice, reason in (
            (ops.adaln_modulate.choose(x.double(), vector), "float64"),
            (ops.adaln_modulate.choose(x.mT.contiguous().mT, vector), "last axis is not contiguous"),
            (ops.adaln_modulate.choose(x, weight=torch.ones(16)[::2]), "weight or bias is not contiguous"),
            (ops.adaln_modulate.choose(five, torch.randn(2, 2, 1, 2, 8)), "do not merge into three"),
            (ops.adaln_modulate_dual.choose(x, shift2=torch.randn(2, 16)[:, ::2]), "last axis is not contiguous"),
            (ops.gate_residual.choose(x, vector, x.half()), "x is float32 and residual float16"),
            (ops.geglu.choose(x.transpose(0, 1)), "x is not contiguous"),
            (ops.attention.choose(q, q, q), "the head dimension is 520, more than 512"),
            (ops.attention.choose(q[..., :8], q[..., :8], q[..., :8], scale=-1.0), "scale is -1.0"),
            (ops.group_norm_silu.choose(torch.randn(1, 8193, 1), 1), "8193 channels, more than 8192"),
        ):
            assert choice.backend == "eager" and reason in choice.reason, (choice, reason)


def test_attention_of_many_and_few_keys() -> None:
    """Both kernels, with every kind of mask and sizes that fill no tile."""
    for keys in (5, 77, 700):
        q, k, v = (torch.randn(2, n, 3, 40) for n in (33, keys, keys))
        masks = (None, torch.rand(2, 1, 33, keys) > 0.3, torch.randn(1, 3, 1, keys), torch.randn(33, 1))
        for mask in masks:
            with use_backend("triton", strict=True):
                out, lse = ops.attention(q, k, v, mask, return_lse=True)
            want, want_lse = ops.attention.eager(q, k, v, mask, return_lse=True)
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_rows_longer_than_the_registers() -> None:
    x, residual = torch.randn(2, 3, 9001), torch.randn(2, 3, 9001)
    scale, shift, gate = torch.randn(2, 3 * 9001).chunk(3, 1)
    with use_backend("triton", strict=True):
        for rms in (False, True):
            for op, call in (
                (ops.gate_residual_adaln, (x, gate, residual, scale, shift)),
                (ops.adaln_modulate_dual, (x, scale, shift, gate)),
            ):
                got, want = op(*call, rms=rms), op.eager(*call, rms=rms)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_group_norm_of_every_tile() -> None:
    """One launch and two; one group, few, and groups that fill no tile; both layouts."""
    for channels, groups, size in ((320, 32, 9), (60, 2, 9), (130, 1, 5), (64, 16, 3), (40, 4, 20)):
        x = torch.randn(2, channels, size, size) + 100
        weight, temb = torch.randn(channels), torch.randn(2, channels)
        for image in (x, x.to(memory_format=torch.channels_last)):
            for tokens in (False, True):
                with use_backend("triton", strict=True):
                    got = ops.group_norm_silu(image, groups, weight, temb=temb, tokens=tokens)
                want = ops.group_norm_silu.eager(image.double(), groups, weight, temb=temb, tokens=tokens)
                assert got.stride() == want.stride()
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)

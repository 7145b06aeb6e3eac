"""Transformer blocks of U-Nets: what their replaced forward hands on, and the calls that it leaves to stock code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from models import inputs_of, output, randomized, sd15_unet
from torch import Tensor, nn

import fastdiff


class Wrapper(ModelMixin, ConfigMixin):
    """A model with two blocks, called as Diffusers calls them."""

    @register_to_config
    def __init__(self, **options: Any) -> None:
        super().__init__()
        blocks = [BasicTransformerBlock(24, 2, 12, cross_attention_dim=16, **options) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, text: Tensor | None, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text, **kwargs)
        return x


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 24, generator=generator).to(dtype), torch.randn(2, 5, 16, generator=generator).to(dtype)


def rows(model: nn.Module) -> list[Any]:
    return [row for row in fastdiff.report(model).rows if row.cls == "BasicTransformerBlock"]


@pytest.mark.parametrize("options", [{}, {"norm_elementwise_affine": False}, {"double_self_attention": True},
                                     {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 32},
                                     {"only_cross_attention": True}], ids=str)  # fmt: skip
def test_variants(options: dict[str, Any]) -> None:
    model = randomized(Wrapper(**options))
    x, text = tensors()
    text = None if "double_self_attention" in options else text
    expected, given = model(x, text), x.clone()
    got = fastdiff.patch(model)(x, text)
    assert torch.equal(x, given)
    assert (got - expected).norm() < 1e-6 * expected.norm()
    assert [(row.fused, set(row.served_by)) for row in rows(model)] == [(True, {"norm1", "norm2", "norm3"})] * 2


def test_strided_input() -> None:
    """As a convolution's output is handed on."""
    model = randomized(Wrapper())
    x, text = tensors()
    strided = x.mT.contiguous().mT
    assert torch.equal(fastdiff.patch(model)(strided, text), model(x, text))
    assert all(row.fused for row in rows(model))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [({"scale": 1.0}, "GLIGEN or a scale"), ({"gligen": None}, "GLIGEN or a scale")],
    ids=str,
)
def test_arguments_of_stock_code(kwargs: dict[str, Any], reason: str) -> None:
    """Their handling, a warning among it, is stock's."""
    model = fastdiff.patch(randomized(Wrapper()))
    x, text = tensors()
    expected = model(x, text)
    assert (model(x, text, cross_attention_kwargs=kwargs) - expected).norm() < 1e-6 * expected.norm()
    assert all(reason in row.reason for row in rows(model))


def test_chunks_run_stock() -> None:
    model = fastdiff.patch(randomized(Wrapper()))
    x, text = tensors()
    for block in model.blocks:
        block.set_chunk_feed_forward(3, dim=1)
    model(x, text)
    assert all(row.reason == "its feed-forward runs in chunks" for row in rows(model))


class Widening:
    """A processor whose result is in fp32, and may have another shape: its sum with the residual is promoted."""

    def __init__(self, one_token: bool) -> None:
        self.one_token = one_token

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = hidden_states.float().tanh()
        return result[:, :1] if self.one_token else result


@pytest.mark.parametrize("one_token", [False, True])
def test_what_attention_gives_may_promote_and_broadcast(one_token: bool) -> None:
    class Model(Wrapper):
        def forward(self, x: Tensor, text: Tensor, **kwargs: Any) -> Tensor:
            return self.blocks[0](x, encoder_hidden_states=text)

    model = randomized(Model()).to(torch.bfloat16)
    model.blocks[0].attn2.set_processor(Widening(one_token))
    model.blocks[0].norm3.float()
    model.blocks[0].ff.float()
    x, text = tensors(torch.bfloat16)
    expected = model(x, text)
    assert expected.dtype == torch.float32
    got = fastdiff.patch(model)(x, text)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert (got - expected).norm() < 2e-2 * expected.norm()


def test_a_norm_exchanged_or_watched_later() -> None:
    model, inputs = fastdiff.patch(sd15_unet()), inputs_of()
    expected = output(model, inputs)
    block = next(m for m in model.modules() if isinstance(m, BasicTransformerBlock))
    seen: list[Any] = []
    handle = block.norm2.register_forward_hook(lambda *args: seen.append(args))
    assert (output(model, inputs) - expected).norm() < 1e-5 * expected.norm() and len(seen) == 1
    assert [row.reason for row in rows(model)].count("a norm has hooks") == 1
    handle.remove()
    block.norm2 = nn.Identity()
    assert not torch.allclose(output(model, inputs), expected)
    assert [row.reason for row in rows(model)].count("a norm is a Identity") == 1


class Doubling(BasicTransformerBlock):
    """As token mergers put in a block's place, by its class."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Dynamic(BasicTransformerBlock):
    """As FSDP makes one for every class."""


def test_a_class_exchanged_later() -> None:
    model = fastdiff.patch(randomized(Wrapper()))
    x, text = tensors()
    expected = model(x, text)
    for block in model.blocks:
        block.__class__ = Dynamic
    assert torch.equal(model(x, text), expected)
    assert all(row.fused for row in fastdiff.report(model).rows)
    model.blocks[1].__class__ = Doubling
    assert (model(x, text) - 2 * expected).norm() < 1e-5 * expected.norm()
    assert [row.reason for row in fastdiff.report(model).rows if not row.fused] == [
        "its class was exchanged for Doubling"
    ]
    model.blocks[1].__class__ = BasicTransformerBlock
    assert torch.equal(model(x, text), expected)

"""Blocks that users register."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn
from transformer_case import outputs
from transformer_models import TRANSFORMERS

import fastdiff
from fastdiff.patching._site import site_of
from fastdiff.patching.extending import gated, guarded, modulated
from fastdiff.patching.families import _ADDED


class MyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.linear = nn.Linear(8, 72)
        self.mlp = nn.Linear(24, 24)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = self.linear(temb).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return x + gate[:, None] * self.mlp(h)


class OtherBlock(MyBlock):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MyBlock(), MyBlock(), OtherBlock()])

    def forward(self, x: Tensor, temb: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x, temb)
        return (x,)


@guarded("norm")
def my_block(self: Any, x: Tensor, temb: Tensor) -> Tensor:
    site = self._fastdiff_site
    shift, scale, gate = self.linear(temb).chunk(3, dim=-1)
    h = modulated(site, "norm", self.norm, x, scale, shift)
    return gated(site, "gate", self.mlp(h), gate, x)


def my_example(model: Any) -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 24), "temb": torch.randn(2, 8)}


@pytest.fixture(autouse=True)
def unregister() -> Iterator[None]:
    yield
    _ADDED.clear()


@pytest.mark.kernel
def test_own_model() -> None:
    torch.manual_seed(0)
    model, inputs = MyModel().requires_grad_(False), my_example(None)
    with pytest.raises(TypeError, match="got MyModel"):
        fastdiff.patch(model)
    fastdiff.register_block(MyBlock, my_block, model=MyModel, what="all of it", example=my_example)
    eager = outputs(model, inputs)
    fastdiff.patch(model)
    torch.testing.assert_close(outputs(model, inputs), eager)
    rows = {row.path: row for row in fastdiff.report(model).rows}
    for path in ("blocks.0", "blocks.1"):
        assert (rows[path].backend, rows[path].what) == ("cpu", "all of it")
    assert rows["blocks.2"].reason == "OtherBlock is a subclass of MyBlock with a forward of its own"
    assert fastdiff.verify(model).ok

    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(outputs(clone, inputs), eager)
        assert site_of(clone.blocks[0]).served["gate"].backend == "cpu"
    model.blocks[0].norm.register_forward_hook(lambda *_: None)
    assert torch.allclose(outputs(model, inputs), eager)
    assert site_of(model.blocks[0]).declined == "a norm has hooks"
    fastdiff.unpatch(model)
    assert torch.equal(outputs(model, inputs), eager)


def never(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError


def test_takes_the_place_of_a_known_row() -> None:
    fastdiff.register_block(FluxSingleTransformerBlock, never, model=FluxTransformer2DModel, what="mine")
    model = TRANSFORMERS[0].build()
    fastdiff.patch(model)
    rows = [row for row in fastdiff.report(model).rows if row.cls == "FluxSingleTransformerBlock"]
    assert {row.what for row in rows} == {"mine"}
    with pytest.raises(ZeroDivisionError):
        outputs(model, TRANSFORMERS[0].inputs(0, model=model))
    fastdiff.unpatch(model)


def test_bad_arguments() -> None:
    class Local(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"forward is .*<lambda>, which cannot be imported"):
        fastdiff.register_block(MyBlock, lambda self, x: x, model=MyModel, what="")
    with pytest.raises(ValueError, match=r"block is .*Local, which cannot be imported: define it at module level"):
        fastdiff.register_block(Local, my_block, model=MyModel, what="")
    with pytest.raises(TypeError, match="model is 3; expected a subclass"):
        fastdiff.register_block(MyBlock, my_block, model=3, what="")
    assert not _ADDED

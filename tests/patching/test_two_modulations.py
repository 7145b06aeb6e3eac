"""Blocks that modulate one norm twice: SD3.5's with dual attention, and LTX-2's between its two streams."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_case import Transformer, outputs
from transformer_models import TRANSFORMERS

import fastdiff
from fastdiff._launches import count_launches

pytestmark = pytest.mark.kernel


def _case(name: str, **changes: Any) -> Transformer:
    case = next(case for case in TRANSFORMERS if case.name == name)
    return replace(case, config=case.config | changes)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (_case("SD3.5 medium", dual_attention_layers=(0, 2)), 2),
        (_case("SD3 ControlNet", dual_attention_layers=(1,), qk_norm="rms_norm"), 1),
        (_case("LTX-2"), 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_one_launch(case: Transformer, count: int) -> None:
    """For each pair of modulations."""
    model = case.build()
    inputs = case.inputs(0, model=model)
    expected = outputs(model, inputs)
    fastdiff.patch(model)
    ours = outputs(model, inputs)
    assert not torch.equal(ours, expected) and (ours - expected).norm() <= 1e-5 * expected.norm()
    launches = count_launches(lambda: model(**inputs))
    assert launches["adaln_modulate_dual"] == count
    rows = [row for row in fastdiff.report(model).rows if row.what.startswith("norm + two modulations")]
    assert all((row.fused, row.backend, row.reason) == (True, "cpu", "") for row in rows)
    assert len(rows) == (count if case.cls.__name__.startswith("SD3") else 0)


def test_hook_on_the_norm() -> None:
    """It sees the norm's result, which the fused op does not compute: that block's norm runs stock, the other's not."""
    case = _case("SD3.5 medium")
    model = case.build()
    inputs = case.inputs(0, model=model)
    fastdiff.patch(model)
    before = outputs(model, inputs)
    norm = model.transformer_blocks[0].norm1
    norm.norm.register_forward_hook(lambda module, args, out: 2 * out)
    hooked, launches = outputs(model, inputs), count_launches(lambda: model(**inputs))
    assert launches["adaln_modulate_dual"] == 1
    assert {row.reason for row in fastdiff.report(model).rows if not row.fused} == {"a norm has hooks"}
    fastdiff.unpatch(model)
    expected = outputs(model, inputs)
    assert (hooked - expected).norm() <= 1e-5 * expected.norm() < (hooked - before).norm()


@pytest.mark.parametrize("only", ["use_a2v_cross_attention", "use_v2a_cross_attention"])
def test_one_direction_between_streams(only: str) -> None:
    """Of LTX-2: then there is one modulation of each norm."""
    case = _case("LTX-2")
    model = case.build()
    calls: list[tuple[Any, dict[str, Any]]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    block = model.transformer_blocks[0]
    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    outputs(model, case.inputs(0, model=model))
    hook.remove()
    ((args, kwargs),) = calls
    kwargs |= {name: name == only for name in ("use_a2v_cross_attention", "use_v2a_cross_attention")}

    def run(of: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([t.flatten() for t in of.transformer_blocks[0](*args, **kwargs)])

    patched = fastdiff.patch(copy.deepcopy(model))
    expected = run(model)
    assert (run(patched) - expected).norm() <= 1e-5 * expected.norm()
    launches = count_launches(lambda: run(patched))
    assert launches["adaln_modulate_dual"] == 0 and launches["adaln_modulate"] > 2

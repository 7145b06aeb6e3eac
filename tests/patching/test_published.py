"""The published configurations: patched without weights, and what README's table says of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import diffusers
import pytest
from extent import ALL
from fakes import contracts, fake_tensors
from published import PLAIN
from transformer_case import Transformer, as_loaded
from transformer_models import TRANSFORMERS
from zoo import ZOO, Entry, model_class

import fastdiff
from fastdiff.patching.families import example_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = json.loads((BENCHMARKS / "results" / "pipelines.json").read_text())["pipelines"]


@pytest.mark.parametrize("entry", [e for e in ZOO if e.public is not None], ids=lambda e: e.pipelines)
def test_places(entry: Entry) -> None:
    """On the meta device: enough places are patched, the others say why."""
    report = fastdiff.report(fastdiff.patch(entry.without_weights()))
    left = [row for row in report.rows if row.backend == "stock"]
    assert len(report.rows) > 20
    assert 1 - len(left) / len(report.rows) >= entry.least
    assert {row.reason for row in left} <= {"conv_act is a GELU"}


_FEW = ("Wan 2.1", "HunyuanVideo", "CogVideoX", "Mochi", "LTX-2")  # with FASTDIFF_TEST_ALL=1 all
VAES = [e for e in ZOO if e.public is not None and e.pipelines.startswith("VAE of")]


@pytest.mark.parametrize(
    "entry",
    [e for e in VAES if ALL or e.pipelines.removeprefix("VAE of ") in _FEW],
    ids=lambda e: e.pipelines,
)
def test_contracts_of_vaes(entry: Entry) -> None:
    """In bf16 and without memory: the kernels for the CPU and for GPUs would take every call of a forward."""
    with fake_tensors(), contracts() as refusals:
        model = as_loaded(model_class(entry.cls)(**entry.public or {}), lambda weight, dtype: weight.to(dtype))
        fastdiff.patch(model)(**example_of(model))
    assert refusals
    wide = {reason for reason in refusals.pop(("attention", "cpu"), []) if "torch's attention is as fast" not in reason}
    assert not wide and not any(refusals.values()), (wide, refusals)


def test_table_is_of_the_models() -> None:
    wanted = [(e.pipelines, e.cls, e.source or "tiny") for e in ZOO]
    wanted += [(e.pipelines, e.cls, "published sizes") for e in PLAIN]
    found = [(row["pipelines"], row["model"], row["configuration"]) for row in TABLE["rows"]]
    assert found[: len(wanted)] == wanted
    assert [row[:2] for row in found[len(wanted) :]] == [(case.name, case.cls.__name__) for case in TRANSFORMERS]
    plain = {e.cls for e in PLAIN}
    for row in TABLE["rows"]:
        assert row["patched"] + sum(row["left"].values()) == row["places"]
        assert row["after"] < row["before"] or row["model"] in plain


#: With FASTDIFF_TEST_ALL=1 all: seconds each, transformers up to minutes.
_COUNTED = [pytest.param("of_zoo", e, id=f"{e.cls}: {e.pipelines}") for e in ZOO
            if ALL or e.cls in ("ControlNetModel", "VQModel")]  # fmt: skip
_COUNTED += [pytest.param("of_transformer", case, id=f"{case.cls.__name__}: {case.name}")
             for case in TRANSFORMERS if ALL]  # fmt: skip


@pytest.mark.skipif(
    TABLE["environment"]["diffusers"] != diffusers.__version__, reason="the table is of another Diffusers"
)
@pytest.mark.parametrize(("count", "model"), _COUNTED)
def test_table_is_up_to_date(
    count: str, model: Entry | Transformer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted again; ``python benchmarks/pipelines.py`` counts all."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pipelines

    monkeypatch.delitem(sys.modules, "pipelines")
    (row,) = [row for row in TABLE["rows"] if pipelines.name_of(row) == request.node.callspec.id]
    assert getattr(pipelines, count)(model) == row


#: What Diffusers' tests of a model are called, where that is not the name of its module.
_TESTED_AS = {"auraflow": "aura_flow", "hunyuan": "hunyuan_dit", "controlnet_hunyuan": "controlnet_hunyuandit",
              "hunyuan_video15": "hunyuan_1_5", "hunyuanimage": "hunyuan_image_21", "pixart": "pixart_transformer2d",
              "dit": "dit_transformer2d", "hidream_image": "hidream", "controlnet_qwenimage": "qwenimage",
              "controlnet_sana": "sana"}  # fmt: skip


def test_diffusers_tests_of_all_transformers_are_run() -> None:
    """``make diffusers-tests`` names them."""
    listed = (BENCHMARKS.parent / "Makefile").read_text().split("DIFFUSERS_KNOWN :=")[1].split("DIFFUSERS_TESTS")[0]
    words = set(re.findall(r"\w+", listed))
    for case in TRANSFORMERS:
        module = case.cls.__module__.rpartition(".")[2].removeprefix("transformer_")
        name = re.sub(r"_transformer(_\dd)?$", "", module)
        assert _TESTED_AS.get(name, name) in words, case.name

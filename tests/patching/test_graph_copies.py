"""CUDA graphs: the report, copies, unpatching, threads; and that the fake recorder finds mistakes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_recorder import FakeRecorder
from graph_pairs import DIT, FIRST, SD, assign, captured, inputs, pair_of, recorder_of, same, stats_of, with_lora
from models import dit, run_sd, sd15_unet, sd_pipeline, vae
from transformer_case import outputs

import fastdiff
from fastdiff._report import Graphs
from fastdiff.patching import _graph_calls, _graph_state, patch_of
from fastdiff.patching._graphs import GraphStats, graphed_forward

pytestmark = pytest.mark.usefixtures("fake_graphs")


# options, copies, undoing


def test_on_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    pipe = fastdiff.patch(sd_pipeline(), cuda_graphs=True)
    run_sd(pipe)
    report = fastdiff.report(pipe)
    found = {entry.component: entry.reason for entry in report.graphs}
    assert found == {
        "unet": "torch sees no CUDA device", "vae": "only denoisers are captured, which are called at every step",
    }  # fmt: skip
    assert "now none: torch sees no CUDA device" in str(report)
    assert fastdiff.info().cuda_graphs.reason == "torch sees no CUDA device"


def test_on_a_machine_with_cuda_a_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRecorder, "device_type", "cuda")
    model = fastdiff.patch(sd15_unet(), cuda_graphs=True)
    assert fastdiff.report(model).graphs[0].reason == "its weights are on cpu; CUDA is needed"
    outputs(model, inputs())
    assert stats_of(model).ordinary == {"argument sample is on cpu": 1}


def test_report() -> None:
    model, _ = captured()
    report = fastdiff.report(model)
    assert report.graphs == (Graphs("", "UNet2DConditionModel", GraphStats(1, 1, 2, {FIRST: 1}, 0, {}, ""), ""),)
    assert "CUDA graphs of the model (UNet2DConditionModel): 1 held, 1 captured, 2 calls replayed" in str(report)
    assert report.to_dict()["graphs"][0]["stats"]["replays"] == 2
    assert fastdiff.report(fastdiff.patch(sd15_unet())).graphs == ()


def test_bad_option() -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs is 2; expected True or False"):
        fastdiff.patch(sd15_unet(), cuda_graphs=2)  # type: ignore[arg-type]


def test_unpatch_gives_everything_back() -> None:
    model, _ = captured()
    before = vars(sd15_unet()).keys()
    recorder = recorder_of(model)
    held = [weakref.ref(t) for r in recorder.recordings for t in r.tape.owned.values()]
    assert len(held) > 50
    fastdiff.unpatch(model)
    assert recorder.recordings == [] and recorder.released == 1
    assert not any(ref() is not None for ref in held)
    assert vars(model).keys() == before
    assert "forward" not in vars(model)
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("build", [sd15_unet, dit], ids=["with a layout", "with a forward of its own"])
def test_there_and_back_several_times(build: Callable[[], Any]) -> None:
    """Where the forward is replaced already, that is what runs inside; and both come out again."""
    case = SD if build is sd15_unet else DIT
    model, plain = build(), fastdiff.patch(build())
    eager = outputs(model, inputs(0, case))
    for _ in range(2):
        with fastdiff.patched(model, cuda_graphs=True):
            for seed in range(3):
                same((model, plain), seed, case)
            assert stats_of(model).replays == 2
            assert model.forward.func is graphed_forward
            fastdiff.patch(model)  # without graphs
            assert patch_of(model).graphs is None
            same((model, plain), 0, case)
        assert "forward" not in vars(model)
        assert torch.equal(outputs(model, inputs(0, case)), eager)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("copied", "build"), [(copy.deepcopy, sd15_unet), (_pickled, sd15_unet), (_saved, dit), (copy.deepcopy, dit)]
)
def test_copies_have_graphs_of_their_own(copied: Callable[[Any], Any], build: Callable[[], Any]) -> None:
    case = SD if build is sd15_unet else DIT
    model, plain = pair_of(build)
    for seed in range(3):
        same((model, plain), seed, case)
    other = copied(model)
    assert stats_of(other) == GraphStats(0, 0, 0, {}, 0, {}, "")
    for twin in (other, plain):
        next(twin.parameters()).data.mul_(1.5)
    for seed in range(3):
        same((other, plain), seed, case)
    assert stats_of(other).replays == stats_of(model).replays == 2
    assert not torch.equal(outputs(model, inputs(0, case)), outputs(other, inputs(0, case)))
    fastdiff.unpatch(other)
    assert len(recorder_of(model).recordings) == 1


def test_pipelines_that_share_a_model() -> None:
    unet = sd15_unet()
    one, two = (fastdiff.patch(sd_pipeline(unet), cuda_graphs=True) for _ in range(2))
    expected = run_sd(fastdiff.patch(sd_pipeline()))
    for pipe in (one, two):
        assert torch.equal(run_sd(pipe), expected)
    fastdiff.unpatch(one)
    assert torch.equal(run_sd(two), expected)
    assert stats_of(unet).replays > 1
    fastdiff.unpatch(two)
    assert "forward" not in vars(unet)


def test_vae_and_verify() -> None:
    pipe = fastdiff.patch(sd_pipeline(), cuda_graphs=True)
    result = fastdiff.verify(pipe, prompt_embeds=torch.randn(1, 77, 32), negative_prompt_embeds=torch.randn(1, 77, 32),
                             num_inference_steps=4, output_type="latent", height=16, width=16)  # fmt: skip
    assert result.ok
    report = fastdiff.report(fastdiff.patch(vae(), cuda_graphs=True))
    assert report.graphs[0].stats is None and "only denoisers" in str(report)


def test_launches_are_counted_without_graphs() -> None:
    model, plain = captured()
    counted = [fastdiff.report(m, launches=True).launches for m in (model, plain)]
    assert counted[0] == counted[1]
    same((model, plain), 3)


def test_compile_sees_the_forward_inside() -> None:
    """No graph break, and no replay inside of what is compiled."""
    model, plain = pair_of(dit)
    for seed in range(3):
        same((model, plain), seed, DIT)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled, inputs(3, DIT)), outputs(plain, inputs(3, DIT)))
    assert stats_of(model).replays == 2


def test_threads() -> None:
    """One graph at a time, and each call gets its own result."""
    model, plain = captured()
    expected = {seed: outputs(plain, inputs(seed)) for seed in range(8)}
    wrong: list[int] = []

    def work(first: int) -> None:
        for seed in (first, first + 1) * 3:
            changes = {} if seed % 2 else {"encoder_attention_mask": None}
            if not torch.equal(outputs(model, inputs(seed, **changes)), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 2, 4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert stats_of(model).captures == 2
    assert stats_of(model).replays > 10


# the fake finds what is wrong


def _no_write(self: Any, call: Any) -> None:
    pass


def _no_copy(self: Any) -> Any:
    return self._plan(iter(self._tensors))


def _no_change(self: Any) -> None:
    return None


_WRONG: dict[str, tuple[Any, str, Any, Callable[[Any], Any]]] = {
    "inputs are not copied": (_graph_calls.StaticArguments, "write", _no_write, lambda m: None),
    "outputs are not copied": (_graph_calls.StaticResult, "copy", _no_copy, lambda m: None),
    "replaced weights are not seen": (_graph_state.State, "changed", _no_change, assign),
    "a LoRA's scale is not seen": (
        _graph_state.State, "changed", _no_change, lambda m: m.set_adapters(["default"], weights=[0.3])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _WRONG)
@torch.no_grad()
def test_the_fake_finds_mistakes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, method, wrong, change = _WRONG[name]
    pair = pair_of(with_lora)
    monkeypatch.setattr(cls, method, wrong)
    found = [[], []]
    for seed in range(5):
        if seed == 4:
            for model in pair:
                change(model)
        for results, model in zip(found, pair, strict=True):
            results.append(model(**inputs(seed), return_dict=False)[0])
    assert stats_of(pair[0]).captures == 1
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True))

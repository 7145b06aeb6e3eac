"""The guider of modular pipelines: one kernel, and the stock one's results in every case."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch
from trajectory import error

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of

SHAPE = (3, 4, 7, 5)


def predictions(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(SHAPE, generator=generator).to(dtype) for name in ("pred_cond", "pred_uncond")}


def served(guider: Any) -> str:
    site = site_of(guider)
    assert site is not None
    return site.declined or site.served["guidance"].backend


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("original", [False, True])
def test_guidance(dtype: torch.dtype, rescale: float, original: bool) -> None:
    """No further from the fp64 result than stock, over a batch of three."""
    options = {"guidance_scale": 4.5, "guidance_rescale": rescale, "use_original_formulation": original}
    stock = diffusers.ClassifierFreeGuidance(**options)
    patched = fastdiff.patch(diffusers.ClassifierFreeGuidance(**options))
    given = predictions(dtype)
    theirs, ours = stock.forward(**given), patched.forward(**given)
    assert served(patched) == "cpu"
    assert type(ours) is type(theirs)
    assert ours.pred.dtype == dtype
    assert ours.pred_cond is given["pred_cond"]
    assert ours.pred_uncond is given["pred_uncond"]
    exact = stock.forward(**{name: t.double() for name, t in given.items()}).pred
    assert error(ours.pred, exact) <= max(1.05 * error(theirs.pred, exact), 2 * torch.finfo(dtype).eps / 3**0.5 / 2)


def _off(guider: Any) -> None:
    guider._enabled = False


def _late(guider: Any) -> None:
    guider.set_state(step=9, num_inference_steps=10, timestep=torch.tensor(3))


LEFT = {
    "disabled": (_off, {}, "guidance is off"),
    "after stop": (_late, {}, "guidance is off"),
    "no scale": (lambda g: setattr(g, "guidance_scale", 1.0), {}, "guidance is off"),
    "layout": (None, {"pred_cond": predictions()["pred_cond"].to(memory_format=torch.channels_last)}, "not contiguous"),
    "dtypes": (None, {"pred_cond": predictions()["pred_cond"].double()}, "dtype"),
    "tensor": (lambda g: setattr(g, "guidance_scale", torch.tensor(3.0)), {}, "not a number"),
}


@pytest.mark.parametrize(("change", "given", "reason"), LEFT.values(), ids=LEFT.keys())
def test_runs_stock(change: Any, given: dict[str, Any], reason: str) -> None:
    results = []
    for patched in (False, True):
        guider = diffusers.ClassifierFreeGuidance(stop=0.5, guidance_rescale=0.3)
        if change is not None:
            change(guider)
        if patched:
            fastdiff.patch(guider)
        results.append(guider.forward(**{**predictions(), **given}).pred)
    assert torch.equal(*results)
    assert reason in served(guider)


def test_there_and_back() -> None:
    guider = diffusers.ClassifierFreeGuidance()
    before = dict(vars(guider))
    fastdiff.patch(guider)
    assert fastdiff.report(guider).rows[0].what == "guidance"
    for twin in (copy.deepcopy(guider), pickle.loads(pickle.dumps(guider))):
        twin.guidance_scale = 2.0
        given = predictions()
        torch.testing.assert_close(twin.forward(**given).pred, 2 * given["pred_cond"] - given["pred_uncond"])
    assert type(guider).from_config(guider.config).__dict__.keys() == before.keys()
    fastdiff.unpatch(guider)
    assert vars(guider).keys() == before.keys()


def test_other_guiders_are_left() -> None:
    class Mine(diffusers.ClassifierFreeGuidance):
        def forward(self, pred_cond: Any, pred_uncond: Any = None) -> Any:
            return pred_cond

    guider = fastdiff.patch(Mine())
    found = patch_of(guider)
    assert found is not None
    assert not found.sites
    assert "not the one of Diffusers" in found.left[0].reason
    with pytest.raises(TypeError):
        fastdiff.patch(diffusers.SkipLayerGuidance(skip_layer_guidance_layers=[0]))

"""Which schedulers and calls are left to the stock step, and the reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from checks import DPM, one_step
from trajectory import SHAPE, make, served, x32

from fastdiff.patching import patch, patch_of
from fastdiff.schedulers import SAMPLERS
from fastdiff.schedulers.samplers import STOCK

UNFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "thresholding": ("DDIMScheduler", {"thresholding": True}, {}, "thresholding"),
    "learned": ("DDPMScheduler", {"variance_type": "learned_range"}, {}, "the variance is learned"),
    "solver_p": ("UniPCMultistepScheduler", {"solver_p": diffusers.DDIMScheduler()}, {}, "another sampler"),
    "scale_factors": ("FlowMatchLCMScheduler", {"scale_factors": [0.5, 1.0]}, {}, "resize"),
    "tokens": ("VQDiffusionScheduler", {"num_vec_classes": 5}, {}, "samples tokens"),
    "learned dpm": (DPM, {"variance_type": "learned"}, {}, "the variance is learned"),
}


@pytest.mark.parametrize(("name", "config", "step", "reason"), UNFUSED.values(), ids=UNFUSED.keys())
def test_left_stock(name: str, config: dict[str, Any], step: dict[str, Any], reason: str) -> None:
    found = patch_of(make(name, True, **config))
    assert found is not None
    assert not found.sites
    assert reason in found.left[0].reason


def test_every_class_is_known() -> None:
    """One that a new Diffusers adds is either fused or has its reason."""
    names = {n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")}
    assert names <= SAMPLERS.keys() | STOCK.keys()
    assert not SAMPLERS.keys() & STOCK.keys()


def test_subclass_is_left_stock() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    scheduler = patch(Mine())
    found = patch_of(scheduler)
    assert found is not None
    assert not found.sites
    assert "not a class of Diffusers" in found.left[0].reason


def test_replaced_class_step_is_left_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = diffusers.DDIMScheduler.step
    monkeypatch.setattr(diffusers.DDIMScheduler, "step", lambda self, *a, **k: stock(self, *a, **k))
    found = patch_of(make("DDIMScheduler", True))
    assert found is not None
    assert not found.sites
    assert "not the one of Diffusers" in found.left[0].reason


def stock_call(name: str, config: dict[str, Any], call: Callable[[Any], Any], reason: str) -> None:
    """``call`` does on a patched scheduler what it does on a stock one, by the stock step; errors too."""
    outcomes: list[Any] = []
    for patched in (False, True):
        scheduler = make(name, patched, **config)
        try:
            scheduler.set_timesteps(6)
            torch.manual_seed(2)
            outcomes.append(call(scheduler).prev_sample)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    theirs, ours = outcomes
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert torch.equal(ours.nan_to_num(9e9), theirs.nan_to_num(9e9))
    assert reason in served(scheduler)


CALLS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any], str]] = {
    "gradient": ("DDIMScheduler", {}, lambda s: s.step(x32.clone().requires_grad_(), s.timesteps[1], x32),
                 "gradient"),
    "timestep vector": ("DDIMScheduler", {"clip_sample": False}, lambda s: s.step(x32, s.timesteps[1:2], x32),
                        "not one number"),
    "timestep not in the schedule": ("DDPMScheduler", {}, lambda s: s.step(x32, 998, x32), "IndexError"),
    "integer timestep": ("EulerDiscreteScheduler", {}, lambda s: s.step(x32, 3, x32), "integer"),
    "shapes": ("DDIMScheduler", {}, lambda s: s.step(x32[:1], 500, x32), "shape"),
    "generator and noise": (
        "DDIMScheduler", {},
        lambda s: s.step(x32, 500, x32, eta=1.0, generator=torch.Generator(), variance_noise=x32),
        "generator"),
    "no sample": (DPM, {}, lambda s: s.step(x32, s.timesteps[0]), "arguments"),
    "unknown argument": (DPM, {}, lambda s: s.step(x32, s.timesteps[0], x32, eta=1.0), "arguments"),
    "argument twice": (DPM, {}, lambda s: s.step(x32, s.timesteps[0], x32, sample=x32),
                       "arguments"),
    "eta tensor": ("DDIMScheduler", {}, lambda s: s.step(x32, 500, x32, eta=torch.tensor(0.5)),
                   "not a number"),
    "zero SNR, epsilon": (
        "DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        lambda s: s.step(x32, s.timesteps[0], x32), "not finite"),
}


@pytest.mark.parametrize(("name", "config", "call", "reason"), CALLS.values(), ids=CALLS.keys())
def test_stock_call(name: str, config: dict[str, Any], call: Callable[[Any], Any], reason: str) -> None:
    stock_call(name, config, call, reason)


def test_autocast_runs_stock() -> None:
    scheduler = make("DDIMScheduler", True)
    scheduler.set_timesteps(4)
    with torch.autocast("cpu", torch.bfloat16):
        one_step(scheduler)
    assert served(scheduler) == "stock: autocast is on"
    one_step(scheduler)
    assert not served(scheduler).startswith("stock")


def test_scale_model_input_warning_stays(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make("EulerDiscreteScheduler", True)
    scheduler.set_timesteps(4)
    sample = torch.randn(SHAPE)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    assert "scale_model_input was not called" in served(scheduler)

"""Options, schedules, tables and history that change under a patched scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import CORE, DPM, compare, every_sampler, one_step
from trajectory import AVAILABLE, SHAPE, error, fields, make, scale, served, set_timesteps

from fastdiff import use_backend
from fastdiff.patching import patch
from fastdiff.schedulers.stepper import Stepper

#: These know the v-prediction, which tests change to.
V_PREDICTION = (*CORE, "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler",
                "SASolverScheduler", "LCMScheduler")


@every_sampler
def test_changes_are_noticed(name: str) -> None:
    """Other options, another number of steps, and tables written to in place."""
    stock, patched = make(name), make(name, True)
    compare(stock, patched)
    compare(stock, patched, steps=5)
    if "prediction_type" in stock.config and name in V_PREDICTION:
        for scheduler in (stock, patched):
            scheduler.register_to_config(prediction_type="v_prediction")
        compare(stock, patched, steps=5)
    results = []
    tables = ("discrete_sigmas", "sigmas", "alphas_cumprod", "betas", "c_out", "s", "timesteps")
    for scheduler in (stock, patched):
        set_timesteps(scheduler, 5)
        if name == "KarrasVeScheduler":
            return  # its step takes the sigmas as arguments
        table = next(t for t in tables if getattr(scheduler, t, None) is not None)
        steps = []
        for _ in range(2):
            torch.manual_seed(1)
            steps.append(fields(one_step(scheduler, torch.float64, 1))["prev_sample"])
            set_timesteps(scheduler, 5)
            getattr(scheduler, table).pow_(1.1)
        assert error(*steps) > 1e-6
        results.append(steps[1])
    assert error(results[1], results[0]) < 1e-6


def test_attributes_replaced_between_steps() -> None:
    """A sigma changed after two steps counts from the third."""
    results = []
    for patched in (False, True):
        scheduler = make("EulerDiscreteScheduler", patched)
        scheduler.set_timesteps(6)
        torch.manual_seed(0)
        sample = torch.randn(SHAPE, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            if i == 2:
                scheduler.sigmas = scheduler.sigmas * 0.8
            if i == 4:
                scheduler.sigmas[5] = 0.01
            scale(scheduler, sample, t)
            sample = scheduler.step(torch.randn_like(sample), t, sample).prev_sample
        results.append(sample)
    assert error(results[1], results[0]) < 1e-6


@every_sampler
def test_later_generations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that follow each other as before are found at once, and are the same.

    But for the first where ``scale_model_input`` has counted it, or a history is left from before.
    """
    found: list[Any] = []
    find = Stepper._find
    monkeypatch.setattr(Stepper, "_find", lambda *args: found.append(1) or find(*args))
    stock, patched = make(name), make(name, True)
    for _ in range(3):
        found.clear()
        compare(stock, patched, steps=6)
    assert len(found) <= 1


def _replace_history(scheduler: Any) -> None:
    scheduler.model_outputs = [t * 0.5 for t in scheduler.model_outputs]


def _write_list(scheduler: Any) -> None:
    scheduler.model_outputs[-1] = scheduler.model_outputs[-1] * 0.5


def _write_tensor(scheduler: Any) -> None:
    scheduler.model_outputs[-1].mul_(0.5)


def _count(scheduler: Any) -> None:
    scheduler._step_index += 1


def _option(scheduler: Any) -> None:
    scheduler.config.lower_order_final = False


def _order(scheduler: Any) -> None:
    scheduler.lower_order_nums = 0


@pytest.mark.parametrize("change", [_replace_history, _write_list, _write_tensor, _count, _option, _order])
def test_changes_in_the_middle(change: Callable[[Any], None]) -> None:
    """What somebody changes between two steps counts, in a generation like those before, and not in the next."""
    schedulers = make(DPM), make(DPM, True)
    results: list[list[torch.Tensor]] = []
    for scheduler in schedulers:
        samples = []
        for generation in range(4):
            scheduler.set_timesteps(6)
            scheduler.config.lower_order_final = True
            sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            model_outputs = [sample.roll(i, 0) for i in range(1, 6)]
            for i, (t, model_output) in enumerate(zip(scheduler.timesteps, model_outputs, strict=False)):
                if generation == 2 and i == 4:
                    change(scheduler)
                sample = scheduler.step(model_output, t, sample).prev_sample
                assert served(scheduler) in ("", "eager")
            samples.append(sample)
        results.append(samples)
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) < 1e-6
    if change is not _option:  # which is about the last step
        assert error(results[0][2], results[0][1]) > 1e-3
    assert error(results[0][3], results[0][1]) < 1e-6


def _step(scheduler: Any, change: str, sample: torch.Tensor, index: int) -> Any:
    """One step of a trajectory in which ``change`` happens at step 3."""
    model_output, t = sample.flip(0), scheduler.timesteps[index]
    if index != 3:
        return scheduler.step(model_output, t, sample)
    if change == "contiguous":
        sample = sample.contiguous()
    if change == "dtype":
        model_output = model_output.half()
    elif change == "sparse":
        model_output = model_output.to_sparse()
    elif change == "layout":
        sample = sample.to(memory_format=torch.channels_last)
    elif change == "gradient":
        for held in scheduler.model_outputs:
            held.requires_grad_()
    elif change == "tuple":
        output = scheduler.step(model_output, t, sample, return_dict=False)
        return type("Output", (), {"prev_sample": output[0]})
    elif change == "backend":
        with use_backend("eager"):
            return scheduler.step(model_output, t, sample)
    return scheduler.step(model_output, t, sample)


@pytest.mark.kernel
@pytest.mark.parametrize("change", ["dtype", "layout", "sparse", "contiguous", "gradient", "tuple", "backend"])
def test_another_call_in_the_middle(change: str) -> None:
    """A call unlike the one that came next before is served as what it is."""
    served_by = {"gradient": "stock: a gradient is needed", "backend": "eager", "layout": "eager",
                 "sparse": "stock: a tensor is sparse, or has another layout that is not strided"}
    samples = []
    for patched in (False, True):
        scheduler = make(DPM, patched)
        for generation in range(3):
            scheduler.set_timesteps(5)
            sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            for index in range(5):
                if change == "contiguous":  # the others are not
                    sample = sample.to(memory_format=torch.channels_last)
                sample = _step(scheduler, change if generation == 2 else "", sample, index).prev_sample
                if patched and generation == 2 and index == 3:
                    assert served(scheduler) == served_by.get(change, "cpu")
                    assert sample.requires_grad is (change == "gradient")
                sample = sample.detach()
            samples.append(sample)
    tolerance = 1e-2 if change == "dtype" else 1e-5  # stock rounds to half
    assert all(error(ours, theirs) < tolerance for theirs, ours in zip(samples[:3], samples[3:], strict=True))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", DPM, "DDIMScheduler"])
@pytest.mark.parametrize("known", [False, True])
def test_vmap(name: str, known: bool) -> None:
    """The op has no batching rule, so the stock step runs under a transform, for new steps and known ones."""
    x = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    results = []
    for patched in (False, True):
        scheduler = make(name, patched)
        for generation in range(3 if known else 1):
            scheduler.set_timesteps(4)
            t = scheduler.timesteps[0]
            scale(scheduler, x[0], t)
            if generation == 2 or not known:
                step = functools.partial(scheduler.step, return_dict=False)
                results.append(torch.func.vmap(step, (0, None, 0))(x.flip(1), t, x)[0])
                assert served(scheduler) in ("", "stock: a transform of torch.func is active")
            else:
                scheduler.step(x[0], t, x[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", DPM, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_inference_mode(name: str) -> None:
    """Steps are fused there, after schedules of there or of before, and writes to tables are noticed."""
    stock, patched = make(name), make(name, True)
    compare(stock, patched)
    with torch.inference_mode():
        for _ in range(3):
            compare(stock, patched)
        results = []
        for scheduler in (stock, patched):
            set_timesteps(scheduler, 8)
            steps = [one_step(scheduler, torch.float64).prev_sample]
            set_timesteps(scheduler, 8)
            getattr(scheduler, "alphas_cumprod" if name == "DDIMScheduler" else "sigmas").mul_(0.5)
            steps.append(one_step(scheduler, torch.float64).prev_sample)
            assert served(scheduler) in ("", "eager")
            results.append(steps)
    assert all(error(ours, theirs) < 1e-6 for theirs, ours in zip(*results, strict=True))
    assert error(*results[0]) > 1e-5
    compare(stock, patched)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", DPM])
def test_made_in_inference_mode(name: str) -> None:
    """Tables whose writes nobody counts: the stock step, with the reason; no other scheduler's steps are taken."""
    ordinary = type(make(name))()
    with torch.inference_mode():
        stock, patched = (type(ordinary)() for _ in range(2))
        patch(patched)
        for scheduler in (stock, patched):
            scheduler.set_timesteps(4)
        ours, theirs = (one_step(scheduler) for scheduler in (patched, stock))
    assert torch.equal(ours.prev_sample, theirs.prev_sample)
    assert "made in inference mode" in served(patched)
    patched.alphas_cumprod, patched.betas, patched.alphas = ordinary.alphas_cumprod, ordinary.betas, ordinary.alphas
    for table in ("alpha_t", "sigma_t", "lambda_t"):
        if hasattr(ordinary, table):
            setattr(patched, table, getattr(ordinary, table))
    compare(make(name), patched)


_OTHER_TIMES: list[tuple[str, str, Any]] = [
    ("UnCLIPScheduler", "prev_timestep", np.int64(100)),
    ("UnCLIPScheduler", "prev_timestep", torch.tensor([100])),
    ("FlowMapEulerDiscreteScheduler", "r_timestep", torch.linspace(100, 200, SHAPE[0])),
    ("FlowMapEulerDiscreteScheduler", "r_timestep", np.float32(100)),
    ("FlowMapEulerDiscreteScheduler", "r_timestep", True),
]


@pytest.mark.parametrize(("name", "argument", "value"), _OTHER_TIMES, ids=str)
def test_another_time_in_the_middle(name: str, argument: str, value: Any) -> None:
    """A timestep argument that is no number, where it was absent the times before, is left to the stock step."""
    if name not in AVAILABLE:
        pytest.skip(f"this Diffusers has no {name}")
    samples = []
    for patched in (False, True):
        scheduler = make(name, patched)
        for generation in range(3):
            set_timesteps(scheduler, 5)
            sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            for index in range(4):
                other = generation == 2 and index == 2
                torch.manual_seed(index)
                sample = scheduler.step(sample.flip(0), scheduler.timesteps[index], sample,
                                        **{argument: value if other else None}).prev_sample
                if patched:
                    assert served(scheduler).startswith("stock: " + argument) is other
            samples.append(sample)
    assert all(error(ours, theirs) < 1e-5 for theirs, ours in zip(samples[:3], samples[3:], strict=True))
    assert error(samples[2], samples[1]) > 1e-3


def _shrink(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:1].clone()


@pytest.mark.kernel
@pytest.mark.parametrize("how", ["batch", "in place"])
def test_history_of_another_shape(how: str) -> None:
    """Stock broadcasts it; a kernel would read past its end. The steps themselves are known."""
    x = torch.randn((4, *SHAPE[1:]), generator=torch.Generator().manual_seed(0))
    results = []
    for patched in (False, True):
        scheduler = make(DPM, patched)
        for generation in range(3):
            scheduler.set_timesteps(3)
            last = generation == 2
            for index, t in enumerate(scheduler.timesteps):
                count = 1 if last and index == 0 and how == "batch" else 4
                if last and index == 1 and how == "in place":
                    _shrink(scheduler.model_outputs[-1])
                sample = scheduler.step(x[:count], t, x[:count].flip(1)).prev_sample
                if patched:
                    reason = "stock: a history tensor differs from the sample in shape or device"
                    assert served(scheduler) == (reason if last and index else "cpu")
            results.append(sample)
    assert error(results[5], results[2]) < 1e-6
    assert error(results[2], results[1]) < 1e-6 or how == "in place"

"""The probe: known closed forms, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from test_trajectories import assert_same_books
from torch import Tensor
from trajectory import error, make, run

from fastdiff.patching._site import site_of
from fastdiff.schedulers import plan, stepper
from fastdiff.schedulers.probe import Call, LinearStep, Moment, NotLinear, probe, twin_of
from fastdiff.schedulers.samplers import SAMPLERS, Sampler

F32, F16 = torch.float32, torch.float16


def probe_of(scheduler: Any, sampler: Sampler | None = None, **call: Any) -> LinearStep:
    sampler = sampler or SAMPLERS[type(scheduler).__name__]
    fields: dict[str, Any] = {"timestep": None, "begin": None, "sample": F32, "model_output": F32,
                              "noise": None, "state": (), "history": (), "past": (), "scalars": (),
                              "timesteps": (), "return_dict": True}
    return probe(twin_of(scheduler, sampler, ()), sampler, Call(**{**fields, **call}))


def test_ddim_closed_form() -> None:
    """x' = sqrt(a'/a) x + (sqrt(1-a') - sqrt(a'(1-a)/a)) e"""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    step = probe_of(scheduler, timestep=Moment(500, None), scalars=(0.0, False))
    a, b = (scheduler.alphas_cumprod[t].item() for t in (500, 400))
    expected = math.sqrt(b / a), math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)
    assert step.computed[0].coefficients == pytest.approx((*expected, 0, 0, 0), rel=1e-5)
    assert step.drawn == ()
    assert step.clamp is None


def test_dpm_closed_form() -> None:
    """x' = s'/s x - alpha'(e^-h - 1) [(1 + 1/2r) m0 - 1/2r m1], with m0 = (x - s e) / alpha"""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    step = probe_of(scheduler, sample=F16, model_output=F16, state=(5, 2), history=((F16, F16),))
    alpha, s = zip(*(map(float, scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])) for i in (4, 5, 6)),
                   strict=True)
    lambdas = [math.log(a / b) for a, b in zip(alpha, s, strict=True)]
    h = lambdas[2] - lambdas[1]
    r = (lambdas[1] - lambdas[0]) / h
    k = -alpha[2] * math.expm1(-h)
    m0, m1 = k * (1 + 0.5 / r), -k * 0.5 / r
    expected = s[2] / s[1] + m0 / alpha[1], -m0 * s[1] / alpha[1], 0, 0, 0, 0, m1
    assert step.computed[0].coefficients == pytest.approx(expected, rel=1e-4)
    assert step.computed[1].coefficients == pytest.approx((1 / alpha[1], -s[1] / alpha[1], 0, 0, 0, 0, 0))
    assert [t.dtype for t in step.computed] == [F16, F16]
    assert dict(step.state) == {"_step_index": 6, "lower_order_nums": 2}


def test_clamp_is_cut_out() -> None:
    scheduler = diffusers.DDPMScheduler(clip_sample_range=0.5)
    scheduler.set_timesteps(10)
    step = probe_of(scheduler, timestep=Moment(500, None), sample=F16, model_output=F16)
    assert step.clamp is not None
    assert (step.clamp.bound, step.clamp.dtype) == (0.5, F16)
    x, m, clamped, noise, second = step.computed[0].coefficients
    assert second == 0
    assert m == 0
    assert min(x, clamped, noise) > 0
    assert step.drawn == (F16,)


def test_probing_draws_no_numbers_and_leaves_the_scheduler() -> None:
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(10)
    before, state = dict(vars(scheduler)), torch.get_rng_state()
    probe_of(scheduler, timestep=Moment(500, None))
    assert torch.equal(state, torch.get_rng_state())
    assert all(vars(scheduler)[k] is v for k, v in before.items())


class Custom(diffusers.DDIMScheduler):
    """A step that ``change`` spoils."""

    change: Any = None

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True) -> Any:
        return type(self).change(self, model_output, sample)


def _touch(scheduler: Any, m: Tensor, x: Tensor) -> Any:
    scheduler.touched = object()
    return (x + m,)


REFUSED = {
    "square": (lambda s, m, x: (x * m,), "not linear"),
    "constant": (lambda s, m, x: (x + 1,), "not linear"),
    "mean": (lambda s, m, x: (x - m.mean(),), "not linear"),
    "neighbour": (lambda s, m, x: (x + m.roll(1, dims=1),), "not linear"),
    "quantile": (lambda s, m, x: (x.clamp(-x.quantile(0.9), x.quantile(0.9)),), "clamps to something other"),
    "one-sided clamp": (lambda s, m, x: (x.clamp(min=0.0),), "clamps to something other"),
    "two clamps": (lambda s, m, x: (x.clamp(-1, 1) + m.clamp(-1, 1),), "clamps twice"),
    "three draws": (lambda s, m, x: (x + sum(torch.randn(x.shape) for _ in range(3)),), "more than twice"),
    "product of draws": (lambda s, m, x: (x + torch.randn(x.shape) * torch.randn(x.shape),), "not linear"),
    "written argument": (lambda s, m, x: (x.mul_(2) + m,), "writes to its arguments"),
    "randn_like": (lambda s, m, x: (x + torch.randn_like(x),), "way of its own"),
    "infinite": (lambda s, m, x: (x / torch.tensor(0.0) + m,), "not finite"),
    "shape": (lambda s, m, x: (torch.cat([x, m]),), "another shape"),
    "state": (_touch, "changes the attribute touched"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Custom, "change", staticmethod(change))
    scheduler = Custom()
    scheduler.set_timesteps(10)
    with pytest.raises(NotLinear, match=reason):
        probe_of(scheduler, Sampler("Custom", by_timestep=True), timestep=Moment(500, None), return_dict=False)


@pytest.mark.parametrize("which", range(3))
def test_a_broken_coefficient_is_seen(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectory test fails if one coefficient is off by a thousandth, or a counter is not kept."""
    plan_of = stepper.plan_of

    def broken(step: LinearStep) -> stepper.Plan:
        plan = plan_of(step)
        if which == 2:
            return plan._replace(state=())
        launch = plan.launches[0]
        values = list(launch.prev if which == 0 else launch.entry)
        values[1] *= 1.001
        return plan._replace(launches=(launch._replace(**{"prev" if which == 0 else "entry": values}),))

    monkeypatch.setattr(stepper, "plan_of", broken)
    name = "DPMSolverMultistepScheduler"
    theirs = run(make(name), torch.float64)

    def compare() -> None:
        for mine, their in zip(run(make(name, True), torch.float64), theirs, strict=True):
            assert_same_books(mine, their, 1e-6)

    with pytest.raises((AssertionError, ValueError)):
        compare()


def test_more_than_two_tensors() -> None:
    """Euler with churn: noise enters the predicted clean sample, so that takes a launch of its own."""
    options: dict[str, Any] = {"step": {"s_churn": 5.0, "s_noise": 1.1}}
    ours = run(make("EulerDiscreteScheduler", True), torch.float64, **options)
    theirs = run(make("EulerDiscreteScheduler"), torch.float64, **options)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["site"] == "eager"
        assert error(mine["pred_original_sample"], their["pred_original_sample"]) < 1e-6
        assert_same_books(mine, their, 1e-6)


@pytest.mark.parametrize(
    ("coefficients", "entry", "expected"),
    [
        ([3.0, -1.5, 0.0, 0.2, 0.5], [2.0, -1.0], [0.0, 0.0, 1.5, 0.2, 0.5]),
        ([3.0, -1.5 - 1e-12, 0.0, 0.2], [2.0, -1.0], None),  # no multiple
        ([3.0, -1.5, 0.1, 0.2], [2.0, -1.0], None),  # the entry, perhaps clamped, has a term of its own
        ([3.0, 0.0, 0.0, 0.2], [2.0, 0.0], None),
        ([3.0, -1.5, 0.0, 0.2], [], None),
    ],
)
def test_by_entry(coefficients: list[float], entry: list[float], expected: list[float] | None) -> None:
    assert plan._by_entry(coefficients, entry) == (expected or coefficients)


def test_unipc_by_entry() -> None:
    """Sample and model output are in both sums through the new entry: two terms less in each."""
    patched = make("UniPCMultistepScheduler", True)
    for _ in range(2):
        run(patched, torch.float32)
    steps = [s for c in site_of(patched).state.schedule.configurations.values() for s in c.steps.values()]
    sums = [row for s in steps for launch in s.plan.launches for row in (launch.prev, launch.kept) if row]
    assert sum(row[:2] == [0.0, 0.0] and row[2] != 0 for row in sums) > len(sums) / 2

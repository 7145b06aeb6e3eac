"""A patched scheduler around the numbers: arguments, errors, changes of configuration, copies, restore."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import AVAILABLE, SHAPE, Walk, error, fields, make, run, scale, served, set_timesteps, x32

from fastdiff.patching import patch, patch_of, unpatch
from fastdiff.patching._site import site_of
from fastdiff.schedulers import SAMPLERS
from fastdiff.schedulers.samplers import STOCK
from fastdiff.schedulers.schedule import MAX_CONFIGURATIONS, REPLACED

DPM = "DPMSolverMultistepScheduler"
CORE = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", DPM)
#: These know the v-prediction, which tests change to.
V_PREDICTION = (*CORE, "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler",
                "SASolverScheduler", "LCMScheduler")
#: Helios counts its steps from 0 whatever the timestep.
FROM_START = ("HeliosScheduler",)
every_sampler = pytest.mark.parametrize("name", AVAILABLE)


def compare(stock: Any, patched: Any, **options: Any) -> None:
    """A trajectory of each in fp64: equal, and every step fused."""
    theirs, ours = run(stock, torch.float64, **options), run(patched, torch.float64, **options)
    assert len(ours) == len(theirs)
    assert {record["site"] for record in ours} == {"eager"}
    assert max(error(a["prev_sample"], b["prev_sample"]) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def one_step(scheduler: Any, dtype: torch.dtype = torch.float32, index: int = 0, **step: Any) -> Any:
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Walk(scheduler, **step).step(index, sample.flip(0), sample)


@pytest.mark.kernel
@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_serves(name: str, dtype: torch.dtype) -> None:
    assert {record["site"] for record in run(make(name, True), dtype)} == {"cpu"}


#: Operations that launch nothing: a timestep picked from the schedule, and expanded.
VIEWS = ("aten.select.int", "aten.expand.default", "aten.slice.Tensor")


class Operations(TorchDispatchMode):
    """Names of the operations dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.kernel
@every_sampler
def test_one_launch_and_no_read(name: str) -> None:
    """The steps of a known configuration dispatch the one operation, and their noise.

    Not the second time yet: what the first has left behind is part of a first step's state.
    """
    scheduler = make(name, True)
    reads = ("aten._local_scalar_dense.default", "aten.nonzero.default")
    for again in (False, False, True):
        set_timesteps(scheduler, 5)
        walk = Walk(scheduler)
        sample = torch.randn(SHAPE)
        for index, t in enumerate(walk.timesteps):
            with Operations() as scaling:
                scale(scheduler, sample, t)
            model_output = torch.randn(SHAPE)
            with Operations() as operations:
                sample = fields(walk.step(index, model_output, sample))["prev_sample"]
            if again:
                seen = [n for n in operations.names if n not in VIEWS]
                if walk.scaled:  # by the walk
                    del seen[: sum(n not in VIEWS for n in scaling.names)]
                draws = [n for n in seen if n.startswith("aten.randn")]
                blend = ["aten.lerp.Tensor"] if SAMPLERS[name].mask else []
                assert seen == [*draws, "fastdiff.scheduler_step.default", *blend]
                assert len(draws) <= (2 if name == "CogVideoXDPMScheduler" else 1)
                if "scale_model_input" in vars(scheduler):
                    assert not set(reads) & set(scaling.names)


@every_sampler
def test_signatures(name: str) -> None:
    stock, patched = make(name), make(name, True)
    for method in vars(patched).keys() & set(REPLACED):
        assert inspect.signature(getattr(patched, method)) == inspect.signature(getattr(stock, method))


@every_sampler
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
)
def test_copies(name: str, how: Callable[[Any], Any]) -> None:
    """A copy is patched, steps by itself, and leaves the original alone."""
    if name == "SASolverScheduler" and how is not copy.deepcopy:
        pytest.skip("its tau_func, a lambda, does not pickle")
    patched = make(name, True)
    run(patched, torch.float64, steps=4)
    twin = how(patched)
    assert twin is not patched
    assert vars(twin)[SAMPLERS[name].method].__self__ is twin
    assert site_of(twin) is not site_of(patched)
    compare(make(name), twin)
    assert patched.timesteps is not twin.timesteps
    unpatch(twin)
    assert not vars(twin).keys() & set(REPLACED)
    compare(make(name), patched)


@every_sampler
def test_restore(name: str) -> None:
    scheduler = make(name)
    before = dict(vars(scheduler))
    patch(scheduler)
    assert type(scheduler).__name__ == name
    unpatch(scheduler)
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[k] is v for k, v in before.items())
    method = SAMPLERS[name].method
    assert getattr(scheduler, method).__func__ is getattr(type(scheduler), method)


@every_sampler
def test_unpatch_in_the_middle(name: str) -> None:
    """The stock step carries on from the state that the fused one left."""
    results = []
    for switch in (False, True):
        scheduler = make(name, switch)
        set_timesteps(scheduler, 6)
        torch.manual_seed(1)
        sample = torch.randn(SHAPE, dtype=torch.float64)
        walk = Walk(scheduler)
        for i in range(len(walk.timesteps)):
            if switch and i == len(walk.timesteps) // 2:
                unpatch(scheduler)
            sample = fields(walk.step(i, torch.randn_like(sample), sample))["prev_sample"]
        results.append(sample)
    assert error(results[1], results[0]) < 1e-6


@every_sampler
def test_from_config_is_stock(name: str) -> None:
    scheduler = make(name, True)
    fresh = type(scheduler).from_config(scheduler.config)
    assert patch_of(fresh) is None
    assert not vars(fresh).keys() & set(REPLACED)
    assert fresh.config == make(name).config


@every_sampler
def test_return_dict(name: str) -> None:
    if name == "ScoreSdeVpScheduler":
        pytest.skip("its step has no such argument")
    for return_dict in (True, False):
        results = []
        for scheduler in (make(name), make(name, True)):
            set_timesteps(scheduler, 4)
            torch.manual_seed(5)
            results.append(one_step(scheduler, return_dict=return_dict))
        theirs, ours = results
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        assert fields(ours).keys() == fields(theirs).keys()


def test_positional_arguments() -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    results = []
    for patched in (False, True):
        scheduler = make("DDIMScheduler", patched)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(x, 500, x, 0.5, True, generator, None, False)[0])
        assert served(scheduler) in ("", "cpu", "eager")
    assert error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("generators", ["none", "one", "list"])
@pytest.mark.parametrize("name", ["DDPMScheduler", DPM])
def test_noise(name: str, generators: str) -> None:
    """The same noise from the same generators; without one, from the global one."""
    config = {"algorithm_type": "sde-dpmsolver++"} if name == DPM else {}
    results, after = [], []
    for patched in (False, True):
        scheduler = make(name, patched, **config)
        scheduler.set_timesteps(4)
        torch.manual_seed(7)
        one = torch.Generator().manual_seed(8)
        many = [torch.Generator().manual_seed(i) for i in range(SHAPE[0])]
        generator = {"none": None, "one": one, "list": many}[generators]
        results.append(one_step(scheduler, torch.bfloat16, generator=generator).prev_sample)
        after.append([torch.get_rng_state(), one.get_state(), many[-1].get_state()])
    assert error(results[1], results[0]) < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


@pytest.mark.parametrize("name", [n for n in AVAILABLE if "_step_index" in SAMPLERS[n].state and n not in FROM_START])
@pytest.mark.parametrize("begin", [None, 4])  # even: pipelines skip whole steps of a sampler of order 2
def test_start_in_the_middle(name: str, begin: int | None) -> None:
    """img2img: by ``set_begin_index`` or by the first timestep seen."""
    results = []
    for patched in (False, True):
        scheduler = make(name, patched)
        set_timesteps(scheduler, 8)
        if begin is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        torch.manual_seed(0)
        sample = torch.randn(SHAPE, dtype=torch.float64)
        walk = Walk(scheduler)
        for index in range(4, len(walk.timesteps)):
            sample = fields(walk.step(index, torch.randn_like(sample), sample))["prev_sample"]
            assert served(scheduler) in ("", "eager")
        results.append(sample)
    assert error(results[1], results[0]) < 1e-6


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


def test_coefficients_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.schedulers import stepper

    probes = []
    probe = stepper.probe
    monkeypatch.setattr(stepper, "probe", lambda *args: probes.append(1) or probe(*args))
    scheduler = make(DPM, True)
    for begin in (None, None, 2):  # it counts on the first step only
        for steps in (6, 7):
            set_timesteps(scheduler, steps)
            if begin is not None:
                scheduler.set_begin_index(begin)
            walk = Walk(scheduler)
            for index in range(begin or 0, steps):
                walk.step(index, x32, x32)
    assert len(probes) == 6 + 7 + 2 * 2
    for steps in range(5, 6 + MAX_CONFIGURATIONS):
        scheduler.set_timesteps(steps)
    state: Any = site_of(scheduler).state  # type: ignore[union-attr]
    assert len(state.schedule.configurations) == MAX_CONFIGURATIONS


@pytest.mark.parametrize("name", [n for n in AVAILABLE if "add_noise" in vars(make(n, True))])
def test_add_noise_leaves_the_tables(name: str) -> None:
    """Stock moves ``alphas_cumprod`` to the samples' device for good; the results are the same."""
    stock, patched = make(name), make(name, True)
    x, t = torch.randn(SHAPE), torch.tensor([3, 500] * 5)
    for method in {"add_noise", "get_velocity"} & vars(patched).keys():
        theirs, ours = (getattr(s, method)(x, x.flip(0), t) for s in (stock, patched))
        assert torch.equal(ours, theirs)
    before = patched.alphas_cumprod
    for scheduler in (stock, patched):
        for _ in range(2):
            noisy = scheduler.add_noise(x.to("meta"), x.to("meta"), t.to("meta"))
            assert noisy.device.type == "meta"
    assert stock.alphas_cumprod.device.type == "meta"
    assert patched.alphas_cumprod is before
    patched.alphas_cumprod.mul_(0.5)  # the moved copy is stale now
    assert torch.equal(patched.add_noise(x, x, t), _halved(name).add_noise(x, x, t))


def _halved(name: str) -> Any:
    scheduler = make(name)
    scheduler.alphas_cumprod.mul_(0.5)
    return scheduler


@pytest.mark.parametrize("name", [n for n in AVAILABLE if "scale_model_input" in vars(make(n, True))])
@pytest.mark.parametrize("start", [None, 0, 2])
def test_scale_model_input(name: str, start: int | None) -> None:
    """The same numbers and books, wherever the trajectory starts."""
    results = []
    for patched in (False, True):
        scheduler = make(name, patched)
        set_timesteps(scheduler, 6)
        if start is not None:
            scheduler.set_begin_index(start)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        t = scheduler.timesteps[start or 3]
        scaled = [scheduler.scale_model_input(x, t), scheduler.scale_model_input(x, timestep=t)]
        results.append((*scaled, scheduler.step_index))
    theirs, ours = results
    assert ours[2] == theirs[2]
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))


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


def test_before_set_timesteps() -> None:
    """The errors, and the DDPM that works without, are stock's."""
    x = torch.randn(SHAPE)
    for name in ("DDIMScheduler", DPM):
        with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
            make(name, True).step(x, 500, x)
    results = []
    for patched in (False, True):
        scheduler = make("DDPMScheduler", patched)
        torch.manual_seed(0)
        results.append(scheduler.step(x, 500, x).prev_sample)
        assert not served(scheduler).startswith("stock")
    assert error(results[1], results[0]) < 1e-6


@pytest.mark.parametrize("name", CORE)
def test_memory_format(name: str) -> None:
    results = []
    for patched in (False, True):
        scheduler = make(name, patched)
        scheduler.set_timesteps(4)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        x = x.to(memory_format=torch.channels_last)
        scale(scheduler, x, scheduler.timesteps[0])
        torch.manual_seed(0)
        results.append(scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
    assert results[0].stride() == results[1].stride()
    assert error(results[1], results[0]) < 1e-6


@every_sampler
def test_mixed_dtypes(name: str) -> None:
    """A float32 sample with half model outputs, as from a denoiser in half precision."""
    results = []
    for patched in (False, True):
        scheduler = make(name, patched)
        set_timesteps(scheduler, 4)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        results.append(fields(Walk(scheduler).step(0, x.flip(0).bfloat16(), x)))
        assert not served(scheduler).startswith("stock")
    for key, value in results[0].items():
        if isinstance(value, torch.Tensor):
            assert results[1][key].dtype == value.dtype
            assert error(results[1][key], value) < 1e-2

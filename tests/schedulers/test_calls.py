"""Ways to call the methods of a patched scheduler: arguments, noise, starts, layouts, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import CORE, DPM, every_sampler, one_step
from trajectory import AVAILABLE, SHAPE, Walk, error, fields, make, scale, served, set_timesteps

from fastdiff.schedulers import SAMPLERS

#: Helios counts its steps from 0 whatever the timestep.
FROM_START = ("HeliosScheduler",)


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

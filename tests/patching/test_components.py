"""Pipelines: components shared, replaced and restored, schedulers set later, failures half way."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from models import (
    ddpm_pipeline,
    is_fused,
    is_stock,
    run_sd,
    sd_pipeline,
)
from torch import Tensor

import fastdiff
from fastdiff.patching import patch_of


def _reason_of_scheduler(pipe: Any) -> str:
    return next(row.reason for row in fastdiff.report(pipe).rows if row.path == "scheduler")


def test_two_pipelines_do_not_see_each_other() -> None:
    patched, other = sd_pipeline(), sd_pipeline()
    eager = run_sd(other)
    fastdiff.patch(patched)
    assert is_stock(other.unet)
    assert is_stock(other.vae)
    assert torch.equal(run_sd(other), eager)
    both = run_sd(patched)
    fastdiff.patch(other)
    fastdiff.unpatch(patched)
    assert torch.equal(run_sd(patched), eager)
    assert torch.equal(run_sd(other), both)


def test_shared_components_are_counted() -> None:
    first = sd_pipeline()
    second = sd_pipeline(unet=first.unet)
    fastdiff.patch(first)
    fastdiff.patch(second)
    fastdiff.unpatch(first)
    assert not is_stock(first.unet)
    assert is_stock(first.vae)
    fastdiff.unpatch(second)
    assert is_stock(first.unet)
    assert is_stock(second.vae)

    fastdiff.patch(first.unet)  # the model has a claim of its own
    fastdiff.patch(first)
    fastdiff.unpatch(first)
    assert not is_stock(first.unet)
    fastdiff.unpatch(first.unet)
    assert is_stock(first.unet)

    fastdiff.patch(first)
    fastdiff.patch(second)
    del second
    gc.collect()
    fastdiff.unpatch(first)  # a deleted pipeline has no claim
    assert is_stock(first.unet)


def test_from_pipe_shares_the_patch() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    other = StableDiffusionPipeline.from_pipe(pipe, requires_safety_checker=False)
    assert other.unet is pipe.unet
    assert not is_stock(other.unet)
    assert torch.equal(run_sd(other), run_sd(pipe))
    with pytest.raises(ValueError, match="not patched"):
        fastdiff.unpatch(other)  # it made no claim
    fastdiff.patch(other)
    fastdiff.unpatch(pipe)
    expected = run_sd(other)
    assert is_fused(other)
    fastdiff.unpatch(other)
    assert is_stock(other.unet)
    assert not torch.equal(run_sd(other), expected)


def test_replaced_component_is_restored_too() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    old = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(old.config)
    assert "the pipeline's next call patches it" in _reason_of_scheduler(pipe)
    fastdiff.unpatch(pipe)
    assert patch_of(old) is None
    assert "step" not in vars(old)
    assert "progress_bar" not in vars(pipe)


def test_scheduler_set_after_patching() -> None:
    """The next call patches it, with the options of the pipeline, and lets the old one go."""
    pipe = fastdiff.patch(sd_pipeline(), backend="eager")
    run_sd(pipe)
    old = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(old.config)
    assert patch_of(pipe.scheduler) is None
    results = [run_sd(pipe), run_sd(pipe)]
    assert torch.equal(*results)
    found = patch_of(pipe.scheduler)
    assert found is not None
    assert found.sites[0].served["step"].reason == "use_backend('eager') is in effect"
    assert patch_of(old) is None
    fastdiff.unpatch(pipe.scheduler)  # by itself: the pipeline leaves it so
    run_sd(pipe)
    assert patch_of(pipe.scheduler) is None
    pipe.scheduler = old
    copied = copy.deepcopy(pipe)
    for p in (pipe, copied):
        run_sd(p)
        assert patch_of(p.scheduler) is not None
        fastdiff.unpatch(p)
        assert patch_of(p.scheduler) is None
        assert "progress_bar" not in vars(p)
    stock = sd_pipeline()
    stock.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    torch.testing.assert_close(results[0], run_sd(stock), rtol=1e-3, atol=1e-3)


def test_a_shared_scheduler_that_one_pipeline_drops_stays_patched() -> None:
    first = sd_pipeline()
    second = sd_pipeline(scheduler=first.scheduler)
    fastdiff.patch(first)
    fastdiff.patch(second)
    first.scheduler = EulerDiscreteScheduler.from_config(first.scheduler.config)
    run_sd(first)
    assert patch_of(second.scheduler) is not None
    with fastdiff.patched(second, backend="eager"):
        second.scheduler = EulerDiscreteScheduler.from_config(second.scheduler.config)
        run_sd(second)
    fastdiff.unpatch(second)
    assert patch_of(second.scheduler) is None


def test_scheduler_set_within_the_context() -> None:
    pipe = sd_pipeline()
    with fastdiff.patched(pipe):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        run_sd(pipe)
        assert patch_of(pipe.scheduler) is not None
    assert patch_of(pipe.scheduler) is None
    assert "progress_bar" not in vars(pipe)


def test_progress_bar_of_the_user_stays() -> None:
    pipe = sd_pipeline()
    bars: list[Any] = []

    def bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(args)
        return type(pipe).progress_bar(pipe, *args, **kwargs)

    pipe.progress_bar = bar
    fastdiff.patch(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert "patch the pipeline again" in _reason_of_scheduler(pipe)
    run_sd(pipe)
    assert bars
    assert patch_of(pipe.scheduler) is None
    fastdiff.unpatch(pipe)
    assert pipe.progress_bar is bar


def test_ddpm_pipeline_call() -> None:
    pipe: DDPMPipeline = ddpm_pipeline()

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(generator=generator, num_inference_steps=3, output_type="np").images)

    eager = run()
    fastdiff.patch(pipe)
    torch.testing.assert_close(run(), eager, rtol=1e-3, atol=1e-3)
    assert is_fused(pipe)
    fastdiff.unpatch(pipe)
    assert torch.equal(run(), eager)


def _half_way(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    """``call`` with an error at the scheduler, after the models."""
    from fastdiff import schedulers

    def failing(patch: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as inner:
        inner.setattr(schedulers, "install", failing)
        with pytest.raises(MemoryError):
            call()


def test_failure_half_way_through_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd_pipeline()
    _half_way(monkeypatch, lambda: fastdiff.patch(pipe))
    assert is_stock(pipe.unet)
    assert is_stock(pipe.vae)
    assert not any(k.startswith("_fastdiff") for k in [*vars(pipe), *vars(pipe.scheduler)])

    fastdiff.patch(pipe, skip="*attn?")
    earlier = [patch_of(c) for c in (pipe.unet, pipe.vae, pipe.scheduler)]
    expected = run_sd(pipe)
    _half_way(monkeypatch, lambda: fastdiff.patch(pipe, backend="eager"))
    assert [patch_of(c) for c in (pipe.unet, pipe.vae, pipe.scheduler)] == earlier
    assert torch.equal(run_sd(pipe), expected)
    assert "scheduler" in {r.path for r in fastdiff.report(pipe).rows if r.fused}
    fastdiff.unpatch(pipe)
    assert is_stock(pipe.unet)
    assert "step" not in vars(pipe.scheduler)


def test_a_components_own_options_come_back() -> None:
    pipe = sd_pipeline()
    fastdiff.patch(pipe.unet, skip="mid_block*")
    own = patch_of(pipe.unet)
    with fastdiff.patched(pipe, backend="eager"):
        assert patch_of(pipe.unet).options.backend == "eager"
    assert patch_of(pipe.unet) is own
    assert patch_of(pipe.vae) is None
    fastdiff.patch(pipe, only="unet*")
    fastdiff.unpatch(pipe)
    assert patch_of(pipe.unet).options == own.options
    fastdiff.unpatch(pipe.unet)
    assert is_stock(pipe.unet)

"""Patched models on a GPU: by the kernels of each backend, unasked, checked by verify, and compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.backends import losses, unavailable
from fastdiff.backends.losses import UNPROVEN

sys.path.insert(0, str(Path(__file__).parents[1] / "patching"))

from models import CASES, Case, run_sd, sd_pipeline

BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def made(case: Case, dtype: torch.dtype, device: str = "cuda") -> tuple[Any, dict[str, Any]]:
    """A model on the GPU, and a call of it."""

    def there(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: there(v) for k, v in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return case.build().to(device, dtype), there(case.inputs(torch.Generator().manual_seed(0), dtype))


def served(model: Any, backend: str) -> int:
    """How many places that backend's kernels alone served in the latest call."""
    return sum(set(row.served_by.values()) == {backend} for row in fastdiff.report(model).rows)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY
def test_verified(case: Case, dtype: torch.dtype, backend: str) -> None:
    if backend in unavailable:
        pytest.skip(unavailable[backend])
    model, arguments = made(case, dtype)
    found = fastdiff.verify(fastdiff.patch(model, backend=backend), **arguments)
    assert found, str(found)
    with torch.no_grad():
        model(**arguments)
    assert served(model, backend) >= sum(case.sites.values()) // 2, fastdiff.report(model)


@EVERY
def test_unasked(case: Case) -> None:
    """On a kind of GPU that nothing was measured on: eager, and the report says how to ask for kernels."""
    if losses.kind(torch.device("cuda", 0)) in losses.fastest:
        pytest.skip("kernels were measured on this kind of GPU")
    model, arguments = made(case, torch.bfloat16)
    with torch.no_grad():
        stock = model(**arguments, return_dict=False)[0]
        ours = fastdiff.patch(model)(**arguments, return_dict=False)[0]
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    reasons = [row.reason for row in fastdiff.report(model).rows if row.served_by]
    if {"cuda", "triton"} - unavailable.keys():
        assert reasons and all(UNPROVEN in reason for reason in reasons), reasons


@BACKENDS
def test_a_pipeline(backend: str) -> None:
    """Denoiser, VAE and sampler."""
    if backend in unavailable:
        pytest.skip(unavailable[backend])
    pipes = [sd_pipeline().to("cuda") for _ in range(2)]
    fastdiff.patch(pipes[0], backend=backend)
    ours, stock = (run_sd(pipe, 0, num_inference_steps=3) for pipe in pipes)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    for component in ("unet", "scheduler"):
        assert served(getattr(pipes[0], component), backend), fastdiff.report(pipes[0])


@pytest.mark.parametrize("backend", [None, "cuda", "triton"])
@pytest.mark.parametrize("name", ["DiT", "DDPM"])
def test_compiled(name: str, backend: str | None) -> None:
    """One graph, by the real inductor, with the results of the patched model."""
    if backend in unavailable:
        pytest.skip(unavailable[str(backend)])
    model, arguments = made(next(case for case in CASES if case.name == name), torch.float32)
    fastdiff.patch(model, backend=backend)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
        got = torch.compile(model, fullgraph=True)(**arguments, return_dict=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

"""The demo pipeline's pictures under samplers of every kind: the fused step draws what the stock one draws."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.demo import PROMPTS, load_pipeline

SAMPLERS = {
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {"algorithm_type": "data_prediction"},
    "UniPCMultistepScheduler": {"solver_order": 3},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_pictures(name: str) -> None:
    pipe: Any = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for patched in (False, True):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **SAMPLERS[name])
        if patched:
            fastdiff.patch(pipe.scheduler)
        generator = torch.Generator().manual_seed(1)
        pictures.append(pipe(list(PROMPTS[:2]), generator=generator, num_inference_steps=8, output_type="np").images)
    row = fastdiff.report(pipe.scheduler).rows[0]
    assert row.backend in ("cpu", "eager")  # the latter where there are no kernels
    assert "call" not in row.served_by  # the stock step
    assert np.abs(pictures[1] - pictures[0]).max() < 2e-3
    assert pictures[0].std() > 0.05

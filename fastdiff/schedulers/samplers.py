"""The samplers whose step is fused, and what each step reads and changes besides its linear map.

The coefficients come from the scheduler itself (:mod:`fastdiff.schedulers.probe`), so a row holds no formula,
only names: which attributes count the steps, which keep tensors between steps, which arguments of ``step``
shape the map. A probe that finds the step changing anything else refuses it, so a row cannot go stale unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _never(scheduler: Any, timestep: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Sampler:
    """What the step of one scheduler class depends on.

    Attributes:
        name: the class, as Diffusers exports it.
        state: attributes without tensors that the step reads and may change (counters).
        history: attributes that keep tensors between steps: a tensor, or a list of tensors and ``None``.
        by_timestep: the step depends on the value of its ``timestep`` argument. The others count
            ``_step_index`` and look at ``timestep`` on the first step only.
        scalars: arguments of ``step`` that enter the coefficients.
        noise: the argument of ``step`` that takes the noise in place of drawing it, if there is one.
        refuse: why a call is left to the stock step, from (scheduler, timestep); ``None`` if it is not.
    """

    name: str
    state: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    by_timestep: bool = False
    scalars: tuple[str, ...] = ()
    noise: str | None = None
    refuse: Callable[[Any, Any], str | None] = _never


def _refuse_integer(scheduler: Any, timestep: Any) -> str | None:
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        return "timestep is an integer"  # an error in the stock step
    return None


def _refuse_euler(scheduler: Any, timestep: Any) -> str | None:
    if reason := _refuse_integer(scheduler, timestep):
        return reason
    if not scheduler.is_scale_input_called:
        return "scale_model_input was not called"  # the stock step warns
    return None


_EULER = ("_step_index", "is_scale_input_called")
_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_MULTISTEP = ("_step_index", "lower_order_nums")

SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        Sampler("DDPMScheduler", by_timestep=True),
        Sampler("DDPMParallelScheduler", by_timestep=True),
        Sampler("DDIMScheduler", by_timestep=True, scalars=("eta", "use_clipped_model_output"),
                noise="variance_noise"),
        Sampler("DDIMParallelScheduler", by_timestep=True, scalars=("eta", "use_clipped_model_output"),
                noise="variance_noise"),
        Sampler("DDIMInverseScheduler", by_timestep=True),
        Sampler("CogVideoXDDIMScheduler", by_timestep=True, scalars=("eta", "use_clipped_model_output"),
                noise="variance_noise"),
        Sampler("EulerDiscreteScheduler", state=_EULER, scalars=_CHURN, refuse=_refuse_euler),
        Sampler("EulerAncestralDiscreteScheduler", state=_EULER, refuse=_refuse_euler),
        Sampler("EDMEulerScheduler", state=_EULER, scalars=_CHURN, refuse=_refuse_euler),
        Sampler("FlowMatchEulerDiscreteScheduler", state=("_step_index",), scalars=_CHURN,
                refuse=_refuse_integer),
        Sampler("DPMSolverMultistepScheduler", state=_MULTISTEP, history=("model_outputs",),
                noise="variance_noise"),
        Sampler("DPMSolverMultistepInverseScheduler", state=_MULTISTEP, history=("model_outputs",),
                noise="variance_noise"),
        Sampler("DPMSolverSinglestepScheduler", state=("_step_index",), history=("model_outputs", "sample")),
        Sampler("DEISMultistepScheduler", state=_MULTISTEP, history=("model_outputs",)),
        Sampler("EDMDPMSolverMultistepScheduler", state=_MULTISTEP, history=("model_outputs",)),
        Sampler("KDPM2DiscreteScheduler", state=("_step_index",), history=("sample",)),
        Sampler("LCMScheduler", by_timestep=True, state=("_step_index", "sigma_data")),
        Sampler("TCDScheduler", by_timestep=True, state=("_step_index",), scalars=("eta",)),
    )
}


def unsupported(scheduler: Any) -> str | None:
    """Why no step of this configuration can be fused; ``None`` if nothing speaks against it."""
    config = scheduler.config
    if getattr(config, "thresholding", False):
        return "dynamic thresholding is not linear"
    # DDPM keeps a copy that its step reads; on the others, getattr of a missing attribute warns.
    variance = vars(scheduler).get("variance_type") or getattr(config, "variance_type", None)
    if variance in ("learned", "learned_range"):
        return "the variance is learned"
    return None

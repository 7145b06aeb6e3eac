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
        name: the class.
        state: attributes without tensors of a sample's shape that the step reads and may change (counters).
        history: attributes that keep tensors between steps: a tensor, or a list of tensors and ``None``.
        past: the attribute that lists the timesteps of earlier steps.
        by_timestep: the step depends on the value of its ``timestep`` argument. The others count
            ``_step_index`` and look at ``timestep`` on the first step only.
        per_sample: ``timestep`` is a vector, one entry per sample; fused where it is one number, expanded.
        scalars: arguments of the step that enter the coefficients.
        timesteps: further arguments that are timesteps.
        tensors: further arguments that enter linearly, like history.
        noise: the argument of the step that takes the noise in place of drawing it, if there is one.
        mask: the argument that blends two next samples, each linear: the one where it is 0, the other where it is 1.
        method: the method that steps.
        names: its names of model output, timestep and sample.
        refuse: why a call is left to the stock step, from (scheduler, timestep); ``None`` if it is not.
        others: further methods that stay stock, and why.
    """

    name: str
    state: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    past: str | None = None
    by_timestep: bool = False
    per_sample: bool = False
    scalars: tuple[str, ...] = ()
    timesteps: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    noise: str | None = None
    mask: str | None = None
    method: str = "step"
    names: tuple[str, str, str] = ("model_output", "timestep", "sample")
    refuse: Callable[[Any, Any], str | None] = _never
    others: tuple[tuple[str, str], ...] = ()


def _refuse_integer(scheduler: Any, timestep: Any) -> str | None:
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        return "timestep is an integer"  # an error in the stock step
    return None


def _refuse_unscaled(scheduler: Any, timestep: Any) -> str | None:
    if not scheduler.is_scale_input_called:
        return "scale_model_input was not called"  # the stock step warns
    return None


def _refuse_euler(scheduler: Any, timestep: Any) -> str | None:
    return _refuse_integer(scheduler, timestep) or _refuse_unscaled(scheduler, timestep)


_INDEX = ("_step_index",)
_SCALED = ("_step_index", "is_scale_input_called")
_MULTISTEP = ("_step_index", "lower_order_nums")
_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
_DDIM = ("eta", "use_clipped_model_output")
_CORRECTOR = "its step size is a ratio of norms"

SAMPLERS: dict[str, Sampler] = {
    row.name: row
    for row in (
        Sampler("DDPMScheduler", by_timestep=True),
        Sampler("DDPMParallelScheduler", by_timestep=True),
        Sampler("DDPMWuerstchenScheduler", by_timestep=True, per_sample=True),
        Sampler("UnCLIPScheduler", by_timestep=True, timesteps=("prev_timestep",)),
        Sampler("DDIMScheduler", by_timestep=True, scalars=_DDIM, noise="variance_noise"),
        Sampler("DDIMParallelScheduler", by_timestep=True, scalars=_DDIM, noise="variance_noise"),
        Sampler("DDIMInverseScheduler", by_timestep=True),
        Sampler("CogVideoXDDIMScheduler", by_timestep=True, scalars=_DDIM, noise="variance_noise"),
        # Its step ignores eta, use_clipped_model_output and variance_noise.
        Sampler("CogVideoXDPMScheduler", by_timestep=True, scalars=_DDIM, timesteps=("timestep_back",),
                tensors=("old_pred_original_sample",)),
        Sampler("RePaintScheduler", by_timestep=True, tensors=("original_image",), mask="mask",
                others=(("undo_step", "it adds as many draws of noise as a step has timesteps"),)),
        Sampler("PNDMScheduler", by_timestep=True, state=("counter",),
                history=("ets", "cur_model_output", "cur_sample")),
        Sampler("IPNDMScheduler", state=_INDEX, history=("ets",)),
        Sampler("EulerDiscreteScheduler", state=_SCALED, scalars=_CHURN, refuse=_refuse_euler),
        Sampler("EulerAncestralDiscreteScheduler", state=_SCALED, refuse=_refuse_euler),
        Sampler("EDMEulerScheduler", state=_SCALED, scalars=_CHURN, refuse=_refuse_euler),
        Sampler("LMSDiscreteScheduler", state=_SCALED, history=("derivatives",), scalars=("order",),
                refuse=_refuse_unscaled),
        Sampler("HeunDiscreteScheduler", state=("_step_index", "dt"), history=("prev_derivative", "sample")),
        Sampler("KDPM2DiscreteScheduler", state=_INDEX, history=("sample",)),
        Sampler("KDPM2AncestralDiscreteScheduler", state=("_step_index", "dt"), history=("sample",)),
        Sampler("DPMSolverMultistepScheduler", state=_MULTISTEP, history=("model_outputs",),
                noise="variance_noise"),
        Sampler("DPMSolverMultistepInverseScheduler", state=_MULTISTEP, history=("model_outputs",),
                noise="variance_noise"),
        Sampler("DPMSolverSinglestepScheduler", state=_INDEX, history=("model_outputs", "sample")),
        Sampler("DEISMultistepScheduler", state=_MULTISTEP, history=("model_outputs",)),
        Sampler("EDMDPMSolverMultistepScheduler", state=_MULTISTEP, history=("model_outputs",)),
        Sampler("UniPCMultistepScheduler", state=(*_MULTISTEP, "this_order"),
                history=("model_outputs", "last_sample"), past="timestep_list"),
        # By timestep, and earlier ones, because tau_func takes them.
        Sampler("SASolverScheduler", by_timestep=True, past="timestep_list",
                state=(*_MULTISTEP, "this_predictor_order", "this_corrector_order"),
                history=("model_outputs", "last_sample", "last_noise")),
        Sampler("FlowMatchEulerDiscreteScheduler", state=_INDEX, scalars=_CHURN, refuse=_refuse_integer),
        Sampler("FlowMatchHeunDiscreteScheduler", state=("_step_index", "dt"),
                history=("prev_derivative", "sample"), scalars=_CHURN, refuse=_refuse_integer),
        Sampler("FlowMatchLCMScheduler", state=("_step_index", "_init_size"), refuse=_refuse_integer),
        Sampler("FlowMapEulerDiscreteScheduler", by_timestep=True, state=_INDEX, timesteps=("r_timestep",)),
        Sampler("LTXEulerAncestralRFScheduler", state=_INDEX, refuse=_refuse_integer),
        Sampler("MiniMaxH3Scheduler", by_timestep=True, state=_INDEX, refuse=_refuse_integer),
        Sampler("HeliosScheduler", state=(*_MULTISTEP, "this_order"), history=("model_outputs", "last_sample"),
                past="timestep_list"),
        Sampler("LCMScheduler", by_timestep=True, state=("_step_index", "sigma_data")),
        Sampler("TCDScheduler", by_timestep=True, state=_INDEX, scalars=("eta",)),
        Sampler("CMStochasticIterativeScheduler", state=_SCALED, refuse=_refuse_euler),
        Sampler("ConsistencyDecoderScheduler", by_timestep=True),
        Sampler("SCMScheduler", state=_INDEX),
        Sampler("ScoreSdeVeScheduler", by_timestep=True, method="step_pred", others=(("step_correct", _CORRECTOR),)),
        Sampler("ScoreSdeVpScheduler", by_timestep=True, method="step_pred", names=("score", "t", "x")),
        Sampler("KarrasVeScheduler", by_timestep=True, scalars=("sigma_prev",),
                names=("model_output", "sigma_hat", "sample_hat"),
                others=(("step_correct", "only the first of the two methods that step is fused"),)),
    )
}

#: Why the step of the other classes is not fused.
STOCK = {
    "AmusedScheduler": "it samples tokens",
    "BlockRefinementScheduler": "it samples tokens",
    "CosineDPMSolverMultistepScheduler": "a Brownian tree draws its noise",
    "DiscreteDDIMScheduler": "it samples tokens",
    "DPMSolverSDEScheduler": "a Brownian tree draws its noise",
    "EntropyBoundScheduler": "it samples tokens",
    "HeliosDMDScheduler": "it searches the timestep in tensors that the caller passes",
    "PiflowScheduler": "a policy takes many steps inside, which are not linear",
    "RFD4ProteinaScheduler": "a mask multiplies the sample",
    "VQDiffusionScheduler": "it samples tokens",
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
    if vars(scheduler).get("solver_p") is not None:
        return "solver_p, another sampler, predicts"
    if vars(scheduler).get("_scale_factors"):
        return "scale_factors resize the sample between steps"
    return None

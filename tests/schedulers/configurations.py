"""The options under which trajectories are compared: (scheduler, configuration, set_timesteps, step)."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import diffusers.schedulers
from trajectory import AVAILABLE

from fastdiff.schedulers.samplers import SAMPLERS, STOCK

Configuration = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]

ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
#: Options that leave a step stock: thresholding, learned variance, another sampler inside, ...
STOCK_OPTIONS = ("thresholding", "variance_type", "solver_p", "scale_factors", "per_token_timesteps")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def _each(**options: Any) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _configurations() -> list[Configuration]:
    found: list[Configuration] = []

    def add(name: str, config: dict[str, Any], schedule: dict[str, Any] | None = None,
            **step: Any) -> None:
        if name in AVAILABLE:
            found.append((name, config, schedule or {"steps": 8}, step))

    for config in _each(prediction_type=PREDICTIONS, clip_sample=(True, False)):
        add("DDPMScheduler", config)
        add("DDIMScheduler", config)
        add("DDIMScheduler", config, eta=0.7)
    ddpm = "DDPMScheduler"
    for variance in ("fixed_small_log", "fixed_large"):
        add(ddpm, {"variance_type": variance})
    add(ddpm, {"clip_sample_range": 2.5, "beta_schedule": "squaredcos_cap_v2"})
    for spacing in ("linspace", "trailing"):
        add(ddpm, {"timestep_spacing": spacing, "beta_schedule": "scaled_linear"})
    add(ddpm, ZERO_SNR)
    add(ddpm, {}, {"timesteps": [900, 500, 200, 30, 1]})

    ddim = "DDIMScheduler"
    add(ddim, {}, eta=1.0, use_clipped_model_output=True)
    add(ddim, {}, use_clipped_model_output=True)
    add(ddim, {}, eta=0.5, variance_noise=None)
    add(ddim, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
               "beta_schedule": "scaled_linear"})
    add(ddim, {"clip_sample_range": 0.3, "timestep_spacing": "linspace"})
    add(ddim, ZERO_SNR)

    euler = "EulerDiscreteScheduler"
    for config in _each(prediction_type=PREDICTIONS, timestep_spacing=("linspace", "leading")):
        add(euler, config)
    for sigmas in ("use_karras_sigmas", "use_exponential_sigmas", "rescale_betas_zero_snr"):
        add(euler, {sigmas: True, "timestep_spacing": "trailing"})
    add(euler, {"interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"})
    add(euler, {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
                "sigma_min": 0.002, "sigma_max": 700.0})
    add(euler, {}, {"timesteps": [999.0, 700.0, 333.0, 20.0]})
    add(euler, {}, {"sigmas": [14.6, 5.0, 1.2, 0.3, 0.0]})

    dpm = "DPMSolverMultistepScheduler"
    for config in _each(solver_order=(1, 2, 3), solver_type=("midpoint", "heun"),
                        algorithm_type=("dpmsolver++", "sde-dpmsolver++")):
        add(dpm, config)
    for config in _each(algorithm_type=("dpmsolver", "sde-dpmsolver"), solver_type=("midpoint", "heun")):
        add(dpm, {**config, "final_sigmas_type": "sigma_min"})
    add(dpm, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3})
    for prediction in ("sample", "v_prediction", "flow_prediction"):
        add(dpm, {"prediction_type": prediction})
    for prediction in ("sample", "v_prediction"):
        add(dpm, {"prediction_type": prediction, "algorithm_type": "dpmsolver",
                  "final_sigmas_type": "sigma_min"})
    for sigmas in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"):
        add(dpm, {sigmas: True, "final_sigmas_type": "sigma_min"})
        add(dpm, {sigmas: True})
    add(dpm, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"})
    add(dpm, {"solver_order": 3, "lower_order_final": False}, {"steps": 20})
    add(dpm, {"solver_order": 3}, {"steps": 20})
    add(dpm, {"euler_at_final": True, "timestep_spacing": "trailing"})
    add(dpm, {"lower_order_final": False, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading",
              "steps_offset": 1})
    add(dpm, ZERO_SNR)
    add(dpm, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1})
    add(dpm, {}, {"timesteps": [999, 700, 333, 20]})
    add(dpm, {"algorithm_type": "sde-dpmsolver++"}, variance_noise=None)

    for name in ("DDPMParallelScheduler", "DDIMInverseScheduler", "CogVideoXDDIMScheduler"):
        for prediction in ("epsilon", "v_prediction"):
            add(name, {"prediction_type": prediction})
    add("DDIMParallelScheduler", {}, eta=0.5)
    for prediction in ("epsilon", "v_prediction"):
        add("EulerAncestralDiscreteScheduler", {"prediction_type": prediction})
        add("KDPM2DiscreteScheduler", {"prediction_type": prediction})
        add("EDMEulerScheduler", {"prediction_type": prediction})
    add("EDMEulerScheduler", {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"})
    add("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    add("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True},
        {"sigmas": [1.0, 0.7, 0.4, 0.1], "mu": 0.8})
    for order in (1, 2, 3):
        add("DPMSolverSinglestepScheduler", {"solver_order": order})
        add("DEISMultistepScheduler", {"solver_order": order})
        add("EDMDPMSolverMultistepScheduler", {"solver_order": order})
        add("DPMSolverMultistepInverseScheduler", {"solver_order": order})
    add("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True})
    add("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})
    for prediction in PREDICTIONS:
        add("LCMScheduler", {"prediction_type": prediction})
        add("TCDScheduler", {"prediction_type": prediction}, eta=0.3)
    add("LCMScheduler", {"clip_sample": True})

    for prediction in ("epsilon", "v_prediction"):
        for skip in (True, False):
            add("PNDMScheduler", {"prediction_type": prediction, "skip_prk_steps": skip}, {"steps": 9})
        add("KDPM2AncestralDiscreteScheduler", {"prediction_type": prediction})
    add("PNDMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True, "skip_prk_steps": True})
    add("IPNDMScheduler", {})
    for prediction in PREDICTIONS:
        add("LMSDiscreteScheduler", {"prediction_type": prediction})
        add("HeunDiscreteScheduler", {"prediction_type": prediction})
    add("LMSDiscreteScheduler", {}, order=2)
    add("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.7})
    add("HeunDiscreteScheduler", {}, {"timesteps": [999, 700, 333, 20]})

    unipc = "UniPCMultistepScheduler"
    for config in _each(solver_order=(1, 2, 3), solver_type=("bh1", "bh2"), predict_x0=(True, False)):
        # Stock ends in NaN at a last sigma of 0 in all cases but this one.
        finite = config["predict_x0"] and config["solver_type"] == "bh2"
        add(unipc, config if finite else {**config, "final_sigmas_type": "sigma_min"})
    for prediction in ("sample", "v_prediction"):
        for predict_x0 in (True, False):
            add(unipc, {"prediction_type": prediction, "predict_x0": predict_x0, "solver_order": 3,
                        "final_sigmas_type": "zero" if predict_x0 else "sigma_min"})
    add(unipc, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"})
    add(unipc, {"disable_corrector": [0, 2], "lower_order_final": False, "final_sigmas_type": "sigma_min"})
    add(unipc, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"})
    add(unipc, {"solver_order": 3}, {"steps": 20})

    sa = "SASolverScheduler"
    for config in _each(predictor_order=(1, 2, 3), corrector_order=(1, 3),
                        algorithm_type=("data_prediction", "noise_prediction")):
        add(sa, config)
    for prediction in ("sample", "v_prediction"):
        add(sa, {"prediction_type": prediction, "corrector_order": 4, "predictor_order": 3})
    add(sa, {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"})
    add(sa, {"lower_order_final": False, "tau_func": _tau})

    for name in ("LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", sa, unipc, dpm,
                 "KDPM2AncestralDiscreteScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
                 "DPMSolverMultistepInverseScheduler", euler, "FlowMatchEulerDiscreteScheduler"):
        for sigmas in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            add(name, {sigmas: True})
        if "FlowMatch" not in name and "Singlestep" not in name:
            add(name, {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"})
    add("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"})

    if "randn_tensor" in diffusers.FlowMatchEulerDiscreteScheduler.step.__code__.co_names:
        # Older versions draw this noise without the generator, and stay stock.
        add("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})
    add("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True})
    add("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1, "use_dynamic_shifting": True},
        {"steps": 8, "mu": 0.7})
    add("FlowMatchEulerDiscreteScheduler", {}, s_churn=5.0, s_noise=1.1)  # which it ignores
    add("FlowMatchHeunDiscreteScheduler", {"shift": 3.0})
    add("FlowMatchLCMScheduler", {"shift": 3.0})
    add("FlowMatchLCMScheduler", {"use_beta_sigmas": True})
    add("FlowMapEulerDiscreteScheduler", {"shift": 5.0})
    for eta in (0.0, 0.6, 1.0):
        add("LTXEulerAncestralRFScheduler", {"eta": eta})
    add("MiniMaxH3Scheduler", {})
    for kind in ("unipc", "euler"):
        add("HeliosScheduler", {"scheduler_type": kind})
    add("HeliosScheduler", {"stages": 1, "scheduler_type": "euler", "shift": 2.0})
    add("HeliosScheduler", {"solver_order": 3, "solver_type": "bh2"}, {"steps": 8, "stage_index": 2})
    for clip in (True, False):
        add("CMStochasticIterativeScheduler", {"clip_denoised": clip})
    add("CMStochasticIterativeScheduler", {}, {"timesteps": [22, 0]})
    add("CMStochasticIterativeScheduler", {}, {"steps": 1})
    add("ConsistencyDecoderScheduler", {})
    add("SCMScheduler", {})
    add("SCMScheduler", {}, {"steps": 2, "intermediate_timesteps": 1.3})
    for prediction in ("epsilon", "sample"):
        add("UnCLIPScheduler", {"prediction_type": prediction, "clip_sample_range": 3.0})
    add("UnCLIPScheduler", {"prediction_type": "sample", "clip_sample": False})
    for prediction in PREDICTIONS:
        add("CogVideoXDPMScheduler", {"prediction_type": prediction})
    add("CogVideoXDPMScheduler", {**ZERO_SNR, "snr_shift_scale": 1.0})
    add("CogVideoXDPMScheduler", {}, return_dict=True)
    add("ScoreSdeVeScheduler", {"num_train_timesteps": 8})
    add("ScoreSdeVpScheduler", {})
    for eta in (0.0, 1.0):
        add("RePaintScheduler", {"eta": eta})
    add("RePaintScheduler", {"eta": 0.5, "clip_sample": False, "beta_schedule": "scaled_linear"})
    add("RePaintScheduler", {}, {"steps": 8, "jump_length": 3, "jump_n_sample": 2})  # goes back in time
    add("KarrasVeScheduler", {"sigma_min": 1.0})
    add("DDPMWuerstchenScheduler", {})
    add("DDPMWuerstchenScheduler", {"scaler": 2.0})
    for name in ("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler"):
        add(name, {}, s_churn=5.0, s_noise=1.1)
    for prediction in ("sample", "v_prediction"):
        for name in ("DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler"):
            add(name, {"prediction_type": prediction})
    add("DDIMInverseScheduler", {"clip_sample": False})  # stock divides by 0 where it predicts the sample
    add("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"})
    add("EulerAncestralDiscreteScheduler", ZERO_SNR)
    for name in ("DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler"):
        add(name, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"})
    return found


def _tau(t: Any) -> float:
    return 0.5 if t > 400 else 1.0


CONFIGURATIONS = _configurations()


def label(configuration: Configuration) -> str:
    """A test id."""
    name, config, schedule, step = configuration
    parts = [f"{k}={getattr(v, '__name__', v)}" for k, v in {**config, **step}.items()]
    if schedule != {"steps": 8}:
        parts.append("-".join(f"{k}" for k in schedule))
    return "-".join([name.removesuffix("Scheduler"), *parts])


def left_stock() -> list[tuple[str, str]]:
    """What stays stock of the samplers that this Diffusers has: (class, option)."""
    found = [(name, "all") for name in STOCK if hasattr(diffusers.schedulers, name)]
    for name in AVAILABLE:
        cls, sampler = getattr(diffusers.schedulers, name), SAMPLERS[name]
        known = [name for f in (cls.__init__, getattr(cls, sampler.method)) for name in inspect.signature(f).parameters]
        found += [(name, option) for option in STOCK_OPTIONS if option in known]
        found += [(name, method) for method, _ in sampler.others]
    return found

"""Whole trajectories of a scheduler on given model outputs, and stock ones that do not round inside."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.patching import patch
from fastdiff.patching._patch import PATCH
from fastdiff.patching._site import SITE
from fastdiff.schedulers.stepper import REPLACED

#: A batch of ten stands for ten seeds.
SHAPE = (10, 3, 6, 5)


_made: dict[tuple[str, str], Any] = {}


def make(name: str, patched: bool = False, **config: Any) -> Any:
    """A scheduler of its own; some take a second to construct, so they are copies of one."""
    key = name, repr(config)
    if key not in _made:
        _made[key] = getattr(diffusers, name)(**config)
    scheduler = copy.deepcopy(_made[key])
    return patch(scheduler) if patched else scheduler


def run(
    scheduler: Any,
    dtype: torch.dtype,
    *,
    steps: int | None = 8,
    seed: int = 0,
    wide: bool = False,
    inputs_dtype: torch.dtype | None = None,
    set_timesteps: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sample with random model outputs; per step the result, and the attributes the step left behind.

    Args:
        dtype: of sample and model outputs.
        wide: inputs are those of ``inputs_dtype``, computed on in fp64.
        set_timesteps, step: further arguments.
    """
    inputs = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    scheduler.set_timesteps(**(set_timesteps or {"num_inference_steps": steps}))

    def draw(scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(SHAPE, generator=inputs, dtype=torch.float64)
        return x.to(inputs_dtype or dtype).to(dtype)

    sample = draw(float(getattr(scheduler, "init_noise_sigma", 1.0)))
    arguments = dict(step or {})
    if "generator" in inspect.signature(scheduler.step).parameters and "variance_noise" not in arguments:
        arguments["generator"] = noise
    records = []
    for t in scheduler.timesteps:
        scale(scheduler, sample, t)
        if "variance_noise" in arguments:
            arguments["variance_noise"] = draw()
        model_output = draw()
        if wide:
            with Wide(inputs_dtype or dtype):
                out = scheduler.step(model_output, t, sample, **arguments)
        else:
            out = scheduler.step(model_output, t, sample, **arguments)
        sample = out.prev_sample
        records.append({"type": type(out), **out})
        records[-1].update(attributes=attributes(scheduler), site=served(scheduler))
    records[-1]["generator"] = noise.get_state()
    return records


def scale(scheduler: Any, sample: Tensor, t: Tensor) -> None:
    """What pipelines call before the denoiser; flow matching samplers have no such thing."""
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, t)


class Wide(TorchFunctionMode):
    """In fp64, keep a stock step from rounding to fp32, and draw its noise as in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            drawn = self.dtype if kwargs["dtype"] is torch.float64 else kwargs["dtype"]
            return func(*args, **{**kwargs, "dtype": drawn}).double()
        if func is Tensor.to and args[0].shape == SHAPE and torch.float32 in (*args[1:], kwargs.get("dtype")):
            return args[0]
        return func(*args, **kwargs)


def attributes(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler that are its own, lists copied."""
    return {
        k: list(v) if isinstance(v, list) else v
        for k, v in vars(scheduler).items()
        if k not in (PATCH, SITE, *REPLACED, "_internal_dict")
    }


def served(scheduler: Any) -> str:
    """Which backend served the last step, or why the stock step did; empty for a stock scheduler."""
    site = vars(scheduler).get(SITE)
    if site is None:
        return ""
    return f"stock: {site.declined}" if site.declined else site.served["step"].backend


def error(ours: Any, reference: Any) -> float:
    """Relative RMS difference."""
    difference = (ours.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp_min(1e-30)).item()


def tensors(record: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a sample's shape in a record."""
    found = {k: v for k, v in record.items() if isinstance(v, Tensor) and k != "generator"}
    for name, value in record["attributes"].items():
        for i, v in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(v, Tensor) and v.shape == SHAPE:
                found[f"{name}[{i}]"] = v
    return found

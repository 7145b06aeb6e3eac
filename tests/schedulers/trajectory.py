"""Whole trajectories of a scheduler on given model outputs, and stock ones that do not round inside."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers.schedulers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.patching import patch
from fastdiff.patching._site import SITE
from fastdiff.schedulers import SAMPLERS
from fastdiff.schedulers.schedule import REPLACED

#: A batch of ten stands for ten seeds.
SHAPE = (10, 3, 6, 5)

x32 = torch.linspace(-2, 2, 2 * 3 * 4 * 4).view(2, 3, 4, 4)

#: The samplers that this version of Diffusers has.
AVAILABLE = [name for name in SAMPLERS if hasattr(diffusers.schedulers, name)]

#: Arguments of ``set_timesteps`` besides the number of steps.
SCHEDULES: dict[str, dict[str, Any]] = {
    "ConsistencyDecoderScheduler": {"num_inference_steps": 2},
    "HeliosScheduler": {"stage_index": 1},
    "RePaintScheduler": {"jump_n_sample": 1},  # its pipeline undoes steps where the timesteps jump back
    "SCMScheduler": {"intermediate_timesteps": None},
}
#: These list where the last step ends as well.
WITH_END = ("DDPMWuerstchenScheduler", "SCMScheduler")

_made: dict[tuple[str, str], Any] = {}


def make(name: str, patched: bool = False, **config: Any) -> Any:
    """A scheduler of its own; some take a second to construct, so they are copies of one."""
    key = name, repr(config)
    if key not in _made:
        _made[key] = getattr(diffusers.schedulers, name)(**config)
    scheduler = copy.deepcopy(_made[key])
    return patch(scheduler) if patched else scheduler


def set_timesteps(scheduler: Any, steps: int, **arguments: Any) -> None:
    """``set_timesteps`` with the arguments that this class needs."""
    own = SCHEDULES.get(type(scheduler).__name__, {})
    scheduler.set_timesteps(**{"num_inference_steps": steps, **own, **arguments})


class Walk:
    """Calls the step of any scheduler as its pipelines do, one timestep after the other.

    Attributes:
        timesteps: of the steps.
        arguments: of every step.
    """

    def __init__(self, scheduler: Any, **arguments: Any) -> None:
        self.scheduler = scheduler
        self.arguments = arguments
        self.name = type(scheduler).__name__
        self.sampler = SAMPLERS[self.name]
        self.timesteps = scheduler.timesteps[:-1] if self.name in WITH_END else scheduler.timesteps
        self.scaled = hasattr(scheduler, "scale_model_input")  # flow matching samplers have no such thing
        self.clean: Any = None  # the predicted clean sample of the step before
        self._times = self._times_of_steps()

    def _times_of_steps(self) -> list[dict[str, Any]]:
        """The arguments of each step that say where it is."""
        scheduler, sampler = self.scheduler, self.sampler
        times = list(self.timesteps)
        following = [*times[1:], None]
        found = [{sampler.names[1]: t} for t in times]
        if self.name == "UnCLIPScheduler":
            found = [{**a, "prev_timestep": f} for a, f in zip(found, following, strict=True)]
        elif self.name == "CogVideoXDPMScheduler":
            found = [{**a, "timestep_back": t} for a, t in zip(found, [None, *times], strict=False)]
        elif self.name == "KarrasVeScheduler":
            sigmas = scheduler.schedule.tolist()[: len(times)]
            found = [{"sigma_hat": a, "sigma_prev": b} for a, b in zip(sigmas, [*sigmas[1:], 0.0], strict=True)]
        return found

    def plain(self) -> bool:
        """Whether a step takes model output, timestep and sample, in this order, and else the same every time."""
        more = self.name in ("RePaintScheduler", "CogVideoXDPMScheduler") or self.sampler.per_sample
        taken = list(inspect.signature(getattr(self.scheduler, self.sampler.method)).parameters)
        return not more and all(len(times) == 1 for times in self._times) and tuple(taken[:3]) == self.sampler.names

    def step(self, index: int, model_output: Tensor, sample: Tensor, **more: Any) -> Any:
        """The step at ``timesteps[index]``."""
        arguments = {**self.arguments, **self._times[index], **more}
        model_name, time_name, sample_name = self.sampler.names
        if self.name == "RePaintScheduler":
            arguments["original_image"], arguments["mask"] = image_and_mask(sample)
        elif self.name == "CogVideoXDPMScheduler":
            arguments["old_pred_original_sample"] = self.clean
        elif self.sampler.per_sample:
            arguments[time_name] = arguments[time_name].expand(len(sample))
        if self.scaled:
            self.scheduler.scale_model_input(sample, arguments[time_name])
        arguments |= {model_name: model_output, sample_name: sample}
        output = getattr(self.scheduler, self.sampler.method)(**arguments)
        if self.name == "CogVideoXDPMScheduler":
            self.clean = output[1]
        return output


_images: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}


def image_and_mask(like: Tensor) -> tuple[Tensor, Tensor]:
    """Of numbers that every float dtype holds; the mask, of one channel, has halves too."""
    key = like.shape, like.dtype
    if key not in _images:
        numbers = torch.arange(like.numel()).view(like.shape)
        _images[key] = ((numbers % 17 - 8) / 8).to(like.dtype), (numbers[:, :1] % 3 / 2).to(like.dtype)
    return _images[key]


def fields(output: Any) -> dict[str, Any]:
    """A step's result by name; those of a tuple by position, but for the first."""
    if type(output) is tuple:
        return {"prev_sample" if i == 0 else str(i): v for i, v in enumerate(output)}
    return dict(output)


def run(
    scheduler: Any,
    dtype: torch.dtype,
    *,
    steps: int = 8,
    seed: int = 0,
    wide: list[torch.dtype] | None = None,
    inputs_dtype: torch.dtype | None = None,
    schedule: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sample with random model outputs; per step the result, and the attributes the step left behind.

    Args:
        dtype: of sample and model outputs.
        wide: inputs are those of ``inputs_dtype``, computed on in fp64; the noise is drawn in these dtypes.
        schedule, step: further arguments of ``set_timesteps`` and of the step.
    """
    inputs = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    if schedule and not schedule.keys().isdisjoint(("timesteps", "sigmas")):
        scheduler.set_timesteps(**schedule)
    else:
        set_timesteps(scheduler, **{"steps": steps, **(schedule or {})})

    def draw(scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(SHAPE, generator=inputs, dtype=torch.float64)
        return x.to(inputs_dtype or dtype).to(dtype)

    sample = draw(float(getattr(scheduler, "init_noise_sigma", 1.0)))
    arguments = dict(step or {})
    walk = Walk(scheduler, **arguments)
    method = getattr(scheduler, walk.sampler.method)
    if "generator" in inspect.signature(method).parameters and "variance_noise" not in arguments:
        walk.arguments["generator"] = noise
    records = []
    drawn = Draws(wide)
    for index in range(len(walk.timesteps)):
        if "variance_noise" in arguments:
            walk.arguments["variance_noise"] = draw()
        model_output = draw()
        with drawn:
            out = walk.step(index, model_output, sample)
        found = fields(out)
        sample = found["prev_sample"]
        records.append({"type": type(out), **found, "attributes": attributes(scheduler), "site": served(scheduler)})
    records[-1].update(generator=noise.get_state(), drawn=drawn.dtypes)
    return records


def scale(scheduler: Any, sample: Tensor, t: Any) -> None:
    """What pipelines call before the denoiser."""
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(sample, t)


class Draws(TorchFunctionMode):
    """Notes the dtypes of the noise drawn; given those of another run, keeps a stock step in fp64 from rounding.

    Its noise then has these dtypes, and casts to fp32 are skipped.
    """

    def __init__(self, given: list[torch.dtype] | None) -> None:
        super().__init__()
        self.given = None if given is None else iter(given)
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            if self.given is not None:
                return func(*args, **{**kwargs, "dtype": next(self.given)}).double()
            self.dtypes.append(kwargs.get("dtype") or torch.get_default_dtype())
        elif (self.given is not None and func is Tensor.to and args[0].shape == SHAPE
                and torch.float32 in (*args[1:], kwargs.get("dtype"))):
            return args[0]
        return func(*args, **kwargs)


def attributes(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler that are its own, copied where a stock step writes to them."""
    return {
        k: list(v) if isinstance(v, list) else v.clone() if isinstance(v, Tensor) else v
        for k, v in vars(scheduler).items()
        if k not in (*REPLACED, "_internal_dict") and not k.startswith("_fastdiff")
    }


def served(scheduler: Any) -> str:
    """Which backend served the last step, or why the stock step did; empty for a stock scheduler."""
    site = vars(scheduler).get(SITE)
    if site is None:
        return ""
    if site.declined or not site.served:
        return f"stock: {site.declined}"
    assert list(site.served) == ["step"]  # one launch
    return site.served["step"].backend


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

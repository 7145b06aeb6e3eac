"""The fused step of one scheduler object: look the coefficients up, launch, keep the stock's books."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops import scheduler_step
from fastdiff.patching._patch import PATCH
from fastdiff.patching._site import SITE, Site
from fastdiff.schedulers.probe import (
    CLAMPED,
    HISTORY,
    MODEL_OUTPUT,
    NOISE,
    SAMPLE,
    Call,
    LinearStep,
    NotLinear,
    Source,
    probe,
    twin_of,
)
from fastdiff.schedulers.samplers import Sampler, unsupported

#: Configurations (options, timesteps, sigmas) kept per scheduler, and steps kept per configuration.
MAX_CONFIGURATIONS = 8
MAX_STEPS = 4096

#: The methods that patching replaces.
REPLACED = ("step", "set_timesteps")

_version = attrgetter("_version")

#: Arguments of every step that do not shape the map.
_PLAIN = frozenset({"model_output", "timestep", "sample", "generator", "return_dict"})


class Launch(NamedTuple):
    """Arguments of one ``scheduler_step`` call; ``history`` are positions among the step's values."""

    history: tuple[int, ...]
    noise: bool
    prev: list[float]
    entry: list[float]
    clip: float | None
    prev_dtype: torch.dtype
    entry_dtype: torch.dtype | None


class Plan(NamedTuple):
    """One step, ready to run.

    The step's values are (sample, model output, new entry, noise, *history, *results of the launches); fields
    and history refer to them by position.
    """

    launches: tuple[Launch, ...]
    drawn: torch.dtype | None
    output: type
    fields: tuple[tuple[str, int], ...]
    history: tuple[tuple[str, int | list[int | None] | None], ...]
    state: tuple[tuple[str, Any], ...]


def plan_of(step: LinearStep) -> Plan:
    """How ``scheduler_step`` does ``step``."""
    if not step.computed:
        raise NotLinear("the step computes nothing")
    inputs = len(step.computed[0].coefficients)
    entry: list[float] = []
    entry_dtype, entry_index = None, None
    if step.clamp is not None:
        entry, entry_dtype = list(step.clamp.coefficients), step.clamp.dtype
    else:
        for i, tensor in enumerate(step.computed[1:], 1):
            if not any(tensor.coefficients[CLAMPED:]):
                entry, entry_dtype, entry_index = list(tensor.coefficients[:CLAMPED]), tensor.dtype, i
                break
    launches: list[Launch] = []
    positions: list[int] = []
    for i, tensor in enumerate(step.computed):
        if i == entry_index:
            positions.append(CLAMPED)
            continue
        positions.append(inputs + len(launches))
        used = [j for j in range(HISTORY, inputs) if tensor.coefficients[j]]
        # The entry is written by the first launch; a later one needs it only where it is part of the sum.
        own = entry if not launches or tensor.coefficients[CLAMPED] else []
        launches.append(
            Launch(tuple(used), tensor.coefficients[NOISE] != 0,
                   [*tensor.coefficients[:HISTORY], *(tensor.coefficients[j] for j in used)],
                   own, step.clamp.bound if step.clamp and own else None, tensor.dtype, entry_dtype)
        )

    def position(source: Source | None) -> int | None:
        return None if source is None else positions[source.position] if source.computed else source.position

    output, fields = step.output
    return Plan(
        tuple(launches),
        step.drawn,
        output,
        tuple((name, positions[s.position] if s.computed else s.position) for name, s in fields),
        tuple((name, [position(s) for s in after] if isinstance(after, list) else position(after))
              for name, after in step.history),
        step.state,
    )


class _Configuration:
    """Everything that is fixed between two changes of the options or the schedule."""

    def __init__(self, scheduler: Any, sampler: Sampler, without: frozenset[str]) -> None:
        self.reason = unsupported(scheduler)
        self.twin = twin_of(scheduler, sampler, without)
        self.timesteps: list[int | float] = self.twin.timesteps.tolist()
        self.plans: dict[Call, Plan | str] = {}


class Stepper:
    """Runs the steps of one scheduler; kept as the state of its site.

    Args:
        scheduler: a stock scheduler of Diffusers.
        sampler: its row in :data:`fastdiff.schedulers.samplers.SAMPLERS`.
    """

    def __init__(self, scheduler: Any, sampler: Sampler) -> None:
        self.scheduler = scheduler
        self.sampler = sampler
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "sampler": self.sampler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of a scheduler probes for itself: what is cached is quickly made again, and large to pickle.
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        parameters = list(inspect.signature(type(self.scheduler).step).parameters.values())[1:]
        self._names = tuple(p.name for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        known = _PLAIN | {*self.sampler.scalars, self.sampler.noise}
        self._unknown = tuple(name for name in self._names if name not in known)
        self._not_fixed = frozenset({*REPLACED, SITE, PATCH, *self.sampler.state, *self.sampler.history})
        self._configurations: OrderedDict[Any, _Configuration] = OrderedDict()
        self._configuration: _Configuration | None = None
        self._attributes = 0
        self._bound: tuple[Any, ...] = ()
        self._options: dict[str, Any] = {}
        self._tables: list[Tensor] = []
        self._writes = 0
        self._fixed = itemgetter("_internal_dict")

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The stock ``set_timesteps``; then reads the schedule from its device, so that no step has to."""
        type(self.scheduler).set_timesteps(self.scheduler, *args, **kwargs)
        self._bind()

    def step(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The scheduler's step; arguments and result as in the stock one."""
        result = self._fused(site, args, kwargs)
        if type(result) is str:
            return site.stock(result, self.scheduler, *args, name="step", **kwargs)
        return result

    def _fused(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step's result, or as a string why the stock step has to give it."""
        names = self._names
        arguments = {**self._defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if len(arguments) != len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return "the arguments do not fit the step"
        scheduler, sampler = self.scheduler, self.sampler
        try:
            sample, model_output = arguments["sample"], arguments["model_output"]
            timestep = arguments["timestep"]
            shape, device = sample.shape, sample.device
            if model_output.shape != shape or model_output.device != device or len(shape) < 2:
                return "model_output and sample differ in shape or device, or have one dimension"
            for name in self._unknown:
                if arguments[name] is not self._defaults.get(name, names):
                    return f"the argument {name} is given"
        except (KeyError, AttributeError):
            return "the arguments do not fit the step"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        if torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad):
            return "a gradient is needed"
        if torch.compiler.is_compiling():
            return "the step is being compiled"
        reason = sampler.refuse(scheduler, timestep)
        if reason is not None:
            return reason

        if not self._is_bound():
            self._bind()
        configuration = self._configuration
        assert configuration is not None
        if configuration.reason is not None:
            return configuration.reason
        value = timestep_dtype = None
        if sampler.by_timestep:
            value = self._timestep(timestep)
            timestep_dtype = timestep.dtype if isinstance(timestep, Tensor) else None
            if type(value) is not int:
                return "timestep is not one integer"
        attributes = vars(scheduler)
        if attributes.get("_step_index", 0) is None:
            self._start(timestep)

        noise = noise_dtype = None
        generator = arguments.get("generator")
        if sampler.noise is not None and (noise := arguments[sampler.noise]) is not None:
            if generator is not None or noise.shape != shape or noise.device != device:
                return "variance_noise comes with a generator, or in another shape or on another device"
            noise_dtype = noise.dtype
        values: list[Any] = [sample, model_output, None, noise]
        history: list[Any] = []
        for name in sampler.history:
            entry = attributes[name]
            many = type(entry) is list
            dtypes: list[torch.dtype | None] = []
            for tensor in entry if many else (entry,):
                if tensor is None:
                    dtypes.append(None)
                    continue
                if tensor.shape != shape or tensor.device != device or tensor.requires_grad:
                    return "a history tensor differs from the sample in shape or device, or needs a gradient"
                dtypes.append(tensor.dtype)
                values.append(tensor)
            history.append(tuple(dtypes) if many else dtypes[0])
        scalars = tuple([arguments[name] for name in sampler.scalars])
        for scalar in scalars:
            if not isinstance(scalar, (int, float)):
                return f"an argument of the step is a {type(scalar).__name__}, not a number"
        call = Call(value, timestep_dtype, sample.dtype, model_output.dtype, noise_dtype,
                    tuple([attributes.get(name) for name in sampler.state]), tuple(history), scalars,
                    bool(arguments["return_dict"]))
        plan = configuration.plans.get(call)
        if plan is None:
            plan = self._probe(configuration, call)
        if type(plan) is str:
            return plan
        return self._run(site, plan, values, generator)

    def _run(self, site: Site, plan: Any, values: list[Any], generator: Any) -> Any:
        sample, model_output = values[SAMPLE], values[MODEL_OUTPUT]
        if plan.drawn is not None:
            values[NOISE] = _randn(model_output, generator, plan.drawn)
        for i, launch in enumerate(plan.launches):
            result, entry = site.serve(
                "step" if i == 0 else f"step, result {i + 1}", scheduler_step, sample, model_output,
                [values[j] for j in launch.history], values[NOISE] if launch.noise else None, launch.prev,
                launch.entry, launch.clip, launch.prev_dtype, launch.entry_dtype,
            )
            values.append(result)
            if i == 0:
                values[CLAMPED] = entry
        attributes = vars(self.scheduler)
        for name, after in plan.history:
            if type(after) is list:
                attributes[name][:] = [None if j is None else values[j] for j in after]
            else:
                attributes[name] = None if after is None else values[after]
        for name, after in plan.state:
            attributes[name] = after
        if plan.output is tuple:
            return tuple([values[j] for _, j in plan.fields])
        return plan.output(**{name: values[j] for name, j in plan.fields})

    def _probe(self, configuration: _Configuration, call: Call) -> Plan | str:
        if len(configuration.plans) >= MAX_STEPS:
            configuration.plans.clear()
        plan: Plan | str
        try:
            step = probe(configuration.twin, self.sampler, call)
            plan = plan_of(step)
        except NotLinear as error:
            plan = str(error)
        except Exception as error:  # the stock step raises on such a call, and will tell the caller so itself
            plan = f"the stock step raises {type(error).__name__}"
        configuration.plans[call] = plan
        return plan

    def _is_bound(self) -> bool:
        """Whether nothing that the plans depend on was set, replaced or written to since :meth:`_bind`."""
        attributes = vars(self.scheduler)
        try:
            # Comparing looks at identity first; only what was replaced is compared by value.
            return (
                len(attributes) == self._attributes
                and self._fixed(attributes) == self._bound
                and vars(attributes["_internal_dict"]) == self._options
                and sum(map(_version, self._tables)) == self._writes
            )
        except (KeyError, ValueError, RuntimeError):  # an attribute is gone; two arrays, two tensors differ
            return False

    def _bind(self) -> None:
        """Find or make the plans of the scheduler's present options and schedule."""
        attributes = vars(self.scheduler)
        names = [name for name in attributes if name not in self._not_fixed]
        self._fixed = itemgetter(*names)
        self._attributes = len(attributes)
        fixed = self._bound = self._fixed(attributes)
        options = vars(self.scheduler.config)
        self._options = dict(options)
        # Only ever counts up, so the sum tells of any write. Inference tensors do not count theirs.
        self._tables = [t for t in fixed if isinstance(t, Tensor) and not t.is_inference()]
        self._writes = sum(map(_version, self._tables))
        key = (*names, *map(_frozen, fixed), *options, *map(_frozen, options.values()))
        found = self._configurations.pop(key, None)
        if found is None:
            found = _Configuration(self.scheduler, self.sampler, self._not_fixed)
        self._configurations[key] = self._configuration = found
        if len(self._configurations) > MAX_CONFIGURATIONS:
            self._configurations.popitem(last=False)

    def _timestep(self, timestep: Any) -> Any:
        """The value of a timestep. One that is an element of ``timesteps`` is not read from its device."""
        if not isinstance(timestep, Tensor):
            return timestep
        if timestep.dim() != 0:
            return None
        if timestep.device.type != "cpu":
            schedule = self.scheduler.timesteps
            if (timestep.device == schedule.device and timestep.dtype == schedule.dtype
                    and schedule.is_contiguous()):
                offset = timestep.data_ptr() - schedule.data_ptr()
                if 0 <= offset < schedule.numel() * schedule.element_size():
                    assert self._configuration is not None
                    return self._configuration.timesteps[offset // schedule.element_size()]
        return timestep.item()

    def _start(self, timestep: Any) -> None:
        """Set ``_step_index`` for the first step, as the stock step does."""
        scheduler = self.scheduler
        if vars(scheduler).get("_begin_index") is None and scheduler.timesteps.device.type != "cpu":
            assert self._configuration is not None
            scheduler._step_index = scheduler.index_for_timestep(
                self._timestep(timestep), self._configuration.twin.timesteps
            )
        else:
            scheduler._init_step_index(timestep)


def _randn(like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)


def _frozen(value: Any) -> Any:
    """A hashable stand-in for an attribute's value."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return value.dtype, value.device, tuple(value.shape), data
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value).__name__, repr(value)

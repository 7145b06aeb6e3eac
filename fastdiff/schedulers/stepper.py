"""The fused step of one scheduler object: look the coefficients up, launch, keep the stock's books."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops import scheduler_step
from fastdiff.patching._patch import PATCH
from fastdiff.patching._site import SITE, Site
from fastdiff.schedulers.plan import Plan, plan_of
from fastdiff.schedulers.probe import (
    CLAMPED,
    MODEL_OUTPUT,
    NOISE,
    SAMPLE,
    Call,
    Constant,
    Moment,
    NotLinear,
    probe,
    twin_of,
)
from fastdiff.schedulers.samplers import Sampler, unsupported

#: Configurations (options, timesteps, sigmas) kept per scheduler, and steps kept per configuration.
MAX_CONFIGURATIONS = 8
MAX_STEPS = 4096
#: Tensors of a scheduler whose values are kept for comparison.
MAX_TABLES = 32

#: The methods that patching may replace.
REPLACED = ("step", "step_pred", "set_timesteps", "scale_model_input", "add_noise", "get_velocity")

_version = attrgetter("_version")


class _Configuration:
    """Everything that is fixed between two changes of the options or the schedule."""

    def __init__(self, scheduler: Any, sampler: Sampler, without: frozenset[str]) -> None:
        self.reason = unsupported(scheduler)
        self.twin = twin_of(scheduler, sampler, without)
        timesteps = self.twin.timesteps
        self.timesteps: list[int | float] = [] if timesteps is None else timesteps.tolist()
        self.plans: dict[Call, Plan | str] = {}
        self._starts: dict[int | float, int] = {}
        self._numbers: dict[tuple[float, torch.dtype], Tensor] = {}

    def kept(self, number: Tensor, device: torch.device) -> Tensor:
        """A number that the step keeps as a tensor: one object for each value, since plans are found by it."""
        return self._numbers.setdefault((number.item(), number.dtype), number.to(device))

    def start(self, timestep: int | float) -> int:
        """The index of the first step, if that is at ``timestep``."""
        if timestep not in self._starts:
            self.twin._step_index = self.twin._begin_index = None
            self.twin._init_step_index(timestep)
            self._starts[timestep] = self.twin._step_index
        return self._starts[timestep]


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
        sampler = self.sampler
        parameters = list(inspect.signature(getattr(type(self.scheduler), sampler.method)).parameters.values())[1:]
        self._names = tuple(p.name for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        plain = {*sampler.names, "generator", "return_dict"}  # these do not shape the map
        known = {*plain, *sampler.scalars, *sampler.timesteps, *sampler.tensors, sampler.noise}
        self._unknown = tuple(name for name in self._names if name not in known)
        not_fixed = {*REPLACED, SITE, PATCH, "_internal_dict", *sampler.state, *sampler.history}
        if sampler.past is not None:
            not_fixed.add(sampler.past)
        if "_step_index" in sampler.state:
            not_fixed.add("_begin_index")  # counts on the first step only
        self._not_fixed = frozenset(not_fixed)
        self._configurations: OrderedDict[Any, _Configuration] = OrderedDict()
        self._configuration: _Configuration | None = None
        self._attributes = 0
        self._bound: tuple[Any, ...] = ()
        self._options: dict[str, Any] = {}
        self._frozen_options: tuple[Any, ...] = ()
        self._frozen_tables: dict[int, tuple[Tensor, int, Any]] = {}
        self._tables: list[Tensor] = []
        self._writes = 0
        self._fixed: Callable[[dict[str, Any]], tuple[Any, ...]] = tuple
        self._moved: tuple[Tensor, int, Tensor] | None = None
        self._past_moments: list[tuple[Any, Moment | None]] = []

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The stock ``set_timesteps``; then reads the schedule from its device, so that no step has to."""
        type(self.scheduler).set_timesteps(self.scheduler, *args, **kwargs)
        self._bind()

    def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """The stock ``scale_model_input``, without its read of the first step's index from the device."""
        scheduler = self.scheduler
        if scheduler._step_index is None and scheduler._begin_index is None:
            moment = self._moment(kwargs.get("timestep", args[1] if len(args) > 1 else None))
            if moment is not None:
                scheduler._step_index = self._bound_configuration().start(moment.value)
        return type(scheduler).scale_model_input(scheduler, *args, **kwargs)

    def with_tables(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock method of that name. It moves ``alphas_cumprod`` to the samples' device, where every step would
        have to read it from; here the table comes back, and the moved one is kept for the next call."""
        attributes = vars(self.scheduler)
        table = attributes["alphas_cumprod"]
        version = -1 if table.is_inference() else table._version
        if self._moved is not None and self._moved[0] is table and self._moved[1] == version:
            attributes["alphas_cumprod"] = self._moved[2]
        try:
            return getattr(type(self.scheduler), name)(self.scheduler, *args, **kwargs)
        finally:
            self._moved = table, version, attributes["alphas_cumprod"]
            attributes["alphas_cumprod"] = table

    def step(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The scheduler's step; arguments and result as in the stock one."""
        result = self._fused(site, args, kwargs)
        if type(result) is str:
            return site.stock(result, self.scheduler, *args, name=self.sampler.method, **kwargs)
        return result

    def _fused(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step's result, or as a string why the stock step has to give it."""
        names = self._names
        arguments = {**self._defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if len(arguments) != len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return "the arguments do not fit the step"
        scheduler, sampler = self.scheduler, self.sampler
        try:
            model_output, timestep, sample = map(arguments.__getitem__, sampler.names)
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

        configuration = self._bound_configuration()
        if configuration.reason is not None:
            return configuration.reason
        attributes = vars(scheduler)
        moment = begin = None
        first = attributes.get("_step_index", 0) is None
        if first:
            begin = attributes.get("_begin_index")
        if sampler.by_timestep or first:
            moment = self._moment(timestep, sampler.per_sample)
            if moment is None:
                return "timestep is not one number"
        noise = noise_dtype = None
        generator = arguments.get("generator")
        if sampler.noise is not None and (noise := arguments[sampler.noise]) is not None:
            if generator is not None or noise.shape != shape or noise.device != device:
                return "variance_noise comes with a generator, or in another shape or on another device"
            noise_dtype = noise.dtype
        values: list[Any] = [sample, model_output, None, noise, None]
        history: list[Any] = []
        for entry in (*[attributes.get(n) for n in sampler.history], *[arguments[n] for n in sampler.tensors]):
            many = type(entry) is list
            dtypes: list[Any] = []
            for tensor in entry if many else (entry,):
                if not isinstance(tensor, Tensor):
                    if tensor is not None and type(tensor) is not int:
                        return f"the sampler keeps a {type(tensor).__name__}"
                    dtypes.append(tensor)
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
        past = self._past(timestep, moment)
        further: list[Moment | None] = []
        for name in sampler.timesteps:
            further.append(None if arguments[name] is None else self._moment(arguments[name]))
            if further[-1] is None and arguments[name] is not None:
                return f"{name} is not one number"
        if past is None:
            return "an earlier timestep is not one number"
        return_dict = arguments.get("return_dict")
        call = Call(moment, begin, sample.dtype, model_output.dtype, noise_dtype,
                    tuple([attributes.get(name) for name in sampler.state]), tuple(history), past, scalars,
                    tuple(further), None if return_dict is None else bool(return_dict))
        plan = configuration.plans.get(call)
        if plan is None:
            plan = self._probe(configuration, call)
        if type(plan) is str:
            return plan
        return self._run(site, plan, values, generator, timestep)

    def _run(self, site: Site, plan: Any, values: list[Any], generator: Any, timestep: Any) -> Any:
        sample, model_output = values[SAMPLE], values[MODEL_OUTPUT]
        for position, dtype in enumerate(plan.drawn, NOISE):
            values[position] = _randn(model_output, generator, dtype)
        for i, launch in enumerate(plan.launches):
            result, entry, kept = site.serve(
                "step" if i == 0 else f"step, launch {i + 1}", scheduler_step, sample, model_output,
                [values[j] for j in launch.history], values[NOISE] if launch.noise else None, launch.prev,
                launch.entry, launch.clip, launch.prev_dtype, launch.entry_dtype, launch.kept, launch.kept_dtype,
            )
            values.append(result)
            if launch.kept:
                values.append(kept)
            if i == 0:
                values[CLAMPED] = entry
        attributes = vars(self.scheduler)
        for name, after in plan.history:
            if type(after) is list:
                attributes[name][:] = [values[a] if type(a) is int else a.value for a in after]
            else:
                attributes[name] = values[after] if type(after) is int else after.value
        for name, value in plan.state:
            attributes[name] = sample.shape[2:] if type(value) is torch.Size else value
        if plan.past:
            past = attributes[self.sampler.past]
            past[:] = [None if j is None else timestep if j < 0 else past[j] for j in plan.past]
        fields = [(name, values[a] if type(a) is int else a.value) for name, a in plan.fields]
        return tuple([value for _, value in fields]) if plan.output is tuple else plan.output(**dict(fields))

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
        else:
            attributes = vars(self.scheduler)
            states = zip(plan.state, call.state, strict=True)
            state = {name: v for (name, v), old in states if name in attributes or v is not old}
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = configuration.kept(value, attributes["sigmas"].device)
            history = tuple([(n, after) for n, after in plan.history if n in attributes or after != Constant(None)])
            launches = tuple([launch.with_defaults(call) for launch in plan.launches])
            plan = plan._replace(launches=launches, state=tuple(state.items()), history=history)
        configuration.plans[call] = plan
        return plan

    def _bound_configuration(self) -> _Configuration:
        """That of the scheduler's present options and schedule."""
        if not self._is_bound():
            self._bind()
        assert self._configuration is not None
        return self._configuration

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
        self._fixed = itemgetter(*names, names[0])  # of one name it gives no tuple
        self._attributes = len(attributes)
        fixed = self._bound = self._fixed(attributes)
        options = vars(self.scheduler.config)
        if options != self._options:
            self._options = dict(options)
            self._frozen_options = (*options, *map(_frozen, options.values()))
        # Only ever counts up, so the sum tells of any write. Inference tensors do not count theirs.
        self._tables = [t for t in fixed if isinstance(t, Tensor) and not t.is_inference()]
        self._writes = sum(map(_version, self._tables))
        key = (*names, *map(self._freeze, fixed), *self._frozen_options)
        found = self._configurations.pop(key, None)
        if found is None:
            found = _Configuration(self.scheduler, self.sampler, self._not_fixed - {"_internal_dict"})
        self._configurations[key] = self._configuration = found
        if len(self._configurations) > MAX_CONFIGURATIONS:
            self._configurations.popitem(last=False)

    def _freeze(self, value: Any) -> Any:
        """:func:`_frozen`, which for a table that nobody wrote to was done before."""
        if not isinstance(value, Tensor) or value.is_inference():
            return _frozen(value)
        known = self._frozen_tables.get(id(value))
        if known is None or known[0] is not value or known[1] != value._version:
            known = value, value._version, _frozen(value)
            if len(self._frozen_tables) >= MAX_TABLES:
                self._frozen_tables.clear()
            self._frozen_tables[id(value)] = known
        return known[2]

    def _moment(self, timestep: Any, per_sample: bool = False) -> Moment | None:
        """A timestep's value, if it has one. That of an element of ``timesteps`` is not read from its device."""
        if not isinstance(timestep, Tensor):
            return Moment(timestep, None) if type(timestep) in (int, float) else None
        if timestep.dim() != int(per_sample) or any(timestep.stride()):
            return None
        schedule = self.scheduler.timesteps
        if timestep.device == schedule.device and timestep.dtype == schedule.dtype and schedule.is_contiguous():
            offset = timestep.data_ptr() - schedule.data_ptr()
            if 0 <= offset < schedule.numel() * schedule.element_size():
                value = self._bound_configuration().timesteps[offset // schedule.element_size()]
                return Moment(value, timestep.dtype, timestep.dim())
        return Moment(timestep[(0,) * timestep.dim()].item(), timestep.dtype, timestep.dim())

    def _past(self, timestep: Any, moment: Moment | None) -> tuple[Moment | None, ...] | None:
        """The timesteps before ``timestep``, with their values where these matter; ``None`` if one has none."""
        if self.sampler.past is None:
            return ()
        timesteps = vars(self.scheduler)[self.sampler.past]
        if not self.sampler.by_timestep:
            return tuple([None if t is None else _SOME_MOMENT for t in timesteps])
        # The list outlives its schedule, and then a tensor's value could only be read from the device.
        known = {id(t): m for t, m in self._past_moments}
        moments = [None if t is None else known.get(id(t)) or self._moment(t) for t in timesteps]
        self._past_moments = [*zip(timesteps, moments, strict=True), (timestep, moment)]
        if not all((t is None) is (m is None) for t, m in self._past_moments):
            return None
        return tuple(moments)


_SOME_MOMENT = Moment(0, None)


def _randn(like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)


def _frozen(value: Any) -> Any:
    """A hashable stand-in for an attribute's value."""
    if isinstance(value, Tensor):
        data = value.detach().cpu()
        data = data.float() if value.dtype is torch.bfloat16 else data  # which numpy does not have
        return value.dtype, value.device, tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return tuple([(key, _frozen(v)) for key, v in value.items()])
    if inspect.isfunction(value):
        return value  # itself: another one may come to have its address
    return type(value).__name__, repr(value)

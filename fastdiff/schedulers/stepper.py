"""The fused step of one scheduler object: look the coefficients up, launch, keep the stock's books."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastdiff.backends import overridden
from fastdiff.patching._site import Site
from fastdiff.schedulers.known import Call as KnownCall
from fastdiff.schedulers.known import known_step
from fastdiff.schedulers.plan import Next, Place, Step, plan_of
from fastdiff.schedulers.probe import CLAMPED, MODEL_OUTPUT, NOISE, SAMPLE, Call, Constant, Moment, NotLinear, probe
from fastdiff.schedulers.samplers import Sampler
from fastdiff.schedulers.schedule import Configuration, Schedule, ordinary_tensors
from fastdiff.schedulers.setting import is_hashable
from fastdiff.schedulers.signature import Arguments, Signature

#: Steps kept per configuration.
MAX_STEPS = 4096
#: Earlier timesteps kept with their values; solvers look back at fewer.
MAX_PAST = 8


class Stepper:
    """Runs the steps of one scheduler; kept as the state of its site.

    A step is found in one of two ways: by all that it depends on, the call's arguments and what the scheduler holds;
    or, much faster, as the one that came next the last time. For that the scheduler must hold the very objects that the
    step before has left, and then only the call's arguments need comparing. A step that ran so once is done as a whole
    by the extension (:mod:`fastdiff.schedulers.known`), which knows ``scheduler``, ``schedule``, ``_left`` and
    ``_contents`` by name.

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
        from diffusers.utils.torch_utils import randn_tensor

        sampler = self.sampler
        self._randn = randn_tensor
        self.signature = Signature(self.scheduler, sampler)
        self._lists = (*sampler.history, *([] if sampler.past is None else [sampler.past]))
        self.schedule = Schedule(self.scheduler, sampler)
        self._moved: tuple[Tensor, int, Tensor] | None = None
        self._past: list[tuple[Any, Moment | None]] = []
        # Where the trajectory is, the attributes that the scheduler had there, and what its lists held. These keep the
        # history's tensors until the next step or schedule, even if the scheduler drops them before: by weak references
        # every step would have to look each one up.
        self._place: Place | None = None
        self._left: dict[str, Any] = {}
        self._contents: list[list[Any]] = []
        self._begins = "_step_index" in sampler.state

    def _held(self) -> Any:
        """What a step depends on of all that the scheduler keeps between steps; ``None`` if that is not known, or is
        something that does not hash."""
        attributes, past = vars(self.scheduler), self._past_moments()
        history = [tuple(map(_sort, v)) if type(v) is list else _sort(v)
                   for v in map(attributes.get, self.sampler.history)]
        held = *map(attributes.get, self.sampler.state), *history, past
        return held if past is not None and is_hashable(held) else None

    def _place_of(self, configuration: Configuration) -> Place | None:
        """Where the scheduler says that the trajectory is."""
        held = self._held()
        return None if held is None else configuration.place(held)

    def _arrive(self, place: Place | None = None) -> None:
        """The trajectory is at ``place``, or, if that is not known, where the scheduler says."""
        if place is None:
            place = self._place_of(self.schedule.configuration())
        attributes = vars(self.scheduler)
        self._place, self._left = place, attributes.copy()
        self._contents = [v.copy() for v in map(attributes.get, self._lists) if type(v) is list]

    def _is_there(self) -> bool:
        """Whether nobody changed the scheduler since it arrived."""
        attributes, left = vars(self.scheduler), self._left
        if self._begins and "_begin_index" in attributes:  # counts on the first step only, of which it is an argument
            left["_begin_index"] = attributes["_begin_index"]
        try:
            # Comparing looks at identity first; only what was replaced is compared by value.
            return (
                attributes == left
                and [v for v in map(attributes.get, self._lists) if type(v) is list] == self._contents
                and self.schedule.is_unwritten()
            )
        except (RuntimeError, ValueError):  # two tensors, two arrays
            return False

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The stock ``set_timesteps``; then a trajectory starts."""
        configuration = self.schedule.set_timesteps(self._held(), args, kwargs)
        self._arrive(self._place_of(configuration))

    def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
        """The stock ``scale_model_input``, without its read of the first step's index from the device."""
        scheduler = self.scheduler
        if scheduler._step_index is None and scheduler._begin_index is None:
            configuration = self.schedule.configuration()
            moment = self.schedule.moment(kwargs.get("timestep", args[1] if len(args) > 1 else None))
            if moment is not None:
                scheduler._step_index = configuration.start(moment.value)
                scaled = type(scheduler).scale_model_input(scheduler, *args, **kwargs)
                self._arrive()
                return scaled
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
        if not is_dynamo_compiling():
            place = self._place  # all is read once: other threads may set it
            following = None if place is None else place.next
            known = None if following is None else following.known
            if known is not None and following is not None:
                self._place = None  # an interrupt after the books are kept must not leave it a step behind them
                result = known(self, site, args, kwargs)
                if result is not NotImplemented:
                    self._place = following.step
                    return result
                self._place = place
        result = self._fused(site, args, kwargs)
        if type(result) is str:
            return site.stock(result, self.scheduler, *args, name=self.sampler.method, **kwargs)
        return result

    def _fused(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step's result, or as a string why the stock step has to give it."""
        sampler, schedule = self.sampler, self.schedule
        given = self.signature.arrange(args, kwargs)
        if given is None or not (isinstance(given.sample, Tensor) and isinstance(given.model_output, Tensor)):
            return "the arguments do not fit the step"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        if torch.compiler.is_compiling():
            return "the step is being compiled"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func is active"  # for vmap, the op has no batching rule
        if given.noise is not None and given.generator is not None:
            return "variance_noise comes with a generator"
        if not self._is_there():
            self._arrive()

        attributes = vars(self.scheduler)
        values = [given.sample, given.model_output, None, given.noise, None]
        for entry in (*map(attributes.get, sampler.history), *given.tensors):
            values += [t for t in (entry if type(entry) is list else (entry,)) if isinstance(t, Tensor)]
        try:
            kinds = [t if t is None else _kind(t) for t in (given.mask, *values)]
        except AttributeError:
            return "the arguments do not fit the step"
        if any(kind is not None and kind[-1] is not torch.strided for kind in kinds):
            return "a tensor is sparse, or has another layout that is not strided"
        begin = None
        moments: list[Moment | None] = []
        first = attributes.get("_step_index", 0) is None
        if first:
            begin = attributes.get("_begin_index")
        if sampler.by_timestep or first:
            moments = [schedule.moment(given.timestep, sampler.per_sample), *map(schedule.moment, given.times)]
        key = self._key(site, given, begin, moments, kinds)
        # Of a contiguous sample, kernels take history in any layout.
        place = self._place if given.sample.is_contiguous() else None
        following = None if place is None else place.next  # read once: other threads may set it
        if following is None or following.key != key:
            step = self._find(given, moments, begin)
            if isinstance(step, str):
                return step
            following = Next(key, step, given.sample.shape)
            if place is not None:
                place.next = following
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*values, given.mask)):
            return "a gradient is needed"
        before = values.copy()
        result = self._run(site, following, values, given)
        form = len(args), *kwargs
        if place is not None and following.form != form:  # else nobody would find it again
            call = KnownCall(len(args), self.signature.by_name(args, kwargs), moments, first, begin, before, given.mask)
            following.known = known_step(sampler, self._begins, self._lists, self._randn, site, following, call)
            following.form = form
        if sampler.by_timestep and sampler.past is not None:
            self._remember(given.timestep, moments[0])
        self._arrive(following.step)
        return result

    def _remember(self, timestep: Any, moment: Moment | None) -> None:
        """Keep the value of a timestep that later steps look back at."""
        self._past = [*self._past, (timestep, moment)][-MAX_PAST:]

    def _key(
        self, site: Site, given: Arguments, begin: int | None, moments: list[Moment | None], kinds: list[Any]
    ) -> tuple[Any, ...]:
        """All that a step depends on and that the scheduler does not hold.

        That is what may serve it (the backend and its override, forward-mode differentiation), the arguments' types
        and values, and the kinds of its tensors. The types come before the values, of which tensors do not compare.
        Those of ``times`` tell what is absent from what is no number: both have no moment.
        """
        types = [_type(given.timestep), *map(type, given.times), *map(type, given.others)]
        return site.backend, overridden(), forward_ad._current_level, types, given.others, begin, moments, kinds

    def _find(self, given: Arguments, moments: list[Moment | None], begin: int | None) -> Step | str:
        """The step by all that it depends on, or why there is none.

        Args:
            moments: values of the timestep and of further ones, where the step depends on them.
            begin: ``_begin_index``, where it depends on that.
        """
        sample, model_output, noise, mask = given.sample, given.model_output, given.noise, given.mask
        sampler, attributes = self.sampler, vars(self.scheduler)
        reason = sampler.refuse(self.scheduler, given.timestep)
        if reason is not None:
            return reason
        configuration = self.schedule.configuration()
        if configuration.reason is not None:
            return configuration.reason
        shape, device = sample.shape, sample.device
        if model_output.shape != shape or model_output.device != device or len(shape) < 2:
            return "model_output and sample differ in shape or device, or have one dimension"
        if noise is not None and (noise.shape != shape or noise.device != device):
            return "variance_noise comes in another shape or on another device"
        if sampler.mask is not None and not _masks(mask, sample):
            return "the mask has another dtype or device than the sample, or does not broadcast to it"
        named = dict(zip(self.signature.others, given.others, strict=True))
        for name in self.signature.unknown:
            if named[name] is not self.signature.defaults.get(name, self):
                return f"the argument {name} is given"
        for name in sampler.scalars:
            if named[name] is None and self.signature.defaults.get(name) is False:
                named[name] = False  # pipelines pass None for a switch that is off
        scalars = tuple([named[name] for name in sampler.scalars])
        for scalar in scalars:
            if not isinstance(scalar, (int, float)):
                return f"an argument of the step is a {type(scalar).__name__}, not a number"

        times = given.timestep, *given.times
        for name, time, moment in zip(("timestep", *sampler.timesteps), times, moments, strict=False):
            if moment is None and (time is not None or name == "timestep"):
                return f"{name} is not one number"
        past = self._past_moments()
        if past is None:
            return "an earlier timestep is not one number"

        history: list[Any] = []
        for entry in (*[attributes.get(name) for name in sampler.history], *given.tensors):
            many = type(entry) is list
            found: list[Any] = []
            for tensor in entry if many else (entry,):
                if isinstance(tensor, Tensor):
                    if tensor.shape != shape or tensor.device != device:
                        return "a history tensor differs from the sample in shape or device"
                    found.append(tensor.dtype)
                elif tensor is None or type(tensor) is int:
                    found.append(tensor)
                else:
                    return f"the sampler keeps a {type(tensor).__name__}"
            history.append(tuple(found) if many else found[0])
        value = named.get("return_dict")
        call = Call(
            moments[0] if moments else None, begin, sample.dtype, model_output.dtype,
            None if noise is None else noise.dtype, tuple([attributes.get(name) for name in sampler.state]),
            tuple(history), past, scalars, tuple(moments[1:]), None if value is None else bool(value),
        )
        if not is_hashable(call):
            return "the scheduler keeps something by which no step can be looked up"
        return configuration.steps.get(call) or self._probe(configuration, call)

    def _past_moments(self) -> tuple[Moment | None, ...] | None:
        """The timesteps before this, with their values where these matter; ``None`` if one has none."""
        if self.sampler.past is None:
            return ()
        timesteps = vars(self.scheduler)[self.sampler.past]
        if not self.sampler.by_timestep:
            return tuple([None if t is None else _SOME_MOMENT for t in timesteps])
        # The list outlives its schedule, and then a tensor's value could only be read from the device.
        known = {id(t): moment for t, moment in self._past}
        moments = [None if t is None else known.get(id(t)) or self.schedule.moment(t) for t in timesteps]
        values = all((t is None) is (m is None) for t, m in zip(timesteps, moments, strict=True))
        return tuple(moments) if values else None

    def _run(self, site: Site, following: Next, values: list[Any], given: Arguments) -> Any:
        """The step's result."""
        plan = following.step.plan
        sample, model_output = values[SAMPLE], values[MODEL_OUTPUT]
        for position, dtype in enumerate(plan.drawn, NOISE):
            values[position] = self._randn(model_output.shape, given.generator, device=model_output.device, dtype=dtype)
        for launch in following.launches:
            tensors = (sample, model_output, [values[j] for j in launch.history],
                       values[NOISE] if launch.noise else None)
            choice = launch.choice or launch.choose(site, *tensors)
            if site.served.get(launch.slot) is not choice:
                site.note(launch.slot, choice)
            result, entry, kept = launch.run(*tensors)
            if values[CLAMPED] is None:  # the first launch's; none where there is no entry
                values[CLAMPED] = entry
            values.append(result)
            if launch.keeps:
                values.append(kept)
        if plan.blend is not None:
            zero, one = plan.blend
            values[zero] = torch.lerp(values[zero], values[one], given.mask)
        attributes = vars(self.scheduler)
        for name, after in plan.history:
            if isinstance(after, list):
                attributes[name][:] = [values[a] if isinstance(a, int) else a.value for a in after]
            else:
                attributes[name] = values[after] if isinstance(after, int) else after.value
        attributes.update(following.state)
        if plan.past:
            past = attributes[self.sampler.past]
            past[:] = [None if j is None else given.timestep if j < 0 else past[j] for j in plan.past]
        fields = [values[a] if isinstance(a, int) else a.value for _, a in plan.fields]
        if plan.output is tuple:
            return tuple(fields)
        return plan.output(**dict(zip(following.step.names, fields, strict=True)))

    def _probe(self, configuration: Configuration, call: Call) -> Step | str:
        if len(configuration.steps) >= MAX_STEPS:
            configuration.forget()
            self._place = None
        step: Step | str
        try:
            with ordinary_tensors():  # the probe looks at versions, too
                plan = plan_of(probe(configuration.twin, self.sampler, call))
        except NotLinear as error:
            step = str(error)
        except Exception as error:  # the stock step raises on such a call, and will tell the caller so itself
            step = f"the stock step raises {type(error).__name__}"
        else:
            attributes = vars(self.scheduler)
            states = zip(plan.state, call.state, strict=True)
            state = {name: v for (name, v), old in states if name in attributes or v is not old}
            for name, value in state.items():
                if isinstance(value, Tensor):
                    with ordinary_tensors():
                        state[name] = configuration.kept(value, attributes["sigmas"].device)
            history = tuple([(n, after) for n, after in plan.history if n in attributes or after != Constant(None)])
            step = Step(plan._replace(state=tuple(state.items()), history=history), call)
        configuration.steps[call] = step
        return step


_SOME_MOMENT = Moment(0, None)


def _masks(mask: Any, sample: Tensor) -> bool:
    if not isinstance(mask, Tensor) or mask.dtype is not sample.dtype or mask.device != sample.device:
        return False
    sizes = (1,) * (sample.dim() - mask.dim()) + mask.shape
    return len(sizes) == sample.dim() and all(m in (1, s) for m, s in zip(sizes, sample.shape, strict=True))


def _type(timestep: Any) -> Any:
    return timestep.dtype if isinstance(timestep, Tensor) else type(timestep)


def _sort(value: Any) -> Any:
    """Of what a scheduler keeps between steps: a tensor's kind, or the value itself."""
    return _kind(value) if isinstance(value, Tensor) else value


#: What kernels look at of a tensor, besides its strides.
_kind = attrgetter("__class__", "dtype", "shape", "device", "layout")

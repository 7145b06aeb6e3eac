"""A scheduler's step as coefficients, taken from the scheduler itself.

A step without thresholding is the same linear map at every element of its tensors. So one call of the stock
step on tensors whose elements are unit impulses, one per input, reads off every coefficient, in fp64. A few
more elements hold arbitrary numbers, and check that the map is linear and acts element by element. The clamp
of the predicted clean sample is cut out: its result counts as one more input. A second call in the dtypes of
the real tensors gives the dtypes of the results, and tells which are inputs passed through.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.schedulers.samplers import Sampler

#: Inputs of every step: first those of ``scheduler_step``'s first coefficients. Noise is drawn twice by one sampler
#: only. History follows, and arguments that enter like it.
SAMPLE, MODEL_OUTPUT, CLAMPED, NOISE, SECOND_NOISE, HISTORY = range(6)

_CHECKS = 4
#: Relative to the sum of absolute terms: cancellation within a stock step stays below, a wrong map does not.
_TOLERANCE = 1e-9

_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as})
_OTHER_NOISE = frozenset({torch.randn_like, torch.rand_like, torch.rand, torch.normal, Tensor.normal_})
_CLAMPS = frozenset({Tensor.clamp, Tensor.clip, torch.clamp, torch.clip})


class NotLinear(Exception):
    """The step is not a linear map that the kernel computes; the message says why."""


class Moment(NamedTuple):
    """A timestep: its value, and its dtype if it is a tensor, since arithmetic on that rounds otherwise."""

    value: int | float
    dtype: torch.dtype | None
    axes: int = 0

    def argument(self) -> Any:
        """As it was passed to the step."""
        if self.dtype is None:
            return self.value
        return torch.tensor(self.value, dtype=self.dtype).view([1] * self.axes)


class Call(NamedTuple):
    """One call of the step, as far as it shapes the map. Dtypes stand for tensors.

    Attributes:
        timestep: for a sampler whose step depends on it, or looks the first step up by it.
        begin: ``_begin_index``, for a first step.
        sample, model_output: their dtypes.
        noise: dtype of noise passed as an argument, if any is.
        state: the sampler's state attributes before the call.
        history: its history attributes before the call, lists as tuples; and the tensors among its arguments.
        past: the timesteps of earlier steps.
        scalars: its scalar arguments.
        timesteps: its further arguments that are timesteps.
        return_dict: the argument, if there is one.
    """

    timestep: Moment | None
    begin: int | None
    sample: torch.dtype
    model_output: torch.dtype
    noise: torch.dtype | None
    state: tuple[Any, ...]
    history: tuple[Any, ...]
    past: tuple[Moment | None, ...]
    scalars: tuple[Any, ...]
    timesteps: tuple[Moment | None, ...]
    return_dict: bool | None


class Source(NamedTuple):
    """Where a result comes from: the n-th tensor that the step computes, or an input passed through."""

    computed: bool
    position: int


class Constant(NamedTuple):
    """A result that is no tensor."""

    value: Any


class Computed(NamedTuple):
    """A tensor that the step computes: coefficients over (sample, model output, clamped, noise, *history)."""

    coefficients: tuple[float, ...]
    dtype: torch.dtype


class Clamp(NamedTuple):
    """The tensor that the step clamps to [-bound, bound]: coefficients over (sample, model output)."""

    coefficients: tuple[float, float]
    bound: float
    dtype: torch.dtype


class LinearStep(NamedTuple):
    """What one call of a stock step does.

    Attributes:
        computed: the tensors it computes; the next sample first.
        blended: coefficients of the next sample where the mask is 1, if there is a mask; the computed one is where it
            is 0.
        clamp: what it clamps, if it does.
        drawn: dtypes of the noise it draws.
        output: class of its result, and where each field comes from (names are empty for a tuple).
        history: what the history attributes hold afterwards.
        state: what the state attributes hold afterwards. A ``torch.Size`` stands for that of the sample's axes
            but two.
        past: what the timesteps of earlier steps are afterwards: positions among them before; -1 is this step's.
    """

    computed: tuple[Computed, ...]
    blended: tuple[float, ...] | None
    clamp: Clamp | None
    drawn: tuple[torch.dtype, ...]
    output: tuple[type, tuple[tuple[str, Source | Constant], ...]]
    history: tuple[tuple[str, Source | Constant | list[Source | Constant]], ...]
    state: tuple[tuple[str, Any], ...]
    past: tuple[int | None, ...]


def twin_of(scheduler: Any, sampler: Sampler, without: Collection[str]) -> Any:
    """A stock copy of ``scheduler`` on the CPU to probe; attributes named in ``without`` are left out."""
    twin = object.__new__(type(scheduler))
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            twin.__dict__[name] = value.detach().to("cpu", copy=True)
        elif name not in without and name not in sampler.history and name != sampler.past:
            twin.__dict__[name] = copy.deepcopy(value)
    return twin


def probe(twin: Any, sampler: Sampler, call: Call) -> LinearStep:
    """The map of one call of ``twin``'s stock step.

    Raises:
        NotLinear: if it is not a map that the kernel computes.
        Exception: what the stock step raises for such a call.
    """
    entries = [d for entry in call.history for d in (entry if isinstance(entry, tuple) else (entry,))]
    kept = [d for d in entries if isinstance(d, torch.dtype)]
    slots = _slots(HISTORY + len(kept))
    exact = _Recorder([row.clone().view(1, -1, 1, 1) for row in slots])
    output, history, _, _ = _step(twin, sampler, call, exact)
    noise = call.noise or torch.float32
    typed = _Recorder([torch.full((1, _CHECKS, 1, 1), 0.5, dtype=d) for d in (
        call.sample, call.model_output, torch.float32, noise, noise, *kept)], keep_dtypes=True)
    typed_output, typed_history, state, past = _step(twin, sampler, call, typed)

    computed: list[Computed] = []
    # An input that the step wrote to is a result.
    sources = {id(t): Source(False, i) for i, t in enumerate(typed.inputs) if not t._version}
    if not all(id(t) in sources for t in typed.inputs[:HISTORY]):
        raise NotLinear("the step writes to its arguments")

    def source(exact_result: Any, typed_result: Any) -> Source | Constant:
        if isinstance(exact_result, Tensor) is not isinstance(typed_result, Tensor):
            raise NotLinear("a result of the step is a tensor in some dtypes only")
        if not isinstance(typed_result, Tensor):
            return Constant(typed_result)
        if id(typed_result) not in sources:
            sources[id(typed_result)] = Source(True, len(computed))
            computed.append(Computed(_coefficients(exact_result, slots), typed_result.dtype))
        return sources[id(typed_result)]

    fields = tuple((name, source(a, b)) for (name, a), (_, b) in zip(
        _fields(output), _fields(typed_output), strict=True))
    after = tuple(
        (name, [source(*pair) for pair in zip(a, b, strict=True)] if isinstance(a, list) else source(a, b))
        for name, a, b in zip(sampler.history, history, typed_history, strict=True)
    )
    clamp = exact.clamp(slots, typed.inputs[CLAMPED].dtype)
    blended = None
    if sampler.mask is not None:
        blended = _blended(twin, sampler, call, slots, computed[0])
    return LinearStep(tuple(computed), blended, clamp, tuple(typed.drawn), (type(output), fields), after,
                      tuple(zip(sampler.state, state, strict=True)), past)


def _blended(twin: Any, sampler: Sampler, call: Call, slots: Tensor, first: Computed) -> tuple[float, ...]:
    """The next sample's coefficients where the mask is 1; ``first`` is that where it is 0."""
    if first.dtype is not call.sample:
        raise NotLinear("the next sample has another dtype than the mask")

    def masked(mask: float) -> tuple[float, ...]:
        output, *_ = _step(twin, sampler, call, _Recorder([row.clone().view(1, -1, 1, 1) for row in slots]), mask)
        return _coefficients(_fields(output)[0][1], slots)

    zero, half, one = np.array(first.coefficients), np.array(masked(0.5)), np.array(masked(1.0))
    if not (abs(half - (zero + one) / 2) <= _TOLERANCE * (abs(zero) + abs(one))).all():
        raise NotLinear("the step does not blend two samples by its mask")
    return tuple(one.tolist())


class _Recorder(TorchFunctionMode):
    """Hands out a step's inputs, and cuts out its clamp and its noise while the step runs.

    Casts are skipped unless ``keep_dtypes``: a sampler that upcasts to fp32 would otherwise round here.
    """

    def __init__(self, inputs: list[Tensor], keep_dtypes: bool = False) -> None:
        super().__init__()
        self.inputs = inputs
        self.keep_dtypes = keep_dtypes
        self.drawn: list[torch.dtype] = []
        self._clamped: tuple[Tensor, float] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return self._draw(**kwargs)
        if func in _OTHER_NOISE:
            raise NotLinear("the step draws noise in a way of its own")
        if args and isinstance(args[0], Tensor) and args[0].shape == self.inputs[SAMPLE].shape:
            if func in _CLAMPS:
                return self._clamp(*args, **kwargs)
            if func in _CASTS and not self.keep_dtypes:
                return args[0]
        return func(*args, **kwargs)

    def _draw(self, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        position = NOISE + len(self.drawn)
        if position == HISTORY:
            raise NotLinear("the step draws noise more than twice")
        self.drawn.append(dtype or torch.get_default_dtype())
        if self.keep_dtypes:
            self.inputs[position] = self.inputs[position].to(self.drawn[-1])
        return self.inputs[position]

    def _clamp(self, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
        if self._clamped is not None:
            raise NotLinear("the step clamps twice")
        if not (isinstance(min, (int, float)) and isinstance(max, (int, float)) and min == -max):
            raise NotLinear("the step clamps to something other than [-bound, bound]")
        self._clamped = x, float(max)
        # A clamp returns a new tensor of its argument's dtype.
        self.inputs[CLAMPED] = self.inputs[CLAMPED].to(x.dtype, copy=True)
        return self.inputs[CLAMPED]

    def clamp(self, slots: Tensor, dtype: torch.dtype) -> Clamp | None:
        """What was clamped, over (sample, model output); ``dtype`` is its own in the real step."""
        if self._clamped is None:
            return None
        x, bound = self._clamped
        s, m, *others = _coefficients(x, slots)
        if any(others):
            raise NotLinear("what the step clamps depends on its noise or history")
        return Clamp((s, m), bound, dtype)


def _step(
    twin: Any, sampler: Sampler, call: Call, recorder: _Recorder, mask: float = 0.0
) -> tuple[Any, list[Any], list[Any], tuple[int | None, ...]]:
    """The stock step in the state that ``call`` describes: its result; its history, state and past afterwards."""
    inputs = recorder.inputs
    attributes = vars(twin)
    tables = dict(attributes)
    kept = iter(inputs[HISTORY:])

    def tensor(entry: Any) -> Any:
        return next(kept) if isinstance(entry, torch.dtype) else entry

    try:
        attributes["_begin_index"] = tables["_begin_index"] = call.begin
        for name, value in zip(sampler.state, call.state, strict=True):
            attributes[name] = value.cpu() if isinstance(value, Tensor) else value
        before, arguments_before = call.history[: len(sampler.history)], call.history[len(sampler.history) :]
        for name, entry in zip(sampler.history, before, strict=True):
            attributes[name] = [tensor(e) for e in entry] if isinstance(entry, tuple) else tensor(entry)
        past = [None if moment is None else torch.tensor(moment.value, dtype=moment.dtype) for moment in call.past]
        if sampler.past is not None:
            attributes[sampler.past] = list(past)

        arguments = dict(zip(sampler.scalars, call.scalars, strict=True))
        arguments |= {name: tensor(e) for name, e in zip(sampler.tensors, arguments_before, strict=True)}
        for name, moment in zip(sampler.timesteps, call.timesteps, strict=True):
            arguments[name] = None if moment is None else moment.argument()
        if call.noise is not None and sampler.noise is not None:
            arguments[sampler.noise] = inputs[NOISE]
        if sampler.mask is not None:
            arguments[sampler.mask] = torch.full((1, 1, 1, 1), mask, dtype=inputs[SAMPLE].dtype)
        if call.return_dict is not None:
            arguments["return_dict"] = call.return_dict
        if call.timestep is not None:
            timestep = call.timestep.argument()
        else:
            timestep = twin.timesteps[min(twin._step_index, len(twin.timesteps) - 1)]
        model_output, time, sample = sampler.names
        arguments |= {model_output: inputs[MODEL_OUTPUT], time: timestep, sample: inputs[SAMPLE]}
        with torch.no_grad(), recorder:
            output = getattr(type(twin), sampler.method)(twin, **arguments)

        changing = {*sampler.history, *sampler.state, sampler.past}
        for name in attributes.keys() - changing:
            if attributes[name] is not tables.get(name, attributes):
                raise NotLinear(f"the step changes the attribute {name}")
        seen = {id(t): i for i, t in enumerate(past) if t is not None} | {id(timestep): -1}
        listed = attributes[sampler.past] if sampler.past is not None else []
        return (output, [attributes[n] for n in sampler.history], [attributes[n] for n in sampler.state],
                tuple([None if t is None else seen[id(t)] for t in listed]))
    finally:
        attributes.clear()
        attributes.update(tables)


def _fields(output: Any) -> list[tuple[str, Any]]:
    return [("", v) for v in output] if type(output) is tuple else list(output.items())


@functools.lru_cache
def _slots(count: int) -> Tensor:
    """(count, count + checks): one row per input, its impulse, then numbers that every float dtype holds."""
    numbers = torch.randint(-16, 17, (count, _CHECKS), generator=torch.Generator().manual_seed(0)) / 8
    return torch.cat([torch.eye(count), numbers], dim=1).double()


def _coefficients(result: Tensor, slots: Tensor) -> tuple[float, ...]:
    """The coefficients of ``result`` over the inputs, after a check on the elements that are no impulses."""
    count, width = slots.shape
    if result.numel() != width:
        raise NotLinear("a result of the step has another shape than the sample")
    values = result.double().numpy().ravel()  # a dozen operations on as many numbers: quicker outside of torch
    coefficients, checks, numbers = values[:count], values[count:], slots.numpy()[:, count:]
    if not np.isfinite(coefficients).all():
        raise NotLinear("a coefficient is not finite")
    if not (abs(checks - coefficients @ numbers) <= _TOLERANCE * (abs(coefficients) @ abs(numbers))).all():
        raise NotLinear("the step is not linear in its tensors")
    return tuple(coefficients.tolist())

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

#: Inputs of every step, in the order of ``scheduler_step``'s first coefficients; history follows.
SAMPLE, MODEL_OUTPUT, CLAMPED, NOISE, HISTORY = range(5)

_CHECKS = 4
#: Relative to the sum of absolute terms: cancellation within a stock step stays below, a wrong map does not.
_TOLERANCE = 1e-9

_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as})
_OTHER_NOISE = frozenset({torch.randn_like, torch.rand_like, torch.rand, torch.normal, Tensor.normal_})
_CLAMPS = frozenset({Tensor.clamp, Tensor.clip, torch.clamp, torch.clip})


class NotLinear(Exception):
    """The step is not a linear map that the kernel computes; the message says why."""


class Call(NamedTuple):
    """One call of ``step``, as far as it shapes the map. Dtypes stand for tensors.

    Attributes:
        timestep: its value, for a sampler whose step depends on it.
        timestep_dtype: of a timestep that is a tensor: arithmetic on it rounds otherwise than on a number.
        sample, model_output: their dtypes.
        noise: dtype of noise passed as an argument, if any is.
        state: the sampler's state attributes before the call.
        history: its history attributes before the call, lists as tuples.
        scalars: its scalar arguments.
        return_dict: the argument.
    """

    timestep: int | None
    timestep_dtype: torch.dtype | None
    sample: torch.dtype
    model_output: torch.dtype
    noise: torch.dtype | None
    state: tuple[Any, ...]
    history: tuple[Any, ...]
    scalars: tuple[Any, ...]
    return_dict: bool


class Source(NamedTuple):
    """Where a result comes from: the n-th tensor that the step computes, or an input passed through."""

    computed: bool
    position: int


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
        clamp: what it clamps, if it does.
        drawn: dtype of the noise it draws, if it does.
        output: class of its result, and where each field comes from (names are empty for a tuple).
        history: what the history attributes hold afterwards.
        state: what the state attributes hold afterwards.
    """

    computed: tuple[Computed, ...]
    clamp: Clamp | None
    drawn: torch.dtype | None
    output: tuple[type, tuple[tuple[str, Source], ...]]
    history: tuple[tuple[str, Source | list[Source | None] | None], ...]
    state: tuple[tuple[str, Any], ...]


def twin_of(scheduler: Any, sampler: Sampler, without: Collection[str]) -> Any:
    """A stock copy of ``scheduler`` on the CPU to probe; attributes named in ``without`` are left out."""
    twin = object.__new__(type(scheduler))
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            twin.__dict__[name] = value.detach().to("cpu", copy=True)
        elif name not in without and name not in sampler.history:
            twin.__dict__[name] = copy.deepcopy(value)
    return twin


def probe(twin: Any, sampler: Sampler, call: Call) -> LinearStep:
    """The map of one call of ``twin``'s stock step.

    Raises:
        NotLinear: if it is not a map that the kernel computes.
        Exception: what the stock step raises for such a call.
    """
    dtypes = [d for entry in call.history for d in (entry if isinstance(entry, tuple) else (entry,))]
    kept = [d for d in dtypes if d is not None]
    slots = _slots(HISTORY + len(kept))
    exact = _Recorder([row.view(1, -1, 1, 1) for row in slots.clone()])
    output, history, state = _step(twin, sampler, call, exact)
    typed = _Recorder([torch.full((1, _CHECKS, 1, 1), 0.5, dtype=d) for d in (
        call.sample, call.model_output, torch.float32, call.noise or torch.float32, *kept)], keep_dtypes=True)
    typed_output, typed_history, _ = _step(twin, sampler, call, typed)

    computed: list[Computed] = []
    sources = {id(t): Source(False, i) for i, t in enumerate(typed.inputs)}

    def source(exact_result: Any, typed_result: Any) -> Source | None:
        if exact_result is None and typed_result is None:
            return None
        if not (isinstance(exact_result, Tensor) and isinstance(typed_result, Tensor)):
            raise NotLinear("a result of the step is not a tensor")
        if id(typed_result) not in sources:
            sources[id(typed_result)] = Source(True, len(computed))
            computed.append(Computed(_coefficients(exact_result, slots), typed_result.dtype))
        return sources[id(typed_result)]

    fields = []
    for (name, a), (_, b) in zip(_fields(output), _fields(typed_output), strict=True):
        found = source(a, b)
        if found is None:
            raise NotLinear("a result of the step is None")
        fields.append((name, found))
    after = tuple(
        (name, [source(*pair) for pair in zip(a, b, strict=True)] if isinstance(a, list) else source(a, b))
        for name, a, b in zip(sampler.history, history, typed_history, strict=True)
    )
    clamp = exact.clamp(slots, typed.inputs[CLAMPED].dtype)
    return LinearStep(tuple(computed), clamp, typed.drawn, (type(output), tuple(fields)), after,
                      tuple(zip(sampler.state, state, strict=True)))


class _Recorder(TorchFunctionMode):
    """Hands out a step's inputs, and cuts out its clamp and its noise while the step runs.

    Casts are skipped unless ``keep_dtypes``: a sampler that upcasts to fp32 would otherwise round here.
    """

    def __init__(self, inputs: list[Tensor], keep_dtypes: bool = False) -> None:
        super().__init__()
        self.inputs = inputs
        self.keep_dtypes = keep_dtypes
        self.drawn: torch.dtype | None = None
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
        if self.drawn is not None:
            raise NotLinear("the step draws noise twice")
        self.drawn = dtype or torch.get_default_dtype()
        if self.keep_dtypes:
            self.inputs[NOISE] = self.inputs[NOISE].to(self.drawn)
        return self.inputs[NOISE]

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


def _step(twin: Any, sampler: Sampler, call: Call, recorder: _Recorder) -> tuple[Any, list[Any], list[Any]]:
    """The stock step in the state that ``call`` describes: its result, its history and state afterwards."""
    inputs = recorder.inputs
    attributes = vars(twin)
    tables = dict(attributes)
    kept = iter(inputs[HISTORY:])
    try:
        attributes.update(zip(sampler.state, call.state, strict=True))
        for name, entry in zip(sampler.history, call.history, strict=True):
            if isinstance(entry, tuple):
                attributes[name] = [None if d is None else next(kept) for d in entry]
            else:
                attributes[name] = None if entry is None else next(kept)
        arguments = dict(zip(sampler.scalars, call.scalars, strict=True))
        if call.noise is not None and sampler.noise is not None:
            arguments[sampler.noise] = inputs[NOISE]
        timestep: Any = call.timestep
        if call.timestep_dtype is not None:
            timestep = torch.tensor(timestep, dtype=call.timestep_dtype)
        if not sampler.by_timestep:
            timestep = twin.timesteps[min(twin._step_index, len(twin.timesteps) - 1)]
        with torch.no_grad(), recorder:
            output = type(twin).step(twin, inputs[MODEL_OUTPUT], timestep, inputs[SAMPLE],
                                     return_dict=call.return_dict, **arguments)
        for name in attributes.keys() - {*sampler.history, *sampler.state}:
            if attributes[name] is not tables.get(name, attributes):
                raise NotLinear(f"the step changes the attribute {name}")
        return output, [attributes[n] for n in sampler.history], [attributes[n] for n in sampler.state]
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

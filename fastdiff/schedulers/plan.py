"""A step of which the map is known, as launches of ``scheduler_step``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from fastdiff.backends import Choice
from fastdiff.ops import scheduler_step
from fastdiff.patching._site import Site
from fastdiff.schedulers.probe import (
    CLAMPED,
    NOISE,
    SECOND_NOISE,
    Call,
    Computed,
    Constant,
    LinearStep,
    NotLinear,
    Source,
)


class Launch(NamedTuple):
    """Arguments of one ``scheduler_step`` call; ``history`` are positions among the step's values."""

    history: tuple[int, ...]
    noise: bool
    prev: list[float]
    entry: list[float]
    clip: float | None
    prev_dtype: torch.dtype | None
    entry_dtype: torch.dtype | None
    kept: list[float]
    kept_dtype: torch.dtype | None

    def arguments(self, call: Call) -> tuple[Any, ...]:
        """Those of the op after its tensors, without the defaults at the end and the dtypes that it takes by itself:
        each costs time."""
        arguments: list[Any] = [
            self.prev, self.entry, self.clip,
            None if self.prev_dtype == call.sample else self.prev_dtype,
            None if self.entry_dtype == call.model_output else self.entry_dtype,
            self.kept,
            None if self.kept_dtype == call.sample else self.kept_dtype,
        ]
        while arguments[-1] in (None, []) and len(arguments) > 2:
            arguments.pop()
        return tuple(arguments)


#: A value after the step: the position of a tensor among the step's values, or what is no tensor.
After = int | Constant


class Plan(NamedTuple):
    """One step, ready to run.

    The step's values are (sample, model output, new entry, noise, second noise, *history, *results of the
    launches); fields and history refer to them by position. ``blend`` are those of the next sample where a mask is 0,
    which the blend replaces, and where it is 1.
    """

    launches: tuple[Launch, ...]
    drawn: tuple[torch.dtype, ...]
    output: type
    fields: tuple[tuple[str, After], ...]
    history: tuple[tuple[str, After | list[After]], ...]
    state: tuple[tuple[str, Any], ...]
    past: tuple[int | None, ...]
    blend: tuple[int, int] | None = None


class Place:
    """Where a trajectory is: at its start, or after a step.

    Attributes:
        next: the step that came next from here last time.
    """

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next: Next | None = None


class Step(Place):
    """A step that is known.

    Attributes:
        plan: what it does.
        arguments: of the op after its tensors, per launch.
        names: of the fields of the result.
    """

    __slots__ = ("arguments", "names", "plan")

    def __init__(self, plan: Plan, call: Call) -> None:
        super().__init__()
        self.plan = plan
        self.arguments = tuple([launch.arguments(call) for launch in plan.launches])
        self.names = tuple([name for name, _ in plan.fields])


class Served:
    """A launch of a step, and what serves it as long as only the tensors change.

    Attributes:
        slot: in the report.
        history: positions among the step's values.
        noise: whether it takes noise.
        keeps: whether it has a third result.
        choice: what serves it; ``None`` before its first run.
        run: that, given (sample, model output, history, noise).
    """

    __slots__ = ("arguments", "choice", "history", "keeps", "noise", "run", "slot")

    def __init__(self, index: int, launch: Launch, arguments: tuple[Any, ...]) -> None:
        self.slot = f"step, launch {index + 1}" if index else "step"
        self.history, self.noise, self.keeps = launch.history, launch.noise, bool(launch.kept)
        self.arguments = arguments
        self.choice: Choice | None = None
        self.run: Callable[..., Any] = self._unprepared

    def choose(self, site: Site, *tensors: Any) -> Choice:
        """Find what serves these tensors, and all like them."""
        call = *tensors, *self.arguments
        choice = self.choice = site.choose(scheduler_step, *call)
        self.run = (choice.prepare and choice.prepare(*call)) or self._unprepared
        return choice

    def _unprepared(self, *tensors: Any) -> Any:
        assert self.choice is not None
        return self.choice.run(*tensors, *self.arguments)


class Next:
    """The step that comes next, and all that it depends on besides its place.

    Attributes:
        key: of the call, all that the step depends on.
        step: the step.
        launches: its launches.
        state: what the state attributes are afterwards.
        known: runs it at once, if the arguments are passed in the form ``form``; see
            :mod:`fastdiff.schedulers.known`.
    """

    __slots__ = ("form", "key", "known", "launches", "state", "step")

    def __init__(self, key: tuple[Any, ...], step: Step, shape: torch.Size) -> None:
        self.key, self.step = key, step
        pairs = zip(step.plan.launches, step.arguments, strict=True)
        self.launches = tuple([Served(i, *pair) for i, pair in enumerate(pairs)])
        self.state = {name: shape[2:] if type(value) is torch.Size else value for name, value in step.plan.state}
        self.form: tuple[Any, ...] = ()
        self.known: Callable[..., Any] | None = None


def _by_entry(coefficients: list[float], entry: list[float]) -> list[float]:
    """The coefficients, where the sample and the model output are in the sum as in a multiple of the new entry only:
    of that multiple, which is one term less."""
    if not entry or coefficients[CLAMPED] or not all(coefficients[:CLAMPED]) or not all(entry):
        return coefficients
    first, second = [c / e for c, e in zip(coefficients[:CLAMPED], entry, strict=True)]
    if abs(first - second) > _SAME * abs(first):
        return coefficients
    return [0.0, 0.0, first, *coefficients[CLAMPED + 1 :]]


#: So far apart, relatively, numbers of fp64 are the same, each with the roundings of its own that it comes from.
_SAME = 8 * 2.0**-52


def plan_of(step: LinearStep) -> Plan:
    """How ``scheduler_step`` does ``step``."""
    if not step.computed:
        raise NotLinear("the step computes nothing")
    inputs = len(step.computed[0].coefficients)
    computed = step.computed
    if step.blended is not None:
        computed = *computed, Computed(step.blended, computed[0].dtype)
    entry: list[float] = []
    entry_dtype, entry_index = None, None
    if step.clamp is not None:
        entry, entry_dtype = list(step.clamp.coefficients), step.clamp.dtype
    else:
        for i, tensor in enumerate(step.computed[1:], 1):
            if not any(tensor.coefficients[CLAMPED:]):
                entry, entry_dtype, entry_index = list(tensor.coefficients[:CLAMPED]), tensor.dtype, i
                break
    others = [i for i in range(len(computed)) if i != entry_index]
    positions = {i: inputs + n for n, i in enumerate(others)}
    if entry_index is not None:
        positions[entry_index] = CLAMPED
    launches: list[Launch] = []
    for pair in zip_longest(others[::2], others[1::2]):
        first, *second = [computed[i] for i in pair if i is not None]
        both = [t.coefficients for t in (first, *second)]
        used = [j for j in range(SECOND_NOISE, inputs) if any(c[j] for c in both)]
        # The entry is written by the first launch; a later one needs it only where it is part of a sum.
        own = entry if not launches or any(c[CLAMPED] for c in both) else []
        bound = step.clamp.bound if step.clamp and own else None
        prev, *kept = [[*c[:SECOND_NOISE], *(c[j] for j in used)] for c in both]
        if bound is None:
            prev, *kept = [_by_entry(c, own) for c in (prev, *kept)]
        launches.append(
            Launch(tuple(used), any(c[NOISE] for c in both), prev, own, bound, first.dtype, entry_dtype,
                   kept[0] if kept else [], second[0].dtype if second else None)
        )

    def after(result: Source | Constant) -> After:
        if isinstance(result, Constant):
            return result
        return positions[result.position] if result.computed else result.position

    output, fields = step.output
    return Plan(
        tuple(launches),
        step.drawn,
        output,
        tuple((name, after(result)) for name, result in fields),
        tuple((name, [after(r) for r in results] if isinstance(results, list) else after(results))
              for name, results in step.history),
        step.state,
        step.past,
        None if step.blended is None else (positions[0], positions[len(computed) - 1]),
    )

"""A known step written down for ``fastdiff._C.known_step``, which then does in one call what Python needs tens for.

Everything of Python's way is in :class:`~fastdiff.schedulers.stepper.Stepper`. What is written down here is all that
made this call this step, what ran, and what the scheduler held afterwards; where anything else comes, the compiled
function returns ``NotImplemented`` before it has done anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff import _extension
from fastdiff.backends import PLAIN, _override
from fastdiff.patching._site import Site
from fastdiff.schedulers.plan import Next
from fastdiff.schedulers.probe import MODEL_OUTPUT, NOISE, SAMPLE, Moment
from fastdiff.schedulers.samplers import Sampler

#: (stepper, site, args, kwargs) -> the step's result, or ``NotImplemented``.
Known = Callable[[Any, Site, tuple[Any, ...], dict[str, Any]], Any]

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_CONSTANTS = (bool, int, float, str, type(None))


class Call(NamedTuple):
    """The call by which a step became known.

    Attributes:
        positional: how many arguments came by position.
        arguments: all of them by name, in the order of the call.
        moments: values of the timestep and of further ones, where they count.
        first: whether ``_begin_index``, of value ``begin``, counts.
        values: the step's values before its launches.
        mask: the argument of that name.
    """

    positional: int
    arguments: Mapping[str, Any]
    moments: list[Moment | None]
    first: bool
    begin: int | None
    values: list[Any]
    mask: Any


class _Unsuitable(Exception):
    """The call is not one that comes again."""


def known_step(sampler: Sampler, begins: bool, lists: tuple[str, ...], randn: Callable[..., Any], site: Site,
               following: Next, call: Call) -> Known | None:
    """The step ``following``, which was just run for ``call``, as one function; ``None`` if it cannot be one.

    Args:
        begins: whether the scheduler has ``_begin_index``.
        lists: names of the attributes that may be lists of what earlier steps left.
        randn: draws noise.
    """
    compiled = getattr(_extension.module, "known_step", None)  # an extension from before has none
    tensors = [t for t in (*call.values, call.mask) if t is not None]
    if compiled is None or forward_ad._current_level != -1 or any(type(t) not in _PLAIN_TENSORS for t in tensors):
        return None
    try:
        arguments = list(_arguments(sampler, call))
    except _Unsuitable:
        return None
    plan, model_output = following.step.plan, call.values[MODEL_OUTPUT]
    own = sum(isinstance(call.arguments.get(name), Tensor) for name in sampler.tensors)
    values = call.values.copy()
    values[NOISE : NOISE + len(plan.drawn)] = [None] * len(plan.drawn)
    parts = {
        "conditions": [*PLAIN, (torch._C._is_any_autocast_enabled, False)],
        "override": _override,
        "overridden": vars(_override).get("wanted"),
        "modes": vars(forward_ad),
        "positional": call.positional,
        "named": [*call.arguments][call.positional :],
        "arguments": arguments,
        "tensors": values,
        "history_end": len(values) - own,
        "mask": call.mask,
        "held": sampler.history,
        "lists": lists,
        "begin": ("_begin_index", call.first, call.begin) if begins else None,
        "backend": site.backend,
        "launches": [
            {
                "slot": launch.slot, "choice": launch.choice, "history": launch.history, "noise": launch.noise,
                "keeps": launch.keeps, "run": launch.run, "bound": getattr(launch.run, "bound", None),
                "results": getattr(launch.run, "results", ()),
            }
            for launch in following.launches
        ],
        "drawn": plan.drawn,
        "randn": randn,
        "shape": model_output.shape,
        "device": model_output.device,
        "blend": plan.blend,
        "history": plan.history,
        "state": following.state.items(),
        "past_name": sampler.past,
        "past": plan.past,
        "remembers": sampler.by_timestep and sampler.past is not None,
        "output": plan.output,
        "fields": plan.fields,
    }  # fmt: skip
    try:
        known: Known = compiled(parts)
    except (ValueError, RuntimeError):  # a tensor does not tell what it is, or torch lacks what the extension uses
        return None  # the step is done, and Python does the next ones
    return known


def _arguments(sampler: Sampler, call: Call) -> Iterator[tuple[Any, ...]]:
    """What each argument has to be."""
    model_output, timestep, sample = sampler.names
    places = {model_output: MODEL_OUTPUT, sample: SAMPLE}
    if sampler.noise is not None:
        places[sampler.noise] = NOISE
    own = [name for name in sampler.tensors if isinstance(call.arguments.get(name), Tensor)]
    places |= {name: len(call.values) - len(own) + i for i, name in enumerate(own)}
    times = dict.fromkeys((timestep, *sampler.timesteps))
    times |= dict(zip(times, call.moments, strict=False))
    for name, value in call.arguments.items():
        if name in places and value is not None:
            yield "tensor", places[name]
        elif name == sampler.mask and value is not None:
            yield ("mask",)
        elif name in times and value is not None:
            dtype = value.dtype if isinstance(value, Tensor) else None
            yield "time", type(value), dtype, times[name], name == timestep and sampler.per_sample
        elif name == "generator" and call.values[NOISE] is None:
            yield ("generator",)
        elif type(value) in _CONSTANTS:
            yield "constant", value
        else:
            raise _Unsuitable

"""The arguments of a scheduler's step, however they are passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

from fastdiff.schedulers.samplers import Sampler


class Arguments(NamedTuple):
    """Those of one call; ``None`` for what it has not.

    Attributes:
        tensors: further ones that enter linearly.
        times: further ones that are timesteps.
        others: all others, in the order of :attr:`Signature.others`.
    """

    model_output: Any
    timestep: Any
    sample: Any
    noise: Any
    generator: Any
    mask: Any
    tensors: tuple[Any, ...]
    times: tuple[Any, ...]
    others: list[Any]


class Signature:
    """Tells the arguments of a step from one another.

    Attributes:
        defaults: of the arguments that have one.
        others: names of the arguments that are neither tensors, generators nor timesteps.
        unknown: those of them that only have their default where the step is fused.
    """

    def __init__(self, scheduler: Any, sampler: Sampler) -> None:
        parameters = list(inspect.signature(getattr(type(scheduler), sampler.method)).parameters.values())[1:]
        self._names = tuple(p.name for p in parameters)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        # The order in which a call's arguments are taken; ``None`` is one that this step does not have.
        self._special = (*sampler.names, sampler.noise, "generator", sampler.mask, *sampler.tensors, *sampler.timesteps)
        self.others = tuple(name for name in self._names if name not in self._special)
        self.unknown = tuple(name for name in self.others if name not in (*sampler.scalars, "return_dict"))
        self._rest = (*self.defaults.values(), None)
        self._tensors = 6 + len(sampler.tensors)  # where those of the arguments end, as Arguments has them
        self._times = self._tensors + len(sampler.timesteps)
        self._forms: dict[tuple[Any, ...], Callable[[tuple[Any, ...]], tuple[Any, ...]] | None] = {}

    def arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments of a call; ``None`` if they do not fit the step."""
        form = len(args), *kwargs
        ordered = self._forms[form] if form in self._forms else self._ordered(form)
        if ordered is None:
            return None
        found = ordered((*args, *kwargs.values(), *self._rest))
        tensors, times, others = found[6 : self._tensors], found[self._tensors : self._times], found[self._times :]
        return Arguments._make((*found[:6], tensors, times, list(others)))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What was passed in a call that fits, by name, in the order of the call."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def _ordered(self, form: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
        """For calls with so many positional arguments and these named ones: what takes (*positional, *named, *rest) to
        the arguments in the order of ``special`` and ``others``; ``None`` if that is no call."""
        count, *named = form
        names = [*self._names[:count], *named]
        places = {name: i for i, name in [*enumerate(self.defaults, len(names)), *enumerate(names)]}
        fits = count <= len(self._names) and len(set(names)) == len(names) and places.keys() == {*self._names}
        absent = len(names) + len(self.defaults)  # of what this step does not have
        ordered = itemgetter(*[places.get(name, absent) for name in (*self._special, *self.others)])
        self._forms[form] = ordered if fits else None
        return self._forms[form]

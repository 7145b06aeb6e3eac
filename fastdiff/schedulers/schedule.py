"""What of a scheduler is fixed between two changes of its options or its schedule, and whether it still is."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.backends import is_plain
from fastdiff.patching._patch import PATCH
from fastdiff.patching._site import SITE
from fastdiff.schedulers.plan import Place, Step
from fastdiff.schedulers.probe import Call, Moment, twin_of
from fastdiff.schedulers.samplers import Sampler, unsupported
from fastdiff.schedulers.setting import Setting, arguments_key, changes_by, is_hashable

#: Configurations (options, timesteps, sigmas) kept per scheduler, and calls of ``set_timesteps`` per configuration.
MAX_CONFIGURATIONS = 8
#: Places kept per configuration besides those after a known step, and first timesteps.
MAX_PLACES = 64

#: The methods that patching may replace.
REPLACED = ("step", "step_pred", "set_timesteps", "scale_model_input", "add_noise", "get_velocity")

_version = attrgetter("_version")


def ordinary_tensors() -> contextlib.AbstractContextManager[None]:
    """Outside of ``torch.inference_mode``, wherever the caller is: tensors made here count the writes to them."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else _NOTHING


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


_NOTHING = contextlib.nullcontext()


class Configuration:
    """One state of the options and the schedule, and the steps that are known in it.

    Attributes:
        settings: what ``set_timesteps`` did from here, by all that it depends on besides.
        fixed: of the scheduler's attributes, the values of ``names``.
        tables: of them, the tensors that count the writes to them.
        untraced: those values that may change without a trace.
        key: what it is found by; ``None`` after it was dropped.

    Args:
        names: of the attributes that are fixed.
        without: of others, which steps change.
    """

    def __init__(
        self, scheduler: Any, sampler: Sampler, names: list[str], without: frozenset[str], key: Any
    ) -> None:
        self.key = key
        attributes = vars(scheduler)
        untraced = [name for name in names if _is_untraced(attributes[name])]
        self.fixed, self.untraced = _getter(names), _getter(untraced)
        self.tables = _getter([n for n in names if type(attributes[n]) is Tensor and n not in untraced])
        self.reason = unsupported(scheduler)
        tables = [v for name, v in vars(scheduler).items() if isinstance(v, Tensor) and name not in without]
        if self.reason is None and any(t.is_inference() for t in tables):
            self.reason = "a table of the scheduler was made in inference mode, where no write to it would be noticed"
        self.twin = twin_of(scheduler, sampler, without)
        timesteps = self.twin.timesteps
        self.moments: list[Moment] = []
        if isinstance(timesteps, Tensor) and timesteps.dim() == 1:
            self.moments = [Moment(t, timesteps.dtype, int(sampler.per_sample)) for t in timesteps.tolist()]
        self.steps: dict[Call, Step | str] = {}
        self.settings: dict[Any, Setting] = {}
        self._places: dict[Any, Place] = {}
        self._starts: dict[int | float, int] = {}
        self._numbers: dict[tuple[float, torch.dtype], Tensor] = {}

    def drop(self) -> None:
        """No longer serve: what leads here looks for another one."""
        self.key = None
        self.settings.clear()
        self.forget()

    def forget(self) -> None:
        """Drop all steps, and what would keep them: each leads to the next."""
        self.steps.clear()
        self._places.clear()
        self._starts.clear()
        self._numbers.clear()

    def place(self, held: Any) -> Place:
        """The place where a scheduler that holds ``held`` is."""
        if held not in self._places and len(self._places) == MAX_PLACES:
            self._places.clear()
        return self._places.setdefault(held, Place())

    def kept(self, number: Tensor, device: torch.device) -> Tensor:
        """A number that the step keeps as a tensor: one object for each value, since steps are found by it."""
        return self._numbers.setdefault((number.item(), number.dtype), number.to(device))

    def start(self, timestep: int | float) -> int:
        """The index of the first step, if that is at ``timestep``."""
        if timestep not in self._starts:
            if len(self._starts) == MAX_PLACES:
                self._starts.clear()
            self.twin._step_index = self.twin._begin_index = None
            self.twin._init_step_index(timestep)
            self._starts[timestep] = self.twin._step_index
        return self._starts[timestep]


class Schedule:
    """Finds the configuration that a scheduler is in, and reads timesteps without a read from their device.

    Attributes:
        configurations: those seen, the latest last.
    """

    def __init__(self, scheduler: Any, sampler: Sampler) -> None:
        self.scheduler = scheduler
        self.sampler = sampler
        not_fixed = {*REPLACED, SITE, PATCH, "_internal_dict", *sampler.state, *sampler.history}
        if sampler.past is not None:
            not_fixed.add(sampler.past)
        if "_step_index" in sampler.state:
            not_fixed.add("_begin_index")  # counts on the first step only
        self._not_fixed = frozenset(not_fixed)
        self.configurations: OrderedDict[Any, Configuration] = OrderedDict()
        self._configuration: Configuration | None = None
        self._attributes = 0
        self._bound: tuple[Any, ...] = ()
        self._options: dict[str, Any] = {}
        self._frozen_options: tuple[Any, ...] = ()
        self._frozen: dict[str, tuple[Any, int, Any]] = {}
        self._tables: list[Tensor] = []
        self._writes = 0
        self._first = self._stride = 0  # address of the first timestep, and from each to the next

    def configuration(self) -> Configuration:
        """That of the scheduler's present options and schedule."""
        if not self._is_current():
            return self.read()
        assert self._configuration is not None
        return self._configuration

    def is_unwritten(self) -> bool:
        """Whether the options are as they were, and no table was written to, since :meth:`read`."""
        return (
            vars(vars(self.scheduler)["_internal_dict"]) == self._options
            and sum(map(_version, self._tables)) == self._writes
        )

    def _is_current(self) -> bool:
        """Whether nothing that the steps depend on was set, replaced or written to since :meth:`read`."""
        attributes = vars(self.scheduler)
        try:
            # Comparing looks at identity first; only what was replaced is compared by value.
            return (
                len(attributes) == self._attributes
                and self._configuration is not None
                and self._configuration.fixed(attributes) == self._bound
                and self.is_unwritten()
            )
        except (KeyError, ValueError, RuntimeError):  # an attribute is gone; two arrays, two tensors differ
            return False

    def set_timesteps(self, held: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Configuration:
        """The stock ``set_timesteps``; where that was called so before, what it did, without computing it anew. Then
        the schedule is read from its device, so that no step has to. Returns the configuration after it.

        Args:
            held: what the scheduler holds besides its configuration; ``None`` if that is not known.
        """
        scheduler = self.scheduler

        def stock() -> None:
            with ordinary_tensors():
                type(scheduler).set_timesteps(scheduler, *args, **kwargs)

        given, begin = arguments_key(args, kwargs), vars(scheduler).get("_begin_index")
        if given is None or held is None or not (is_hashable(begin) and is_plain() and self._is_current()):
            stock()
            return self.read()
        assert self._configuration is not None
        settings = self._configuration.settings
        untraced = *map(_frozen, self._configuration.untraced(vars(scheduler))),
        # Which GPU "cuda" is. Before CUDA starts there is no table on one.
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        key = given, held, begin, untraced, torch.get_default_dtype(), gpu
        known = settings.get(key)
        if known is not None and known.configuration.key is not None:
            with ordinary_tensors():
                vars(scheduler).update(known.again())
            return self._take_up(known.configuration)
        changes = changes_by(scheduler, stock)
        configuration = self.read()
        if changes is not None:
            if len(settings) >= MAX_CONFIGURATIONS:
                settings.clear()
            settings[key] = Setting(changes, configuration)
        return configuration

    def read(self) -> Configuration:
        """Find or make the configuration of the scheduler's present options and schedule."""
        attributes = vars(self.scheduler)
        names = [name for name in attributes if name not in self._not_fixed]
        options = vars(self.scheduler.config)
        if options != self._options:
            self._options = dict(options)
            self._frozen_options = (*options, *map(_frozen, options.values()))
        key = (*names, *[self._freeze(name, attributes[name]) for name in names], *self._frozen_options)
        configuration = self.configurations.get(key)
        if configuration is None:
            with ordinary_tensors():
                without = self._not_fixed - {"_internal_dict"}
                configuration = Configuration(self.scheduler, self.sampler, names, without, key)
            self.configurations[key] = configuration
            if len(self.configurations) > MAX_CONFIGURATIONS:
                self.configurations.popitem(last=False)[1].drop()
        return self._take_up(configuration)

    def _take_up(self, configuration: Configuration) -> Configuration:
        """Note that the scheduler, as it is now, is in this configuration."""
        attributes = vars(self.scheduler)
        if next(reversed(self.configurations.values())) is not configuration:
            self.configurations.move_to_end(configuration.key)
        self._configuration = configuration
        self._attributes = len(attributes)
        self._bound = configuration.fixed(attributes)
        # Only ever counts up, so the sum tells of any write. Inference tensors do not count theirs.
        self._tables = [*configuration.tables(attributes)]
        self._writes = sum(map(_version, self._tables))
        if configuration.moments:
            timesteps = attributes["timesteps"]
            self._first, self._stride = timesteps.data_ptr(), timesteps.stride(0) * timesteps.element_size()
        return configuration

    def _freeze(self, name: str, value: Any) -> Any:
        """:func:`_frozen`, unless that was done for this very object and nobody wrote to it."""
        if _is_untraced(value):
            return _frozen(value)
        version = value._version if type(value) is Tensor else 0
        known = self._frozen.get(name)
        if known is None or known[0] is not value or known[1] != version:
            known = self._frozen[name] = value, version, _frozen(value)
        return known[2]

    def moment(self, timestep: Any, per_sample: bool = False) -> Moment | None:
        """A timestep's value, if it has one. That of an element of ``timesteps`` is not read from its device.

        Only while the schedule is as it was read.
        """
        if not isinstance(timestep, Tensor):
            return Moment(timestep, None) if type(timestep) in (int, float) else None
        axes = timestep.dim()
        if axes != per_sample or (axes and any(timestep.stride())):
            return None
        known = self._moment_at(timestep.data_ptr())
        fits = known is not None and known.dtype is timestep.dtype and known.axes == axes
        if fits and timestep.device == self.scheduler.timesteps.device:
            return known
        return Moment(timestep[(0,) * axes].item(), timestep.dtype, axes)

    def _moment_at(self, address: int) -> Moment | None:
        """That of the element of ``timesteps`` at an address, if there is one."""
        moments = [] if self._configuration is None else self._configuration.moments
        index, rest = divmod(address - self._first, self._stride or 1)
        return moments[index] if not rest and 0 <= index < len(moments) else None


def _getter(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What takes the values of these names from a dictionary."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda attributes: tuple([attributes[name] for name in names])


_MUTABLE = frozenset({list, dict, set, np.ndarray})


def _is_untraced(value: Any) -> bool:
    """Whether an attribute's value may change without a trace."""
    return type(value) in _MUTABLE or (type(value) is Tensor and value.is_inference())


def _frozen(value: Any) -> Any:
    """A hashable stand-in for an attribute's value."""
    if isinstance(value, Tensor):
        data = value.detach().cpu()
        data = data.float() if value.dtype is torch.bfloat16 else data  # which numpy does not have
        return value.dtype, value.device, value.is_inference(), tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return tuple([(key, _frozen(v)) for key, v in value.items()])
    if inspect.isfunction(value):
        return value  # itself: another one may come to have its address
    return type(value).__name__, repr(value)

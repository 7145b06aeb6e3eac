"""What ``set_timesteps`` did, so that a generation like one before need not compute its schedule anew."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_IMMUTABLE = (int, float, str, type(None), torch.Size, torch.device, torch.dtype, np.generic)

_KEPT = frozenset({int, float, str, type(None)})  # the most frequent of them


class Setting(NamedTuple):
    """What one call of ``set_timesteps`` did.

    Attributes:
        changes: the attributes that it set, and to what.
        configuration: that it led to.
    """

    changes: dict[str, Any]
    configuration: Any

    def again(self) -> dict[str, Any]:
        """The attributes to set: tensors, arrays and lists are new ones, as those of the stock call."""
        return {name: value if type(value) in _KEPT else _copy(value) for name, value in self.changes.items()}


def arguments_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call, to look it up by; ``None`` if some are more than numbers, names and lists of them."""
    try:
        return *map(_key, args), *[(name, _key(value)) for name, value in kwargs.items()]
    except TypeError:
        return None


def _key(value: Any) -> Any:
    if isinstance(value, _IMMUTABLE):
        return type(value), value
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return type(value), *map(_key, value)
    raise TypeError


def is_hashable(value: Any) -> bool:
    """Whether a key of a dictionary may be ``value``."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def changes_by(scheduler: Any, call: Callable[[], None]) -> dict[str, Any] | None:
    """Run ``call()``; the attributes that it has set, or ``None`` if it did more than setting them again would."""
    attributes = vars(scheduler)
    before = {name: (value, _contents(value)) for name, value in attributes.items()}
    logger, logged = logging.getLogger(type(scheduler).__module__), []

    def note(record: logging.LogRecord) -> bool:
        logged.append(record)
        return True

    logger.addFilter(note)
    try:
        call()
    finally:
        logger.removeFilter(note)
    changes: dict[str, Any] = {}
    for name, value in attributes.items():
        old, contents = before.pop(name, (changes, None))
        if value is not old:
            changes[name] = value
        elif not _is_as_before(value, contents):
            return None
    if before or logged or not all(map(_can_copy, changes.values())):
        return None
    return {name: _copy(value) for name, value in changes.items()}


def _contents(value: Any) -> Any:
    """What tells of a write to a value."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value.copy() if isinstance(value, list) else None


def _is_as_before(value: Any, contents: Any) -> bool:
    """Whether nobody wrote to a value since :func:`_contents`. A list holds the same objects, none of which is gone:
    another one may come to have its address."""
    if isinstance(value, list):
        return len(value) == len(contents) and all(map(operator.is_, value, contents))
    return bool(_contents(value) == contents)


def _can_copy(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.clone().stride() == value.stride()
    if isinstance(value, list):
        return all(isinstance(v, _IMMUTABLE) for v in value)
    return isinstance(value, (np.ndarray, *_IMMUTABLE))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, (np.ndarray, list)) else value

"""The arguments and results of one call of a denoiser, as a CUDA graph needs them: in buffers that never move."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN = (Tensor, torch.nn.Parameter)
#: Compared by value, and part of what a graph was captured for.
_CONSTANTS = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size)


class NotCapturable(Exception):
    """Its message is the reason, for the report."""


class Call:
    """One call's arguments: what identifies a graph for it, and its tensors.

    Two calls have the same :attr:`key` if they differ in nothing but the values in their tensors: the same structure
    of dictionaries, lists and tuples, equal constants, and tensors of the same shapes, strides, dtypes and devices.

    Attributes:
        key: hashable.
        tensors: in the order of the structure.

    Raises:
        NotCapturable: if an argument is, or holds, anything else.
    """

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], device: str) -> None:
        """``names`` are those of the positional arguments, ``device`` is the type of the model's device."""
        self.args, self.kwargs = args, kwargs
        self.tensors: list[Tensor] = []
        self._device = device
        named = [*zip(names, args, strict=False), *kwargs.items()]
        if len(args) > len(names):
            raise NotCapturable("it takes more positional arguments than its forward has names for")
        self.key: Hashable = (len(args), tuple((name, self._read(value, name)) for name, value in named))

    def _read(self, value: Any, where: str) -> Hashable:
        kind = type(value)
        if kind in _PLAIN:
            self.tensors.append(value)
            if value.layout is not torch.strided:
                raise NotCapturable(f"argument {where} is a {str(value.layout)[6:]} tensor")
            if value.device.type != self._device and value.dim():  # of one number the value can be read for nothing
                raise NotCapturable(f"argument {where} is on {value.device.type}")
            if value.device.type not in (self._device, "cpu"):
                raise NotCapturable(f"argument {where} is on {value.device.type}")
            return kind, value.shape, value.stride(), value.dtype, value.device
        if where == "timestep" and kind in (int, float):
            raise NotCapturable("its timestep is a Python number, which would take a graph for every step")
        if kind in _CONSTANTS:
            return kind, value
        if kind is float:
            return kind, value.hex()
        if kind in (list, tuple):
            return kind, tuple(self._read(v, f"{where}[{i}]") for i, v in enumerate(value))
        if kind is dict:
            return kind, tuple((k, self._read(v, f"{where}[{k!r}]")) for k, v in value.items())
        raise NotCapturable(f"argument {where} is a {kind.__name__}")


class StaticArguments:
    """Buffers for the tensors of a call, and the way from other calls with the same key into them."""

    def __init__(self, call: Call, device: torch.device) -> None:
        """Allocate, without values, on ``device``.

        Raises:
            NotCapturable: for tensors that overlap themselves in more than expanded dimensions.
        """
        self._views: list[Tensor] = []
        self._copied: list[Tensor] = []  # the buffers that tensors are copied into, as far as they are distinct
        self._sources: list[tuple[int, tuple[slice, ...] | None]] = []
        self._filled: list[tuple[Tensor, int]] = []  # those that get a number from the host
        with torch.inference_mode(False):  # else they could not be written outside of inference mode
            for index, tensor in enumerate(call.tensors):
                if tensor.device != device and tensor.device.type == device.type:
                    raise NotCapturable(f"it is on {device} and an argument on {tensor.device}")
                view, buffer, distinct = _buffer(tensor, device)
                self._views.append(view)
                if tensor.device.type != device.type:
                    self._filled.append((buffer, index))
                elif tensor.numel():
                    self._copied.append(buffer)
                    self._sources.append((index, distinct))
        found: list[Tensor] = []
        self._args, self._kwargs = plan(call.args, found), plan(dict(call.kwargs), found)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the buffers in the tensors' places, in containers of their own."""
        views = iter(self._views)
        return self._args(views), self._kwargs(views)

    def write(self, call: Call) -> None:
        """Copy a call's tensors into the buffers; waits for nothing."""
        tensors = call.tensors
        if self._copied:
            sources = [tensors[i] if distinct is None else tensors[i][distinct] for i, distinct in self._sources]
            torch._foreach_copy_(self._copied, sources)
        for buffer, index in self._filled:
            buffer.fill_(tensors[index].item())

    def versions(self) -> list[int]:
        """They rise when something writes into the buffers."""
        return [view._version for view in self._views]


def _buffer(tensor: Tensor, device: torch.device) -> tuple[Tensor, Tensor, tuple[slice, ...] | None]:
    """A tensor with the shape and strides of another, the part of it without repetitions, and how to take that."""
    shape, strides = tensor.shape, tensor.stride()
    expanded = [size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)]
    distinct = [1 if repeated else size for size, repeated in zip(shape, expanded, strict=True)]
    reach = 0
    for stride, size in sorted(zip(strides, distinct, strict=True)):
        if size > 1:
            if stride <= reach:
                raise NotCapturable("a tensor among its arguments overlaps itself")
            reach += (size - 1) * stride
    buffer = torch.empty_strided(distinct, strides, dtype=tensor.dtype, device=device)
    if not any(expanded):
        return buffer, buffer, None
    return buffer.expand(shape), buffer, tuple(slice(0, 1) if e else slice(None) for e in expanded)


class StaticResult:
    """What a captured forward returned: tensors that each replay overwrites, in some structure."""

    def __init__(self, result: Any, device: torch.device) -> None:
        """
        Raises:
            NotCapturable: if it holds anything but tensors on ``device``, constants and known containers.
        """
        self._tensors: list[Tensor] = []
        self._plan = plan(result, self._tensors)
        for tensor in self._tensors:
            if tensor.device != device:
                raise NotCapturable(f"it returns a tensor on {tensor.device.type}")

    def copy(self) -> Any:
        """The same structure with copies of the tensors, so that a later replay changes nothing that was returned.

        Samplers keep outputs of earlier steps. Strides are kept where a tensor is dense.
        """
        return self._plan(iter([tensor.clone() for tensor in self._tensors]))


def plan(value: Any, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """A function that builds ``value`` anew around other tensors; appends those of ``value`` to ``tensors``.

    Raises:
        NotCapturable: where ``value`` holds something that is not known how to build.
    """
    kind = type(value)
    if kind in _PLAIN:
        tensors.append(value)
        return next
    if kind in _CONSTANTS or kind is float:
        return lambda _: value
    if kind in (list, tuple):
        parts = [plan(part, tensors) for part in value]
        return lambda new: kind([part(new) for part in parts])
    if kind is dict:
        values = {key: plan(part, tensors) for key, part in value.items()}
        return lambda new: {key: part(new) for key, part in values.items()}
    if isinstance(value, BaseOutput):
        fields = {f.name: plan(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return lambda new: kind(**{name: part(new) for name, part in fields.items()})
    raise NotCapturable(f"it returns a {kind.__name__}")


#: Operations whose result, or its shape, the host waits for.
_WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select", "multinomial",
    "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip


class HostWatch(TorchDispatchMode):
    """Within the context, raises at what a replay could not do, before a capture fails of it or leaves it out.

    A capture that fails in the driver costs more, and what the host reads of a tensor would be as it was at the
    capture for ever.
    """

    def __init__(self, device: torch.device, foreign: Mapping[int, str], owned: frozenset[int] = frozenset()) -> None:
        """``device`` is the model's; ``foreign`` are tensors of the model that are elsewhere: id -> where; ``owned``
        are the ids of all its tensors."""
        super().__init__()
        self._device, self._foreign, self._owned = device, foreign, owned
        self._read: dict[int, Tensor] = {}
        self._made: set[int] = set()
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1]
        result = func(*args, **(kwargs or {}))
        tensors = _tensors_in(args)
        for tensor in (*tensors, *_tensors_in(tuple((kwargs or {}).values()))):
            if id(tensor) not in self._owned and (place := tensor.untyped_storage()._cdata) not in self._made:
                self._read[place] = tensor
        made = _tensors_in((result,))
        self._made.update(tensor.untyped_storage()._cdata for tensor in made)
        self._results += map(weakref.ref, made)
        for tensor in tensors:
            if id(tensor) in self._foreign:
                raise NotCapturable(f"a forward reads a tensor of the model on {self._foreign[id(tensor)]} ({name})")
        tensors += _tensors_in((result,))
        indices = _tensors_in(args[1:2]) if name in ("index", "index_put", "index_put_") else []
        waits = (
            (name in _WAITING and any(t.device == self._device for t in tensors))
            or (name == "lift_fresh" and any(t.device.type != "cpu" for t in tensors))  # of a number or list
            or (name in ("copy_", "_to_copy") and len({t.device for t in tensors}) > 1)
            or any(index.dtype is torch.bool for index in indices)
        )
        if waits:
            raise NotCapturable(f"a forward makes the host wait for the device ({name})")
        return result


    def outside(self) -> list[Tensor]:
        """What was read that is neither the model's nor made here, and what was made here and is alive afterwards.

        Such are tables in somebody's cache (rotary frequencies in a ``functools.lru_cache``), which may let go of
        them; a graph, which goes on reading them where they are, must not.
        """
        return [*self._read.values(), *(t for ref in self._results if (t := ref()) is not None)]


def _tensors_in(values: tuple[Any, ...]) -> list[Tensor]:
    parts = (part for value in values for part in (value if isinstance(value, (list, tuple)) else (value,)))
    return [part for part in parts if isinstance(part, Tensor)]

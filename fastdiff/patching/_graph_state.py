"""What a CUDA graph of a model depends on besides its inputs: where its weights are, and all that its code reads.

A replay runs no Python. It reads weights where they were at the capture, so that values written into them are seen;
and it does again what the code did then. So a graph is good for as long as every parameter is the same tensor at the
same address, and every attribute of every module the same object: a LoRA that is loaded, fused or scaled, a processor,
an adapter, FreeU, the training mode all show there.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastdiff.patching._site import name_of

#: Packages whose modules compute from their arguments and attributes only, and keep nothing between calls but caches.
#: Other code may do at each call what a replay would leave out.
_KNOWN = ("diffusers", "fastdiff", "peft", "torch", "transformers")
_PLAIN = (Tensor, nn.Parameter)
_DICTS, _SEQUENCES = (dict, OrderedDict), (list, tuple, set)
#: Attributes that every module has and no forward reads; and more that are looked at in other ways.
_UNREAD = frozenset(vars(nn.Module())) - {"training", "_forward_hooks", "_forward_pre_hooks"}
_USUAL = _UNREAD | {"_forward_hooks", "_forward_pre_hooks"}
_END = object()
_ENDS = (_END,)
_VALUES = (bool, int, float, str)
_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")


class State:
    """A model's state at one time, to be compared with its present one.

    Attributes:
        device: where its parameters are.
        reason: why no graph of the model can be captured in this state, or ``None``.
        foreign: tensors that belong to the model and are elsewhere, by id.
        owned: ids of all tensors that belong to the model, while they live.
    """

    def __init__(self, model: nn.Module, device_type: str) -> None:
        self.reason: str | None = None
        self.device = torch.device("cpu")
        self.foreign: dict[int, str] = {}
        self._dead: list[Any] = []
        self._modules = list(model.modules())
        self._types = list(map(type, self._modules))
        self._containers: list[Any] = []  # of anything but parameters and buffers
        self._empty: list[Any] = []
        self._owners: list[Any] = []  # of parameters and buffers
        self._found: list[Tensor] = []
        self._attributes: dict[tuple[str, ...], list[dict[str, Any]]] = {}  # names -> modules' attributes
        self._visited: set[int] = set()
        for path, module in model.named_modules():
            self._module(path or "the model", module, root=module is model)
        self._groups = [(operator.itemgetter(*names), group) for names, group in self._attributes.items()]
        self._counts = [len(state) for _, group in self._groups for state in group]
        self._kept = [*self._atoms(), _END]
        # Parameters are held weakly, so that one that is replaced is freed; while all live, their ids are unique.
        self._ids = list(map(id, self._owned()))
        found = {id(t): t for t in (*self._found, *self._owned()) if t is not None}
        self.owned = frozenset(found)
        del self._found
        self._tensors = [ref(tensor, self._dead.append) for tensor in found.values()]
        for tensor in found.values():
            if type(tensor) not in _PLAIN:
                self._refuse(f"a tensor of it is a {type(tensor).__name__}")
        self._place(model, device_type)
        self._placed = self._places()

    def changed(self) -> str | None:
        """What is not as it was, or ``None``. Reads no tensor's values, waits for no device."""
        if self._dead or self._ids != list(map(id, self._owned())):
            return "parameters were replaced"
        counts = list(chain.from_iterable(map(len, group) for _, group in self._groups))
        if self._types != list(map(type, self._modules)) or self._counts != counts or any(self._empty):
            return "modules, hooks or attributes were added"
        try:
            same = all(map(operator.is_, chain(self._atoms(), _ENDS), self._kept)) or self._equal()
        except KeyError:  # an attribute that is gone
            same = False
        if not same:
            return "its modules or their attributes changed"
        if self._placed != self._places():
            return "parameters were moved or cast"
        return None

    def _equal(self) -> bool:
        """Whether what is another object now is an equal number or text."""
        atoms = [*self._atoms(), _END]
        if len(atoms) != len(self._kept):
            return False
        for new, old in zip(atoms, self._kept, strict=True):
            if new is not old and not (type(new) is type(old) and type(new) in _VALUES and new == old):
                return False
        self._kept = atoms
        return True

    def _atoms(self) -> Iterator[Any]:
        """Everything that the code reads but parameters and buffers, in a fixed order."""
        values = chain.from_iterable(map(values_of, group) for values_of, group in self._groups)
        return chain.from_iterable(chain(values, self._containers))

    def _owned(self) -> Iterator[Any]:
        """The parameters and buffers."""
        return chain.from_iterable(map(dict.values, self._owners))

    def _places(self) -> list[Any]:
        """Where the tensors are, and their dtypes; of those that no graph can read, only on which devices."""
        tensors: list[Any] = [tensor() for tensor in self._tensors]
        if self.reason is not None:
            return list(map(_device, tensors))
        return [*map(Tensor.data_ptr, tensors), *map(_dtype, tensors)]

    def _refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def _place(self, model: nn.Module, device_type: str) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self.device = next(iter(devices), self.device)
        wrong = [str(device) for device in devices if device.type != device_type]
        if wrong:
            offloaded = " (offloaded)" if "meta" in wrong else ""
            self._refuse(f"its weights are on {', '.join(sorted(wrong))}{offloaded}; {device_type.upper()} is needed")
        elif len(devices) > 1:
            self._refuse(f"its weights are on {len(devices)} devices")
        elif not devices:
            self._refuse("it has no parameters")
        elsewhere = (t for t in (tensor() for tensor in self._tensors) if t is not None and t.device != self.device)
        self.foreign = {id(tensor): str(tensor.device) for tensor in elsewhere}

    def _module(self, path: str, module: nn.Module, *, root: bool = False) -> None:
        state = vars(module)
        self._visited.add(id(module))
        self._attributes.setdefault(tuple(n for n in state if n not in _UNREAD), []).append(state)
        self._watch(module._modules)
        for owned in (module._parameters, module._buffers):
            (self._owners if owned else self._empty).append(owned)
        if not root:  # its own run outside of the graph
            self._watch(module._forward_hooks)
            self._watch(module._forward_pre_hooks)
        package = type(module).__module__.partition(".")[0]
        if package not in _KNOWN:
            self._refuse(f"{path} is a {type(module).__name__} of {package}, whose code may do more than compute")
        if module.training and _is_random(module):
            self._refuse(f"{path}, a {type(module).__name__}, is in training mode")
        if "_hf_hook" in state:
            self._refuse(f"accelerate's hook {type(state['_hf_hook']).__name__} is on {path}")
        if getattr(state.get("_diffusers_hook"), "hooks", None):
            self._refuse(f"Diffusers' hook {', '.join(state['_diffusers_hook'].hooks)} is on {path}")
        if not root and (module._forward_hooks or module._forward_pre_hooks):
            self._refuse(f"{path} has forward hooks, which have to see every call")
        if "forward" in state and not root:
            by = name_of(state["forward"])
            if not by.startswith("fastdiff.") and state["forward"] != MethodType(type(module).forward, module):
                self._refuse(f"the forward of {path} was replaced by {by}")
        for name, value in state.items():
            if name not in _USUAL and not name.startswith("_fastdiff"):
                if name == "processor" and type(value).__module__.partition(".")[0] not in _KNOWN:
                    self._refuse(f"the processor of {path}, a {type(value).__name__}, may do more than compute")
                self._value(f"{path}.{name}", value)

    def _watch(self, container: Any) -> None:
        self._visited.add(id(container))
        if not container:
            self._empty.append(container)
        else:  # the view of a dictionary's values is as live as the dictionary
            self._containers.append(container.values() if isinstance(container, dict) else container)

    def _value(self, path: str, value: Any) -> None:
        """Look into what an attribute holds, as far as it can change while staying the same object."""
        kind = type(value)
        if id(value) in self._visited:
            return
        if kind in _DICTS or kind in _SEQUENCES:
            self._watch(value)
            for part in value.values() if kind in _DICTS else value:
                self._value(path, part)
        elif isinstance(value, Tensor):
            self._found.append(value)
        elif isinstance(value, nn.Module):
            self._module(path, value)
        elif kind.__module__.startswith(("diffusers.", "peft.")) and type(getattr(value, "__dict__", None)) is dict:
            self._value(path, vars(value))


def _is_random(module: nn.Module) -> bool:
    """Whether training mode matters: adapters leave their modules in it, mostly without a dropout."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, (_BatchNorm, nn.MultiheadAttention))

"""A site: one place in a model or scheduler where stock code is replaced, and the way back.

A replacement is a bound method in the owner's ``__dict__``, of a function made from one that is importable from a
module: so it survives deepcopy, pickle and ``torch.save``, and no class is ever touched. It has to be a method:
torch.compile would compile anew for each instance of a block that holds any other callable. Hooks of
accelerate and Diffusers that were installed first have captured the stock method; there the captured reference
is rebound instead. Hooks installed later capture the replacement, and :meth:`Site.restore` finds it there.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch

from fastdiff._attention_backend import PATCHED, registered
from fastdiff.backends import Choice, use_backend
from fastdiff.ops._library import FusedOp

#: Name, in the ``__dict__`` of every object with a replaced method, of its :class:`Site`.
SITE = "_fastdiff_site"


def _mark(name: str) -> str:
    """Name, in the ``__dict__`` of an object, that says that its method ``name`` is replaced."""
    return f"_fastdiff_{name}"


_packed: set[Callable[..., Any]] = set()


def packed(function: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    """Decorator of what takes a method's place: it takes the arguments as they came. Unpacking and packing them again
    would take a large part of the time of one that does little itself."""
    _packed.add(function)
    return function


@functools.cache
def _method(function: Callable[..., Any], cls: Any, name: str) -> Callable[..., Any]:
    """``function`` in place of the method ``name`` of ``cls``; where it is not installed, the method itself.

    Code that wraps forwards may keep a replacement and call it long after it was taken out. Token mergers and the like
    exchange an object's class for one with a method of its own, which then is called.
    """
    mark, stock = _mark(name), getattr(cls, name)

    def other(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if mark not in self.__dict__:
            return getattr(type(self), name)(self, *args, **kwargs)
        return self.__dict__[SITE].stock(f"its class was exchanged for {type(self).__name__}", self, *args, name=name,
                                         **kwargs)  # fmt: skip

    if function in _packed:

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if mark not in self.__dict__ or (type(self) is not cls and getattr(type(self), name) is not stock):
                return other(self, args, kwargs)
            return function(self, args, kwargs)

    else:

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if mark not in self.__dict__ or (type(self) is not cls and getattr(type(self), name) is not stock):
                return other(self, args, kwargs)
            return function(self, *args, **kwargs)

    method.__name__ = name
    method.__qualname__ = function.__qualname__
    vars(method)["_fastdiff_made_from"] = vars(method)["func"] = function
    vars(method)["__signature__"] = inspect.signature(getattr(cls, name))  # pipelines look at the arguments
    return method


def _bind(function: Callable[..., Any], owner: Any, name: str) -> MethodType:
    cls: Any = type(owner)
    return MethodType(_method(function, cls, name), owner)


def _reduce(method: MethodType) -> Any:
    """How methods are pickled: by name, as ever, and replacements by what they are made of."""
    made_from = getattr(method.__func__, "_fastdiff_made_from", None)
    return method.__reduce__() if made_from is None else (_bind, (made_from, method.__self__, method.__name__))


copyreg.pickle(MethodType, _reduce)


class Replacement:
    """One method of one object, replaced by ``function(owner, ...)``.

    Attributes:
        new: what takes the method's place.
        stock: the method, as a function.
        own: whether the object had an attribute of that name before (hooks set one, and leave one behind).
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner = owner
        self.name = name
        self.new: Any = _bind(function, owner, name)
        self.stock: Callable[..., Any] = getattr(type(owner), name)
        self.own = False

    def install(self) -> str | None:
        """Install it, unless it is; returns why that is impossible, and then has changed nothing."""
        if self.installed():
            vars(self.owner)[_mark(self.name)] = True
            return None
        self.own = self.name in vars(self.owner)
        captured: list[tuple[Any, str]] = [(self.owner, self.name)]
        if self.own:
            captured = [(o, n) for o, n in holders(self.owner, self.name) if self._is_stock(getattr(o, n))]
            if not captured:
                return f"its {self.name} was already replaced by {name_of(vars(self.owner)[self.name])}"
        vars(self.owner)[_mark(self.name)] = True
        for holder, name in captured:
            setattr(holder, name, self.new)
        return None

    def restore(self) -> None:
        """Put the stock method back wherever the replacement is held now."""
        vars(self.owner).pop(_mark(self.name), None)
        stock = MethodType(getattr(type(self.owner), self.name), self.owner)
        for holder, name in list(holders(self.owner, self.name)):
            if getattr(holder, name) == self.new:
                if holder is self.owner and name == self.name and not self.own:
                    delattr(holder, name)
                else:
                    setattr(holder, name, stock)

    def exchange(self, new: Callable[..., Any]) -> Callable[..., Any]:
        """Put ``new`` in the replacement's place, wherever that is; returns what was there."""
        old = self.new
        for holder, name in list(holders(self.owner, self.name)):
            if getattr(holder, name) == old:
                setattr(holder, name, new)
        self.new = new
        return old

    @property
    def function(self) -> Callable[..., Any]:
        """What the method was replaced by, taking the object first."""
        return self.new.__func__._fastdiff_made_from

    def wrap(self, function: Callable[..., Any]) -> None:
        """Let ``function``, which calls the present one, take its place."""
        self.exchange(_bind(function, self.owner, self.name))

    def installed(self) -> bool:
        """Whether the replacement is still in place, here or captured by a hook."""
        return any(getattr(o, n) == self.new for o, n in holders(self.owner, self.name))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "stock"}  # it may be nobody's by now

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, stock=getattr(type(state["owner"]), state["name"]))

    def _is_stock(self, value: Any) -> bool:
        stock = getattr(type(self.owner), self.name)
        return isinstance(value, MethodType) and value.__self__ is self.owner and value.__func__ is stock


def holders(owner: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Where a reference to the bound method may be kept: the object, and what hooks captured of it."""
    state = vars(owner)
    if name in state:
        yield owner, name
        if "__wrapped__" in getattr(state[name], "__dict__", {}):  # set by hooks; inspect.signature follows it
            yield state[name], "__wrapped__"
    if name == "forward":
        if "_old_forward" in state:  # accelerate.hooks
            yield owner, "_old_forward"
        for ref in getattr(state.get("_diffusers_hook"), "_fn_refs", ()):  # diffusers.hooks
            yield ref, "forward"
            yield ref, "original_forward"


@dataclass(eq=False)
class Site:
    """One patched place; the replaced function finds it as ``owner._fastdiff_site`` and reports through it.

    Attributes:
        owner: the module or scheduler.
        path: where the owner is in the patched object, as in ``named_modules``.
        what: what is computed there now, for the report.
        replacements: the methods replaced.
        backend: the only backend allowed to serve it, or ``None`` for the usual order.
        served: what served the latest call, per operation of the site. Only as fresh as the latest call
            outside torch.compile.
        declined: why the latest call ran the stock code as a whole; empty when it did not.
        state: whatever the replacement keeps between calls; must be picklable.
        reference: (owner, ...) -> what the stock code computes in place of the first replacement, where that is
            not simply the stock method.
        kernel: whether fused kernels serve it, and not oneDNN with a packed weight.
        processors: of attention, those whose backend it has set.
    """

    owner: Any
    path: str
    what: str
    replacements: list[Replacement]
    backend: str | None = None
    served: dict[str, Choice] = field(default_factory=dict)
    declined: str = ""
    state: Any = None
    reference: Callable[..., Any] | None = None
    kernel: bool = True
    processors: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def install(self) -> str | None:
        """Install all replacements, or none; returns why not."""
        for index, replacement in enumerate(self.replacements):
            reason = replacement.install()
            if reason is not None:
                for done in self.replacements[:index]:
                    done.restore()
                return reason
        for replacement in self.replacements:
            vars(replacement.owner)[SITE] = self
        self.set_backend()
        return None

    def restore(self) -> None:
        """Undo :meth:`install`, wherever hooks have carried the replacements since."""
        for replacement in self.replacements:
            replacement.restore()
            vars(replacement.owner).pop(SITE, None)
        for processor in list(self.processors):
            _unset_backend(processor)
        self.processors.clear()

    def set_backend(self) -> None:
        """Let the owner's processor dispatch to fastdiff, if it dispatches and nobody chose a backend for it."""
        processor: Any = getattr(self.owner, "processor", None)
        state = getattr(processor, "__dict__", None)
        if state is None:
            return
        if getattr(processor, "_attention_backend", 0) is None and (member := registered(PATCHED)) is not None:
            state[_BACKEND] = "_attention_backend" in state
            processor._attention_backend = member
        if is_ours(getattr(processor, "_attention_backend", None)):
            self.processors.add(processor)

    def unset_backend(self) -> None:
        """Undo :meth:`set_backend`."""
        processor = getattr(self.owner, "processor", None)
        if processor is not None:
            _unset_backend(processor)

    def serve(self, slot: str, op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``op`` by whatever serves it, and note that under ``slot``."""
        choice = op.choose(*args, **kwargs) if self.backend is None else self.choose(op, *args, **kwargs)
        self.note(slot, choice)
        return choice.run(*args, **kwargs)

    def choose(self, op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> Choice:
        """What serves this call of ``op`` here."""
        if self.backend is None:
            return op.choose(*args, **kwargs)
        with use_backend(self.backend):
            return op.choose(*args, **kwargs)

    def note(self, slot: str, choice: Choice) -> None:
        """Note what serves this call under ``slot``."""
        if (self.declined or self.served.get(slot) is not choice) and not torch.compiler.is_compiling():
            if self.declined:  # what served then says nothing about this call
                self.served.clear()
                self.declined = ""
            self.served[slot] = choice

    def stock(self, reason: str, owner: Any, *args: Any, name: str = "forward", **kwargs: Any) -> Any:
        """Run the stock method for this call, and note why."""
        if torch.compiler.is_compiling():  # it finds no methods in classes that Diffusers allows in its graphs
            method = next(r.stock for r in self.replacements if r.owner is owner and r.name == name)
            return method(owner, *args, **kwargs)
        self.declined = reason
        self.served.clear()
        return getattr(type(owner), name)(owner, *args, **kwargs)

    @property
    def reason(self) -> str:
        """Why the latest call was not served by kernels alone; empty when it was, or nothing ran yet."""
        if self.declined:
            return self.declined
        return "; ".join(dict.fromkeys(f"{s}: {c.reason}" for s, c in list(self.served.items()) if c.reason))

    def __getstate__(self) -> dict[str, Any]:
        # A Choice holds functions that do not pickle, and speaks of calls that a copy has not made.
        return {**vars(self), "served": {}, "declined": "", "processors": list(self.processors)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, processors=weakref.WeakSet(state["processors"]))


#: Name, in the ``__dict__`` of a processor whose backend was set: whether it had one of its own, ``None``, before.
_BACKEND = "_fastdiff_backend"


def is_ours(backend: Any) -> bool:
    """Whether a processor's backend is the one that patching sets."""
    return getattr(backend, "_name_", None) == PATCHED


def _unset_backend(processor: Any) -> None:
    state = getattr(processor, "__dict__", {})
    own = state.pop(_BACKEND, False)
    if is_ours(state.get("_attention_backend")):
        if own:
            processor._attention_backend = None
        else:
            state.pop("_attention_backend", None)  # another thread may have been faster


def site_of(owner: Any) -> Site | None:
    """The site whose replacement ``owner`` carries, if any."""
    return vars(owner).get(SITE)


def name_of(value: Any) -> str:
    """Of a replacement, or whatever else is in a method's place: the function behind it, as ``module.qualname``."""
    while isinstance(value, (functools.partial, MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
        value = getattr(value, "_fastdiff_made_from", value)
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__

"""The ``fastdiff`` torch library and :class:`FusedOp`, the one way an op is defined and called.

An op is defined here in Python (schema, tags, eager reference, fake implementation), so it exists with or
without compiled code; the extension registers CPU and CUDA implementations for it when it is loaded. The
eager reference serves every device and every case that no kernel takes, and is differentiable.

Gradients: an op may have a backward (:meth:`FusedOp.backward`), itself made of ops defined here. It serves the calls
that need a gradient where a kernel says so (:attr:`fastdiff.backends.Kernel.differentiable`); all others run the
eager reference under autograd. A backward op is an op without a backward, so its own gradients, those of second
order, are the ones of its eager reference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from fastdiff.backends import Choice, choose, kernels_of

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY = torch.library.Library("fastdiff", "DEF")
OPS: dict[str, FusedOp[..., Any]] = {}


class FusedOp(Generic[P, R]):
    """A fused operation: call it, ask which backend would serve a call, or run its eager reference.

    Attributes:
        name: the op's name in ``torch.ops.fastdiff``.
        eager: the reference, in plain torch operations.
        overload: ``torch.ops.fastdiff.<name>.default``.
    """

    def __init__(self, schema: str, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.schema = schema
        self.eager = reference
        functools.update_wrapper(self, reference)
        LIBRARY.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        LIBRARY.impl(self.name, self._autograd, "Autograd")
        self.overload = getattr(torch.ops.fastdiff, self.name).default
        self._check: Callable[..., None] | None = None
        self._fake: Callable[..., Any] | None = None
        self._parameters = inspect.signature(reference).parameters
        self._backward: Backward | None = None
        OPS[self.name] = self

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Decorator: ``function`` raises ``ValueError`` for arguments outside the op's contract."""
        self._check = function
        return function

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: shapes, dtypes and strides of the result, for tracing."""
        torch.library.register_fake(f"fastdiff::{self.name}", function, lib=LIBRARY)
        self._fake = function
        return function

    def backward(self, *saved: str, **saved_with: str) -> Callable[[Gradients], Gradients]:
        """Decorator: ``function(needed, grads, **arguments)`` gives the gradients of the op.

        Args:
            saved: names of the arguments that it needs, and ``output<i>`` for results. All other tensors are
                ``None`` in ``arguments``, and not kept in memory.
            saved_with: name of an argument that it needs -> of another, without which it does not.

        The function gets the names of the arguments whose gradient is needed and the gradients of the results (``None``
        for a result that nothing depends on), and returns at least the gradients needed, by name; each is summed
        over the batch where its argument has none, and brought to its argument's shape and dtype.
        """

        def define(function: Gradients) -> Gradients:
            self._backward = Backward(function, {name: name for name in saved} | saved_with)
            return function

        return define

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Choice:
        """The backend that serves this call, and why the better ones do not.

        Raises:
            ValueError: if the arguments are outside the op's contract.
        """
        if self._check is not None:
            self._check(*args, **kwargs)
        return choose(self.name, self.eager, args, kwargs)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.choose(*args, **kwargs).run(*args, **kwargs)

    def __repr__(self) -> str:
        backends = ", ".join(kernel.backend for kernel in kernels_of(self.name))
        return f"<fastdiff op {self.name}{inspect.signature(self.eager)}; kernels: {backends or 'none'}>"

    def __reduce__(self) -> tuple[Callable[[str], FusedOp[..., Any]], tuple[str]]:
        return registered, (self.name,)

    def _autograd(self, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            return self.eager(*args, **kwargs)
        if torch.is_grad_enabled() and any(_requires_grad(a) for a in (*args, *kwargs.values())):
            if self._backward is None or choose(self.name, self.eager, args, kwargs).backend == "eager":
                return self.eager(*args, **kwargs)
            bound = dict.fromkeys(self._parameters) | self._defaults | dict(zip(self._parameters, args, strict=False))
            return _Differentiable.apply(self, *(bound | kwargs).values())
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args, **kwargs)

    def define_in(self, library: torch.library.Library, implementation: Callable[..., Any]) -> Any:
        """Define the same operator in a backend's own library: this op's schema, check and fake, and its eager
        reference where a gradient is needed.

        Args:
            library: of the backend.
            implementation: called with the op's arguments, without gradients.

        Returns:
            The operator's default overload.
        """

        def checked(*args: Any, **kwargs: Any) -> Any:
            if self._check is not None:
                self._check(*args, **kwargs)
            return implementation(*args, **kwargs)

        def autograd(*args: Any, **kwargs: Any) -> Any:
            needed = torch.is_grad_enabled() and any(_requires_grad(a) for a in (*args, *kwargs.values()))
            if needed or forward_ad._current_level >= 0:
                return self.eager(*args, **kwargs)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args, **kwargs)

        library.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(self.name, checked, "CompositeExplicitAutograd")
        library.impl(self.name, autograd, "Autograd")
        if self._fake is not None:
            torch.library.register_fake(f"{library.ns}::{self.name}", self._fake, lib=library)
        overload = getattr(getattr(torch.ops, library.ns), self.name).default
        return overload

    @functools.cached_property
    def _defaults(self) -> dict[str, Any]:
        return {n: p.default for n, p in self._parameters.items() if p.default is not inspect.Parameter.empty}


Gradients = Callable[..., dict[str, torch.Tensor]]

_is_alias_of: Callable[[torch.Tensor, torch.Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


class Backward(NamedTuple):
    """What :meth:`FusedOp.backward` was given."""

    function: Gradients
    saved: dict[str, str]


class _Differentiable(torch.autograd.Function):
    """``apply(op, *arguments)``: an op by its kernel, with its own backward."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp[..., Any], *values: Any) -> Any:
        arguments = dict(zip(op._parameters, values, strict=True))
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        positional, keyword = ({n: arguments[n] for n, p in op._parameters.items() if p.kind is k} for k in kinds)
        with torch._C._AutoDispatchBelowAutograd():
            result = op.overload(*positional.values(), **keyword)
        assert op._backward is not None
        tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
        outputs = {f"output{i}": t for i, t in enumerate(result if isinstance(result, tuple) else (result,))}
        known = tensors | outputs
        saved = {name: known[name] for name, other in op._backward.saved.items() if name in known and other in known}
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)
        ctx.op, ctx.saved = op, tuple(saved)
        ctx.like = {n: (t.shape, t.dtype) for n, t in tensors.items()}
        ctx.arguments = {n: None if n in tensors else value for n, value in arguments.items()}
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        op: FusedOp[..., Any] = ctx.op
        assert op._backward is not None
        needed = [n for n, wanted in zip(op._parameters, ctx.needs_input_grad[1:], strict=True) if wanted]
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(op._parameters))
        arguments = ctx.arguments | dict(zip(ctx.saved, ctx.saved_tensors, strict=True))
        found = op._backward.function(frozenset(needed), grads, **arguments)
        results: dict[str, torch.Tensor] = {}
        for name in needed:
            grad = _shaped(found[name], *ctx.like[name])
            # Two leaves would accumulate into the same memory.
            if any(_is_alias_of(grad, other) for other in results.values()):
                grad = grad.clone()
            results[name] = grad
        return (None, *(results.get(n) for n in op._parameters))


def _shaped(grad: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if grad.numel() != shape.numel():  # the argument was broadcast over the batch, the first axis
        grad = grad.sum(0)
    return grad.reshape(shape).to(dtype)


def registered(name: str) -> FusedOp[..., Any]:
    """The op of that name; copies and pickles of an op are the op."""
    return OPS[name]


def _requires_grad(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_requires_grad(v) for v in value)
    return isinstance(value, torch.Tensor) and value.requires_grad


def fused_op(schema: str) -> Callable[[Callable[P, R]], FusedOp[P, R]]:
    """Decorator: define ``fastdiff::<function name>`` with ``schema``; the body is the eager reference."""

    def define(reference: Callable[P, R]) -> FusedOp[P, R]:
        return FusedOp(schema, reference)

    return define

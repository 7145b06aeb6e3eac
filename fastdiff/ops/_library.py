"""The ``fastdiff`` torch library and :class:`FusedOp`, the one way an op is defined and called.

An op is defined here in Python (schema, tags, eager reference, fake implementation), so it exists with or
without compiled code; the extension registers CPU and CUDA implementations for it when it is loaded. The
eager reference serves every device and every case that no kernel takes, and is differentiable.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

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
        OPS[self.name] = self

    def check(self, function: Callable[..., None]) -> Callable[..., None]:
        """Decorator: ``function`` raises ``ValueError`` for arguments outside the op's contract."""
        self._check = function
        return function

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: shapes, dtypes and strides of the result, for tracing."""
        torch.library.register_fake(f"fastdiff::{self.name}", function, lib=LIBRARY)
        return function

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
        # Reached by direct callers of torch.ops.fastdiff.*: FusedOp itself picks eager before dispatching.
        if forward_ad._current_level >= 0:
            return self.eager(*args, **kwargs)
        if torch.is_grad_enabled() and any(_requires_grad(a) for a in (*args, *kwargs.values())):
            return self.eager(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args, **kwargs)


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

"""Who serves an op: backends, what each kernel accepts, the choice, and the reason for every refusal.

A kernel declares in ``refuse(*args, **kwargs)`` what it does not take, as one sentence; ``None`` means it
takes the call. The first kernel in the order of :data:`BACKENDS` that takes a call, and was not measured to lose at
its size (:mod:`fastdiff.backends.losses`), serves it, else eager; among a GPU's kernels the order is the measured one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from fastdiff.backends.losses import faster_than, why_it_loses

#: In order of preference.
BACKENDS = ("cuda", "triton", "cpu", "eager")

Refuse = Callable[..., str | None]
Prepare = Callable[..., Callable[..., Any] | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """What serves one call.

    Attributes:
        backend: one of :data:`BACKENDS`.
        run: call it with the op's arguments.
        reason: why no better backend serves the call; empty when the best one does.
        prepare: see :class:`Kernel`.
    """

    backend: str
    run: Callable[..., Any]
    reason: str = ""
    prepare: Prepare | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One backend's implementation of one op.

    Attributes:
        differentiable: given where the backend serves the op's backward too: why not that of this call, or ``None``.
        on_request: serve only where the backend is asked for by name, or was measured to be faster than eager and
            nothing faster takes the call; see :mod:`fastdiff.backends.losses`.
        prepare: from a call with some arguments, what serves all calls that differ in their tensors only, given the
            tensors alone (of the same classes, dtypes, shapes and devices, not needing a gradient); ``None`` if that is
            not worth the while.
        yields: why torch serves a call better although the kernel takes it, or ``None``; not asked where the backend is
            demanded strictly.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    refuse: Refuse
    differentiable: Refuse | None = None
    on_request: bool = False
    prepare: Prepare | None = None
    yields: Refuse | None = None
    choice: Choice = field(init=False)
    choice_with_gradient: Choice | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", Choice(self.backend, self.run, prepare=self.prepare))
        if self.differentiable is not None:
            overload = getattr(torch.ops.fastdiff, self.op).default
            object.__setattr__(self, "choice_with_gradient", Choice(self.backend, overload))


class BackendError(RuntimeError):
    """A backend was demanded (``use_backend(..., strict=True)``) that does not take the call."""


# Read with getattr: torch.compile guards on attributes of a plain threading.local, not on those of a subclass.
_override = threading.local()
_kernels: dict[str, list[Kernel]] = {}
#: Why a whole backend cannot run here; filled at import by the backends themselves.
unavailable: dict[str, str] = {}


def _from_environment() -> str | None:
    """What ``FASTDIFF_BACKEND`` demands of the whole process, as :func:`use_backend` does of a block."""
    backend = os.environ.get("FASTDIFF_BACKEND") or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"FASTDIFF_BACKEND is {backend!r}; expected one of {', '.join(BACKENDS)}")
    return backend


_demanded = _from_environment()
_default = (_demanded, False)


def register(kernel: Kernel) -> None:
    """Add a kernel; among an op's kernels the order of :data:`BACKENDS` decides, not of registration."""
    kernels = _kernels.setdefault(kernel.op, [])
    kernels[:] = [k for k in kernels if k.backend != kernel.backend] + [kernel]
    kernels.sort(key=lambda k: BACKENDS.index(k.backend))


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """The kernels registered for an op, best first."""
    return tuple(_kernels.get(op, ()))


def overridden() -> tuple[str | None, bool]:
    """The backend demanded by :func:`use_backend` in this thread, or by ``FASTDIFF_BACKEND``, and whether strictly."""
    wanted: tuple[str | None, bool] = getattr(_override, "wanted", _default)
    return wanted


@contextlib.contextmanager
def use_backend(backend: str, *, strict: bool = False) -> Iterator[None]:
    """Within the block, and in this thread, let only ``backend`` serve the ops.

    Args:
        backend: one of :data:`BACKENDS`.
        strict: raise :class:`BackendError`, naming the reason, where the backend does not take a call;
            otherwise such a call runs eager, and so does one that the kernel itself leaves to torch as the faster one.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    saved = overridden()
    _override.wanted = (backend, strict)
    try:
        yield
    finally:
        _override.wanted = saved


def choose(op: str, eager: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """The choice for one call of ``op``; ``eager`` is its reference."""
    wanted, strict = overridden()
    if wanted == "eager":
        said = "FASTDIFF_BACKEND is 'eager'" if _demanded == "eager" else "use_backend('eager') is in effect"
        return Choice("eager", eager, said)
    said = "autocast is on"
    if not torch._C._is_any_autocast_enabled():
        found, said = _first_that_serves(op, args, kwargs, wanted, strict)
        if found is not None:
            return found
    if strict:
        raise BackendError(f"backend {wanted!r} does not take this call of {op}: {said}")
    return Choice("eager", eager, said)


def _first_that_serves(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str | None, strict: bool
) -> tuple[Choice | None, str]:
    """The choice among kernels, and why none before it, or none at all, serves the call."""
    reasons: dict[str, str] = {}
    slower: Kernel | None = None  # the fastest so far that takes the call, if not the fastest of all
    ahead = len(BACKENDS)  # so many are faster than that
    for kernel in _kernels.get(op, ()):
        if wanted is not None and kernel.backend != wanted:
            continue
        reason = kernel.refuse(*args, **kwargs)
        if reason is None and kernel.yields is not None and not strict:
            reason = kernel.yields(*args, **kwargs)
        if reason is None and wanted is None:
            reason = why_it_loses(kernel.backend, op, args, kwargs)
        if reason is None and kernel.on_request and wanted is None:
            faster, why = faster_than(kernel.backend, op, args, kwargs)
            if faster:
                reason = why
                if "eager" not in faster and len(faster) < ahead:
                    slower, ahead = kernel, len(faster)
        if reason is None:
            return kernel.choice, ""
        if reason == GRADIENT and kernel.differentiable is not None:
            reason = _why_not_differentiable(kernel, args, kwargs)
            if reason is None:
                assert kernel.choice_with_gradient is not None
                return kernel.choice_with_gradient, ""
        reasons[kernel.backend] = reason
    if not reasons:
        names = BACKENDS[:-1] if wanted is None else (wanted,)
        reasons = {n: unavailable.get(n, f"has no kernel for {op}") for n in names}
    if slower is None:
        return None, _said(reasons)
    del reasons[slower.backend]
    said = _said(reasons)
    return Choice(slower.backend, slower.run, said, slower.prepare), said


def _said(reasons: dict[str, str]) -> str:
    return "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())


def _why_not_differentiable(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the kernel's backward does not serve a call that was refused with :data:`GRADIENT`, or ``None``."""
    assert kernel.differentiable is not None
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return f"{GRADIENT} within a transform of torch.func"
    with torch.no_grad():
        return kernel.refuse(*args, **kwargs) or kernel.differentiable(*args, **kwargs)


#: The refusal of :func:`tensor_reason` that a kernel with a backward of its own takes back.
GRADIENT = "a gradient is needed"

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled
#: What :func:`is_plain` asks, and the answers that make it true.
PLAIN: tuple[tuple[Callable[[], Any], Any], ...] = (
    (_dispatch_modes, 0), (_function_modes, 0), (_profiling, False), (_transform, None), (_tracer, None),
)  # fmt: skip


def is_plain() -> bool:
    """Whether nobody watches or changes what torch does: no mode, no transform, no tracer, no profiler."""
    watched = _dispatch_modes() or _function_modes() or _profiling()
    return not watched and _transform() is None and _tracer() is None


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def tensor_reason(device: str, dtypes: frozenset[torch.dtype], *tensors: torch.Tensor | None) -> str | None:
    """The refusal every kernel shares: device, dtype, gradients, tensor subclasses; ``None`` if all pass."""
    if forward_ad._current_level >= 0:  # dual tensors do not set requires_grad
        return "forward-mode differentiation is on"
    grad = torch.is_grad_enabled()
    is_there = "is_" + device  # a fifth of the time of `t.device.type`
    for t in tensors:
        if t is None:
            continue
        if not getattr(t, is_there):
            return f"a tensor is on {t.device.type}"
        if t.dtype not in dtypes:
            return f"a tensor is {str(t.dtype)[6:]}"
        if grad and t.requires_grad:
            return GRADIENT
        if type(t) not in _PLAIN and not torch.compiler.is_compiling():
            return f"a tensor is a {type(t).__name__}"
    return None

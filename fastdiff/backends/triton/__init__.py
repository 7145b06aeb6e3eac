"""The Triton backend: one file per op, each with a ``run`` of the op's arguments.

Nothing here imports Triton before a first call that its kernels take: that costs half a second.

Eager calls go straight to a kernel's ``run``. While torch.compile traces, and under a dispatch mode (which counts,
fakes or records operations), they go through ``torch.ops.fastdiff_triton.<op>`` instead, an operator with the same
schema as the op's. It is one of its own, and not an implementation of ``torch.ops.fastdiff.<op>`` at the CUDA key,
because that key belongs to the compiled kernels, and because a compiled graph should keep the backend it was traced
with.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import Kernel, Refuse, register, unavailable
from fastdiff.backends._facts import fact
from fastdiff.backends._gpu import refusals
from fastdiff.backends.losses import first_tensor
from fastdiff.backends.triton._config import torch_is_faster, triton_version

#: Triton's own switch: kernels run in its interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
#: The oldest NVIDIA architecture whose tensor cores take bfloat16.
OLDEST = (8, 0)
#: The largest group of group_norm_silu in channels: a tile holds all of them.
MAX_GROUP_CHANNELS = 8192
#: Triton's, of the oldest torch that is served (2.10).
TRITON_MIN = (3, 5)

_len_dispatch_modes = torch._C._len_torch_dispatch_stack
# A library's operators go when it does.
_keep: list[torch.library.Library] = []


def device_type() -> str:
    """Of the tensors the kernels take: ``cpu`` in the interpreter, else what this torch was built for."""
    if INTERPRETED:
        return "cpu"
    return "xpu" if torch.version.cuda is None and torch.version.hip is None and torch.version.xpu else "cuda"


def why_not() -> str | None:
    """Why no Triton kernel can run with this installation, or ``None``. GPUs are looked at when tensors come."""
    version = triton_version()
    if version is None:
        return "triton is not installed"
    if version < TRITON_MIN:
        return f"triton {'.'.join(map(str, version))} is older than {'.'.join(map(str, TRITON_MIN))}"
    if INTERPRETED:
        return None
    if not (torch.version.cuda or torch.version.hip or torch.version.xpu):
        return "this torch was built without GPU support"
    return None


@fact
def without_fp64(device: int) -> str | None:
    """Why a kernel that takes scalars of fp64 cannot run on that GPU (Intel has some without it), or ``None``."""
    if device_type() == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return f"GPU {device} has no fp64"
    return None


@fact
def why_not_on(device: int) -> str | None:
    """Why the kernels cannot run on that GPU, or ``None``."""
    if INTERPRETED or device_type() != "cuda" or torch.version.hip:
        return None
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        has, needed = (".".join(map(str, version)) for version in (found, OLDEST))
        return f"GPU {device} has compute capability {has}, and the kernels need {needed}"
    return None


def _implementation(op: str) -> Callable[..., Any]:
    """The op's ``run``, whose module is imported when it is first called."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        return module().run(*args, **kwargs)

    module = functools.cache(lambda: importlib.import_module(f"{__name__}.{op}"))
    return implementation


def _run(implementation: Callable[..., Any], overload: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _len_dispatch_modes():
            return overload(*args, **kwargs)
        return implementation(*args, **kwargs)

    return run


def _group_too_large(x: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> str | None:
    channels = x.shape[1] // num_groups
    return f"a group has {channels} channels, more than {MAX_GROUP_CHANNELS}" if channels > MAX_GROUP_CHANNELS else None


def _refuse(op: str, shared: Refuse) -> Refuse:
    """What no GPU backend takes, and what this GPU does not."""

    def refuse(*args: Any, **kwargs: Any) -> str | None:
        reason = shared(*args, **kwargs)
        if reason is None and op == "group_norm_silu":
            reason = _group_too_large(*args, **kwargs)
        if reason is not None or INTERPRETED:
            return reason
        first = first_tensor(args, kwargs)
        reason = why_not_on(first.get_device())
        if reason is None and op == "scheduler_step":
            reason = without_fp64(first.get_device())
        return reason

    return refuse


def register_kernels(ops: Mapping[str, Any]) -> None:
    """Register the kernels, or note why there are none.

    Args:
        ops: the :class:`fastdiff.ops._library.FusedOp` of each name.
    """
    reason = why_not()
    if reason is not None:
        unavailable["triton"] = reason
        return
    library = torch.library.Library("fastdiff_triton", "DEF")
    _keep.append(library)
    for name, shared in refusals(device_type()).items():
        implementation = _implementation(name)
        overload = ops[name].define_in(library, implementation)
        kernel = _run(implementation, overload)
        yields = torch_is_faster if name == "attention" and not INTERPRETED else None
        register(
            Kernel(name, "triton", kernel, _refuse(name, shared), yields=yields, on_request=not INTERPRETED)
        )

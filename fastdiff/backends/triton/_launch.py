"""Kernels in two alignments, and a launch that costs little host time.

Conventions of all kernels here:

* Parameters come in this order: tensors (not annotated), scalars (annotated with :data:`i32` and its like), constants
  (``tl.constexpr``), the first of which is ``VEC``.
* No scalar is specialized on: a new shape compiles nothing.
* ``VEC`` is 8 where every tensor is aligned to 16 bytes and every size and stride that a kernel takes "in VECs" is a
  multiple of 8 elements, which lets the compiler load 16 bytes at a time; else 1.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Types of scalars; Triton reads the annotation's text.
i32, i64, fp32, fp64 = tl.int32, tl.int64, tl.float32, tl.float64

INTERPRETED = bool(triton.knobs.runtime.interpret)
#: Triton for AMD compiles for whether an offset into a tensor fits 32 bits; that is part of what tells launches apart.
RANGES = torch.version.hip is not None

#: Elements per 16-byte access of a two-byte type; a four-byte type then takes two accesses.
WIDE = 8

#: Compiler options of all kernels. Multiplications and additions are fused; newer Tritons want that said.
OPTIONS = {"enable_fp_fusion": True}

Constants = tuple[Any, ...]


#: All that were imported.
KERNELS: list[Kernel] = []


class Kernel:
    """A Triton kernel: the function compiled for aligned tensors and for any, and the launches seen so far."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.__name__, self.__module__, self.__doc__ = function.__name__, function.__module__, function.__doc__
        parameters = inspect.signature(function).parameters.values()
        self.tensors = [p.name for p in parameters if p.annotation is p.empty]
        self.constants = [p.name for p in parameters if "constexpr" in str(p.annotation)]
        self.scalars = {
            p.name: p.annotation.strip("\"'")
            for p in parameters
            if p.name not in self.tensors and p.name not in self.constants
        }
        assert self.constants[0] == "VEC"
        scalars = list(self.scalars)
        self.aligned = triton.jit(function, do_not_specialize=scalars)
        self.loose = triton.jit(function, do_not_specialize=scalars, do_not_specialize_on_alignment=self.tensors)
        self._launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        KERNELS.append(self)

    def launch(
        self,
        grid: int,
        tensors: tuple[Tensor | None, ...],
        scalars: Sequence[int | float],
        constants: Constants,
        *,
        warps: int = 4,
        stages: int = 1,
    ) -> None:
        """Run ``grid`` programs. Absent tensors are ``None``, which the kernel sees at compile time."""
        function = self.aligned if constants[0] > 1 else self.loose
        if INTERPRETED:
            function[(grid,)](*tensors, *scalars, *constants)
            return
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        key = (device, warps, stages, constants, *[None if t is None else t.dtype for t in tensors])
        if RANGES:
            key = (*key, *[t is not None and t.untyped_storage().nbytes() < 1 << 31 for t in tensors])
        known = self._launches.get(key)
        if known is not None and (stream := _stream(first, device)) is not None:
            # As triton.runtime.jit.JITFunction.run ends; what it does before takes most of its time.
            run, handle, metadata, _ = known
            run(grid, 1, 1, stream, handle, metadata, None, None, None, *tensors, *scalars, *constants)
            return
        with contextlib.nullcontext() if device < 0 else getattr(torch, first.device.type).device(device):
            options = {"num_warps": warps, "num_stages": stages, **OPTIONS}
            compiled = function[(grid,)](*tensors, *scalars, *constants, **options)
        # The compiled kernel unloads itself when it goes.
        self._launches[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled


def _stream(t: Tensor, device: int) -> int | None:
    """The current stream, if CUDA or ROCm has one for that tensor and its device is the current one."""
    if not t.is_cuda or device != torch._C._cuda_getDevice():
        return None
    return torch._C._cuda_getCurrentRawStream(device)


def kernel(function: Callable[..., None]) -> Kernel:
    """Decorator: a Triton kernel that follows the conventions above."""
    return Kernel(function)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all start at multiples of 16 bytes."""
    for t in tensors:  # noqa: SIM110  # every call asks; a generator takes twice as long
        if t is not None and t.data_ptr() % 16:
            return False
    return True


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter few, so that small tensors are split too."""
    if device.type == "cpu":
        return 3
    properties = getattr(torch, device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count

"""Models without memory: tensors of real shapes, for which kernels are chosen as for real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastdiff import backends
from fastdiff.backends import cpu, cuda
from fastdiff.backends._gpu import refusals
from fastdiff.ops import _library


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block tensors are fake, and the backends take them for real ones."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(backends, "_PLAIN", (*backends._PLAIN, FakeTensor)))
        stack.enter_context(torch.no_grad())
        yield


#: Backend -> op -> what its kernel refuses, of tensors that are on the CPU in place of a GPU.
CONTRACTS = {"cpu": cpu.REFUSE, "triton": refusals("cpu"), "cuda": cuda.refuse_table("cpu")}


@contextmanager
def contracts() -> Iterator[dict[tuple[str, str], list[str]]]:
    """Within the block every backend is asked whether it would take each call of an op, whichever serves it.

    Yields:
        (op, backend) -> its refusals of the calls so far; empty where it took all, and missing where it was not asked:
        it has no kernel, or there was no call.
    """
    found: dict[tuple[str, str], list[str]] = {}
    choose = _library.choose

    def asking(op: str, eager: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for backend, refuse in CONTRACTS.items():
            if op in refuse:
                reason = refuse[op](*args, **kwargs)
                found.setdefault((op, backend), []).extend([reason] if reason else [])
        return choose(op, eager, args, kwargs)

    with mock.patch.object(_library, "choose", asking):
        yield found

"""A recorder that does on the CPU what a CUDA graph does: it repeats operations on the same memory, and runs no Python.

Operations are noted as they are dispatched, with their very tensors and constants. A replay runs them again and writes
each result into the tensor that it had at the capture. So weights are read where they were then, numbers are those of
then, and results land where earlier ones may still be looked at. Before a replay all these tensors are poisoned, those
of the other recordings too, since graphs share their memory.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: What no stream can capture: it waits, or allocates by what a tensor holds.
_SYNCS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}


class _Tape(TorchDispatchMode):
    """Notes operations, and keeps all tensors, as a graph's memory pool does."""

    def __init__(self, fail_at: str) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.owned: dict[int, Tensor] = {}
        self._fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name in _SYNCS or name == self._fail_at:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        alias = [r.alias_info for r in func._schema.returns]
        if not any(a is not None and not a.is_write for a in alias):  # views move with what they are of
            if not any(alias):
                for tensor in _tensors(result):
                    self.owned.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            self.steps.append((func, args, kwargs, result))
        return result


class FakeRecording:
    """Repeats a tape."""

    def __init__(self, tape: _Tape, recorder: FakeRecorder) -> None:
        self.tape: _Tape | None = tape
        self.recorder = recorder

    def replay(self) -> None:
        assert self.tape is not None, "a graph was replayed after it had been dropped"
        assert self.recorder.lock.acquire(blocking=False), "two graphs of one pool were replayed at the same time"
        try:
            self.recorder.poison()
            for func, args, kwargs, recorded in self.tape.steps:
                for old, new in zip(_tensors(recorded), _tensors(func(*args, **kwargs)), strict=True):
                    if old is not new:
                        old.copy_(new)
        finally:
            self.recorder.lock.release()

    def drop(self) -> None:
        self.tape = None
        self.recorder.recordings.remove(self)


class FakeRecorder:
    """See the module.

    Attributes:
        made: all of them, in a test.
        fail_at: name of an operation that fails when captured.
        capturing: whether somebody else is capturing.
        reason: why there is nothing to capture with.
    """

    device_type = "cpu"
    made: ClassVar[weakref.WeakSet[FakeRecorder]] = weakref.WeakSet()
    fail_at = ""
    capturing = False
    reason: str | None = None

    def __init__(self) -> None:
        self.recordings: list[FakeRecording] = []
        self.lock = threading.Lock()
        self.released = 0
        self.made.add(self)

    def why_not(self) -> str | None:
        return self.reason

    def busy(self) -> bool:
        return self.capturing

    @contextlib.contextmanager
    def side_stream(self, device: torch.device) -> Iterator[None]:
        yield

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[FakeRecording, Any]:
        with _Tape(self.fail_at) as tape:
            result = call()
        recording = FakeRecording(tape, self)
        self.recordings.append(recording)
        self.poison()
        return recording, result

    def poison(self) -> None:
        """Spoil all memory of the pool."""
        for recording in self.recordings:
            assert recording.tape is not None
            for tensor in recording.tape.owned.values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77 if tensor.dtype != torch.bool else True)

    def follow(self, device: torch.device) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self) -> None:
        assert not self.recordings
        self.released += 1


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []

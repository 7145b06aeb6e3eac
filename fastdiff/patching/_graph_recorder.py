"""What captures and replays: the interface, and CUDA graphs behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Do it again, on the current stream, with the same memory and whatever that holds now."""

    def drop(self) -> None:
        """Give back what it holds."""


class Recorder(Protocol):
    """Captures work of one model; all recordings of a recorder share their memory and are replayed one at a time.

    Attributes:
        device_type: of the devices whose work it captures.
    """

    device_type: str

    def why_not(self) -> str | None:
        """Why nothing can be captured here, or ``None``."""

    def busy(self) -> bool:
        """Whether the current stream's work is being captured by whomever."""

    def side_stream(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Within the block work goes to the stream on which :meth:`record` captures."""

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Recording, Any]:
        """Capture the work of ``call()``; also returns what it returned: tensors that each replay fills."""

    def follow(self, device: torch.device) -> None:
        """Let the current stream wait for the replays that another stream was given before."""

    def settle(self) -> None:
        """Wait until the latest replay is done."""

    def release(self) -> None:
        """Forget the shared memory; all recordings have been dropped."""


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph
        self.replay = graph.replay

    def drop(self) -> None:
        self._graph.reset()


class CudaRecorder:
    """CUDA graphs in one private memory pool, captured on one stream.

    The pool is the model's own: graphs of one pool must not run at the same time, and its memory goes back when its
    last graph goes.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None  # that a replay was put on

    def why_not(self) -> str | None:
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def side_stream(self, device: torch.device) -> Iterator[None]:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def record(self, call: Callable[[], Any], device: torch.device) -> tuple[Recording, Any]:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: other threads may go on using the device meanwhile. The stream is set once more around it,
        # since torch.cuda.graph does not go back to the old one when ending the capture fails.
        with self.side_stream(device), _own_workspaces():
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = call()
            except BaseException:
                self._abandon(graph, device)
                raise
        return _CudaRecording(graph), result

    def _abandon(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        """Clean up after a capture that failed: torch may go on taking the pool for one being captured into."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
        with contextlib.suppress(RuntimeError):
            graph.reset()
        self._pool = None  # the next capture takes a new one

    def follow(self, device: torch.device) -> None:
        current = torch.cuda.current_stream(device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def settle(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def release(self) -> None:
        # A pool cannot be used again once its last graph has gone.
        self._pool = self._last = None
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _own_workspaces() -> Iterator[None]:
    """Within the block, cuBLAS takes its workspaces from the pool, and they are the graph's alone afterwards.

    cuBLAS keeps a workspace per stream. One from outside of the pool could be freed while a graph still uses it:
    torch.compile's graphs clear them all.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()

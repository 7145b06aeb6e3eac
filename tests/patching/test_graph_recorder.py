"""The CUDA recorder's order of calls, against a driver that only notes them: no GPU is needed, and none is proven."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastdiff.patching._graph_recorder import CudaRecorder

DEVICE = torch.device("cuda", 0)


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name, self.device = driver, name, DEVICE

    def wait_stream(self, other: Stream) -> None:
        self.driver.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.driver.log.append(f"host waits for {self.name}")


class Driver:
    """What the recorder needs of ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = self.main = Stream(self, "main")
        self.pools = 0
        self.fail = False

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        earlier, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = earlier

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """Like ``torch.cuda.graph``, which leaves its stream current where the capture cannot be ended."""
        assert stream is self.current and capture_error_mode == "thread_local"
        self.log.append(f"begin in pool {pool}")
        yield_failed = False
        try:
            yield
        except RuntimeError:
            yield_failed = True
        if yield_failed:
            self.current = stream
            raise RuntimeError("capture_end failed")
        self.log.append("end")


class Graph:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def replay(self) -> None:
        self.driver.log.append("replay")

    def reset(self) -> None:
        self.driver.log.append("reset")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    names = {
        "Stream": lambda device: Stream(driver, "side"),
        "current_stream": lambda device: driver.current,
        "CUDAGraph": lambda: Graph(driver),
        "empty_cache": lambda: driver.log.append("empty"),
        **{name: getattr(driver, name) for name in ("graph", "graph_pool_handle", "stream")},
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: driver.log.append("clear"), raising=False)

    def end(device: int, pool: int) -> None:
        driver.log.append(f"abandon pool {pool}")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return driver


def test_capture_and_replay(driver: Driver) -> None:
    recorder = CudaRecorder()
    recording, result = recorder.record(lambda: driver.log.append("forward") or 5, DEVICE)
    assert result == 5
    assert driver.log == [
        "side waits for main", "clear", "begin in pool 1", "forward", "end", "clear", "main waits for side"
    ]  # fmt: skip
    assert driver.current is driver.main
    driver.log.clear()
    recorder.record(lambda: None, DEVICE)
    assert "begin in pool 1" in driver.log  # shared
    driver.log.clear()
    recording.replay()
    recording.drop()
    assert driver.log == ["replay", "reset"]


def test_a_capture_that_fails_leaves_nothing_behind(driver: Driver) -> None:
    recorder = CudaRecorder()

    def sync() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capture_end failed") as found:
        recorder.record(sync, DEVICE)
    assert "not permitted" in str(found.value.__context__)
    assert driver.log[2:] == ["begin in pool 1", "abandon pool 1", "reset", "clear", "main waits for side"]
    assert driver.current is driver.main
    recorder.record(lambda: None, DEVICE)
    assert "begin in pool 2" in driver.log


def test_replays_on_several_streams_come_one_after_another(driver: Driver) -> None:
    recorder = CudaRecorder()
    recorder.settle()  # before the first there is nothing to wait for
    other = Stream(driver, "other")
    recorder.follow(DEVICE)
    recorder.follow(DEVICE)
    assert driver.log == []
    with driver.stream(other):
        recorder.follow(DEVICE)
    assert driver.log == ["other waits for main"]
    recorder.settle()
    assert driver.log[1:] == ["host waits for other"]


def test_release(driver: Driver) -> None:
    recorder = CudaRecorder()
    recorder.record(lambda: None, DEVICE)
    recorder.release()
    assert driver.log[-1] == "empty"
    recorder.record(lambda: None, DEVICE)
    assert "begin in pool 2" in driver.log

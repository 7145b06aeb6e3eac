"""Fixtures of the tests of patching, and which of these tests another Diffusers than the newest needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from extent import REPEATED
from fake_recorder import FakeRecorder

from fastdiff.patching import _graphs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REPEATED:
        from differences import skip_repeated

        skip_repeated([item for item in items if Path(__file__).parent in item.path.parents])


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs come from a recorder for the CPU."""
    monkeypatch.setattr(_graphs, "recorder_of", FakeRecorder)

"""Fixtures of the tests of patching."""

from __future__ import annotations

import pytest
from fake_recorder import FakeRecorder

from fastdiff.patching import _graphs


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs come from a recorder for the CPU."""
    monkeypatch.setattr(_graphs, "recorder_of", FakeRecorder)

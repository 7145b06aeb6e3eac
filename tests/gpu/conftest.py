"""What runs on a machine with a GPU only: ``make gpu``."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if torch.cuda.is_available() else "torch sees no GPU"
    for item in items:
        if reason is not None and item.path.parent.name == "gpu" and not item.get_closest_marker("anywhere"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "anywhere: a test of tests/gpu that needs no GPU")

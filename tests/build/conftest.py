from __future__ import annotations

from pathlib import Path

import pytest
from source_tree import copy_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree, in a folder with a space in its name."""
    return copy_tree(tmp_path / "a tree")

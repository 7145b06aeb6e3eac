"""For pytest's ``-p``: the emulated kernels are the ``cuda`` backend, and the tests are those of numbers."""

from __future__ import annotations

import pytest
from emulated import load_ops

load_ops()

#: Tests of any call, and of sizes and layouts, that are not marked as numerics.
SHAPES = (
    *("any_", "shapes", "row_lengths", "ranks", "strided", "memory_format"),
    *("constant_group", "tokens_are", "fully_masked", "lowest_float"),
)


def _wanted(item: pytest.Item) -> bool:
    if not (item.get_closest_marker("numerics") or any(words in item.name for words in SHAPES)):
        return False
    if item.path.stem != "test_attention":
        return True
    # Attention takes half precision only, and many keys take long: one type must do for them.
    many = any(keys in item.name for keys in ("700", "1000", "2500"))
    return "float32" not in item.name and not (many and "float16" in item.name.replace("bfloat16", ""))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = [item for item in items if _wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _wanted(item)])
    items[:] = wanted

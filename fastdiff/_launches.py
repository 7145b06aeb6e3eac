"""Counting the operations that a real forward dispatches, each of which is at least one launch on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations without work of their own whose schemas do not say so.
_NO_WORK = {
    "device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
}  # fmt: skip


class LaunchCounter(TorchDispatchMode):
    """Counts dispatched operations by name; views and empty allocations are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func._schema.name.split("::")[-1]
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if not view and packet not in _NO_WORK:
            self.ops[packet] += 1
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], Any]) -> Counter[str]:
    """The operations that ``call()`` dispatches, without gradients."""
    with torch.no_grad(), LaunchCounter() as counter:
        call()
    return counter.ops

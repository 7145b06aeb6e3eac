"""Which backend serves an op on which GPU: what was measured there.

Kernels that no GPU has measured serve on request only (``backend=...``, ``use_backend`` or ``FASTDIFF_BACKEND``); a
request also overrides what is in :data:`FASTEST`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: By compute capability and op: the fastest backend, or a function of the op's arguments that names it. For
#: ``attention``, ``"eager"`` is torch's own scaled_dot_product_attention. Entries come from
#: ``benchmarks/results/<device>.json``, which ``make gpu`` writes. It is empty because none has been written yet.
FASTEST: dict[tuple[int, int], dict[str, str | Callable[..., str]]] = {}

#: Why a kernel without an entry is not chosen by itself.
UNPROVEN = "not proven on a GPU yet, so only on request: backend=..., use_backend or FASTDIFF_BACKEND"


@functools.cache
def capability(device: int) -> tuple[int, int] | None:
    """The compute capability of a GPU; ``None`` for what has none (the CPU, AMD's and Intel's GPUs)."""
    if device < 0 or not torch.version.cuda:
        return None
    return torch.cuda.get_device_capability(device)


def why_not_unasked(op: str, backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a backend does not serve a call of ``op`` that it takes, unless it is asked for by name; or ``None``."""
    if not FASTEST:
        return UNPROVEN
    found = capability(next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)).get_device())
    best = FASTEST[found].get(op) if found in FASTEST else None
    if found is None or best is None:
        return UNPROVEN
    if callable(best):
        best = best(*args, **kwargs)
    return None if best == backend else f"{best} is the faster one on sm_{found[0]}{found[1]}, as measured"

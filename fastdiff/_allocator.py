"""The one process-wide switch of fastdiff, and why it is never part of ``patch``."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_ONE_GIB = 1 << 30


def tune_cpu_allocator(threshold_bytes: int = _ONE_GIB) -> bool:
    """Let glibc keep freed memory for reuse instead of returning it to the kernel, for the whole process.

    A CPU tensor above glibc's mmap threshold (at most 32 MiB) is given back to the kernel when it is freed
    and page-faulted in again by the next layer, which costs more than most layers' arithmetic. This raises
    the mmap and trim thresholds with ``mallopt``. The old values cannot be read back, so it cannot be undone:
    that is why it is a call of its own. Memory use stays at its peak instead of falling between layers.

    Args:
        threshold_bytes: blocks up to this many bytes are kept; at most 2 GiB - 1.

    Returns:
        True if the allocator took both values; False where there is no glibc (macOS, Windows, musl).

    Raises:
        ValueError: if ``threshold_bytes`` is out of range.
    """
    if not 0 < threshold_bytes < 1 << 31:
        raise ValueError(f"threshold_bytes is {threshold_bytes}; expected 1 to {(1 << 31) - 1}")
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, threshold_bytes) and mallopt(_M_TRIM_THRESHOLD, threshold_bytes))

"""fastdiff: ``fastdiff.patch(pipe)`` makes a Diffusers pipeline faster and changes nothing else."""

__version__ = "0.1.0"  # before the imports: the extension is checked against it

import importlib
from typing import TYPE_CHECKING, Any

from fastdiff import _attention_backend, ops
from fastdiff._allocator import tune_cpu_allocator
from fastdiff.backends import BackendError, use_backend
from fastdiff.info import info

if TYPE_CHECKING:
    from fastdiff._report import report
    from fastdiff._verify import verify
    from fastdiff.patching import patch, patched, unpatch
    from fastdiff.patching.extending import register_block

__all__ = [
    "BackendError",
    "info",
    "ops",
    "patch",
    "patched",
    "register_block",
    "report",
    "tune_cpu_allocator",
    "unpatch",
    "use_backend",
    "verify",
]

# These need Diffusers, which takes seconds to import.
_LAZY = {
    "patch": "fastdiff.patching",
    "patched": "fastdiff.patching",
    "register_block": "fastdiff.patching.extending",
    "report": "fastdiff._report",
    "unpatch": "fastdiff.patching",
    "verify": "fastdiff._verify",
}

_attention_backend.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)

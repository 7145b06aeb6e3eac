"""Loading of the compiled extension ``fastdiff._C``; never fails, keeps the reason."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastdiff import __version__

#: The oldest torch whose stable ABI has what the extension uses.
TORCH_MIN = (2, 10)
_PACKAGE = Path(__file__).resolve().parent


class _Unusable(Exception):
    """Why the extension cannot be used: a sentence, and the command that removes the cause."""

    def __init__(self, reason: str, fix: str = "", *, rebuild: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.fix, self.rebuild = reason, fix, rebuild


def _load() -> ModuleType:
    # The file's symbols are torch's: with an older one it must not even be opened.
    if torch_version() < TORCH_MIN:
        raise _Unusable(
            f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_MIN))}, the oldest they serve",
            "pip install --upgrade torch",
            rebuild=False,
        )
    # Only here: an editable installation's import hook would offer that of another copy of the package.
    spec = PathFinder.find_spec("fastdiff._C", [str(_PACKAGE)])
    if spec is None or spec.origin is None:
        raise _not_built()
    path = Path(spec.origin)
    if _is_truncated(path):
        raise _Unusable(f"{path} is incomplete, as after an interrupted build or copy")
    try:
        loaded = importlib.import_module("fastdiff._C")
    except Exception as exc:
        raise _Unusable(f"{path} does not load: {exc}") from exc
    built_for = json.loads(loaded.build_info()).get("fastdiff")
    if built_for not in (None, __version__):
        raise _Unusable(f"{path} was built for fastdiff {built_for}, and this is {__version__}")
    return loaded


def torch_version() -> tuple[int, int]:
    """Major and minor version of the torch that runs."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def _not_built() -> _Unusable:
    record = _PACKAGE / "_build.json"
    if record.is_file():
        return _Unusable(**json.loads(record.read_text()))
    others = sorted(path.name for path in _PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return _Unusable(f"they were built for another Python or system ({', '.join(others)})")
    return _Unusable("they have not been built")


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section table, which comes last.

    The dynamic loader does not look: it would map the missing pages, and touching them kills the process.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # not a 64-bit little-endian ELF file
        return len(header) < 64
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + entry_size * entries


#: Why the extension is not loaded, as a sentence; empty when it is.
error = ""
#: A command that removes the cause, and whether the extension must then be built again.
fix, rebuild = "", False
module: ModuleType | None = None

try:
    module = _load()
except _Unusable as unusable:
    error = f"the compiled kernels are not usable: {unusable.reason}"
    fix, rebuild = unusable.fix, unusable.rebuild


def build_info() -> dict[str, Any]:
    """What setup.py recorded about the build; empty without an extension."""
    return json.loads(module.build_info()) if module is not None else {}


def cpu_isa() -> str:
    """``none``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx``."""
    return module.cpu_isa() if module is not None else "none"


def why_not_cpu() -> str | None:
    """Why the CPU kernels cannot run here, or ``None``."""
    if module is None:
        return error
    if cpu_isa() == "none":
        if "FASTDIFF_CPU_ISA" in os.environ:
            return f"FASTDIFF_CPU_ISA is {os.environ['FASTDIFF_CPU_ISA']!r}"
        return build_info().get("isas_missing") or "this CPU has no AVX2"
    return None

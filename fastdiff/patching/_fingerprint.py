"""The guard: stock code is replaced only where its source is one that the replacement was written for.

``_fingerprints.py`` holds, per function, a hash of its source in every supported Diffusers version. A subclass
with a ``forward`` of its own, a monkeypatched class and an unknown version all differ. The table is made by
``_make_fingerprints.py``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from fastdiff.patching._fingerprints import FINGERPRINTS

#: The Diffusers versions whose sources the table covers: first and last, as (major, minor).
SUPPORTED = ((0, 38), (0, 42))


@functools.cache
def fingerprint(function: Callable[..., Any] | None) -> str:
    """A hash of the function's source without white space; empty if there is no source to read.

    A decorated function has its wrappers' sources in the hash too.
    """
    sources = []
    while function is not None:
        try:
            # Of the code object: getsource of a function looks through its wrappers.
            sources.append(inspect.getsource(function.__code__))
        except (OSError, TypeError, AttributeError):
            return ""
        function = getattr(function, "__wrapped__", None)
    return hashlib.sha256("".join("".join(sources).split()).encode()).hexdigest()[:16]


@functools.cache
def why_not_version() -> str | None:
    """Why the installed Diffusers is outside the supported range, or ``None``."""
    import diffusers

    found = re.match(r"(\d+)\.(\d+)(.*)", diffusers.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if found and SUPPORTED[0] <= version <= SUPPORTED[1] and "dev" not in found[3]:
        return None
    first, last = (".".join(map(str, v)) for v in SUPPORTED)
    return f"Diffusers {diffusers.__version__} is outside the supported versions, {first} to {last}"


def why_not_source(names: Iterable[str]) -> str | None:
    """Why some function, named ``module:qualname``, is not the one the replacement was written for."""
    for name in names:
        if fingerprint(resolve(name)) not in FINGERPRINTS.get(name, {}):
            return f"the source of {name.partition(':')[2]} is not that of a supported Diffusers version"
    return None


def resolve(name: str) -> Any:
    """The object named ``module:qualname``."""
    module, _, qualname = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


#: Class -> name -> itself and its bases.
_bases: dict[type, dict[str, type]] = {}


def base(kind: type, name: str) -> type | None:
    """The class named ``module:qualname`` among ``kind`` and its bases; nothing is imported to look for it."""
    bases = _bases.get(kind)
    if bases is None:
        bases = _bases[kind] = {f"{c.__module__}:{c.__qualname__}": c for c in kind.__mro__}
    return bases.get(name)

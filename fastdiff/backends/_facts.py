"""Facts about the process and its devices, which are asked for once, and where those are kept that were measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Fact(Protocol[P, R]):
    """A function that answers from memory."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def cache_clear(self) -> None:
        """Forget all answers."""


def fact(function: Callable[P, R]) -> Fact[P, R]:
    """Decorator: remembers every answer of ``function``, whose arguments are hashable and positional.

    torch.compile takes the answer for a constant. It cannot trace what asks a driver or reads a file, and would trace
    into a ``functools.cache``. While it traces, the arguments have to be constants: devices, numbers, text.
    """
    cached: Any = functools.cache(function)

    def ask(*args: Any) -> Any:
        return cached(*args)

    ask.__name__, ask.__qualname__, ask.__doc__ = function.__name__, function.__qualname__, function.__doc__
    # What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
    vars(ask).update(cache_clear=cached.cache_clear, _dynamo_marked_constant=True)
    return cast(Fact[P, R], ask)


def cache_folder() -> Path:
    """Where what was measured on this machine is kept: ``FASTDIFF_CACHE``, else the user's cache folder."""
    folder = os.environ.get("FASTDIFF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "fastdiff")
    return Path(folder).expanduser()

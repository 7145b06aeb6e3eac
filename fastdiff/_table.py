"""What the report and the verification print alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text


class Placed(Protocol):
    """A row about a place, as in ``named_modules``."""

    @property
    def path(self) -> str: ...


R = TypeVar("R", bound=Placed)


class Printable:
    """Prints as its table and its summary, with :mod:`rich` or without."""

    def table(self, *, full: bool = False) -> Table:
        raise NotImplementedError

    def summary(self) -> str:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(self.table(), Text(self.summary()))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def grouped(rows: Iterable[R], key: Callable[[R], tuple[Any, ...]], *, full: bool) -> Iterator[tuple[str, list[R]]]:
    """Rows of one part of a model (the first name of their path) with equal keys together, and how to call them.

    Args:
        rows: what is to be a line each, or several together, of a table.
        key: what must be equal besides the part.
        full: keep all rows apart.
    """
    groups: dict[tuple[Any, ...], list[R]] = {}
    for row in rows:
        part = row.path if full else row.path.partition(".")[0]
        groups.setdefault((part, *key(row)), []).append(row)
    for (part, *_), members in groups.items():
        yield members[0].path if len(members) == 1 else f"{part} x{len(members)}", members

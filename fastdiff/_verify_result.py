"""What :func:`fastdiff.verify` found: data, and how it prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fastdiff._table import Printable, grouped


@dataclass(frozen=True)
class Check:
    """One comparison. Errors are relative RMS errors against the fp64 result, as numbers of eager's inputs.

    Attributes:
        path, cls: of the site; of a model its component's name and class.
        error: ours; ``None`` if not compared.
        eager: eager's.
        limit: what ``error`` must not exceed, see :func:`limit_of`.
        difference: relative RMS difference of ours and eager's result.
        note: why not compared, or what else is to be known.
        wrong: whether it fails without numbers.
    """

    path: str
    cls: str
    error: float | None = None
    eager: float | None = None
    limit: float | None = None
    difference: float | None = None
    note: str = ""
    wrong: bool = False

    @property
    def ok(self) -> bool | None:
        """The verdict; ``None`` if not compared."""
        if self.wrong:
            return False
        return None if self.error is None or self.limit is None else self.error <= self.limit


@dataclass(frozen=True)
class Culprit:
    """The first place of a run, in the order of computation, at which the result is wrong.

    Attributes:
        path, cls: of the site.
        function: what replaces the stock method there, as ``module.name``.
        operation: the operation of the site that is wrong by itself; empty if all of them hold.
        op, backend: the fused op behind that operation, and what served it.
        error, limit: of the operation, or else of the site; ``None`` if only the whole model shows it.
        note: how it was found.
    """

    path: str
    cls: str
    function: str
    operation: str = ""
    op: str = ""
    backend: str = ""
    error: float | None = None
    limit: float | None = None
    note: str = ""

    def __str__(self) -> str:
        where = f"first at {self.path} ({self.cls}), in {self.function}"
        if self.operation:
            where += f", {self.operation}: fastdiff.ops.{self.op} by {self.backend}"
        if self.error is not None:
            where += f"; error {self.error:.2e}, limit {self.limit:.2e}"
        return f"{where} ({self.note})" if self.note else where


@dataclass(frozen=True)
class Verification(Printable):
    """The result of :func:`verify`; prints as a table with :mod:`rich`, true if everything holds.

    Attributes:
        name: the class of the object.
        sites: one check per patched site.
        models: one check per patched model, of its whole output.
        latents: relative RMS difference of patched and eager after the last step of the sampler, if one ran.
        culprit: with ``bisect=True``, the first place that does not hold.
    """

    name: str
    sites: tuple[Check, ...]
    models: tuple[Check, ...]
    latents: float | None
    culprit: Culprit | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and at least one site was served by a kernel and compared."""
        failed = any(check.ok is False for check in (*self.sites, *self.models))
        return not failed and any(check.ok for check in self.sites)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        checks = {k: [{**asdict(c), "ok": c.ok} for c in getattr(self, k)] for k in ("sites", "models")}
        return {**asdict(self), **checks, "ok": self.ok}

    def table(self, *, full: bool = False) -> Table:
        """The checks; unless ``full``, of the sites of one class in one part of the model only the worst."""
        table = Table(title=f"fastdiff verify: {self.name}", title_justify="left")
        table.add_column("where", overflow="fold")
        table.add_column("class")
        for name in ("error", "eager's error", "limit", "from eager"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        for where, checks in grouped(self.sites, lambda check: (check.cls, check.note), full=full):
            worst = max(checks, key=badness)
            table.add_row(*_cells(worst, where))
        table.add_section()
        for check in self.models:
            table.add_row(*_cells(check, f"{check.path}, whole".strip(", ")))
        return table

    def summary(self) -> str:
        """The verdict in words."""
        done = [check for check in self.sites if check.ok is not None]
        failed = [check.path for check in (*self.sites, *self.models) if check.ok is False]
        lines = [f"{len(done)} of {len(self.sites)} sites compared, {len(self.models)} models"]
        if self.latents is not None:
            lines.append(f"final latents: relative RMS difference from eager {self.latents:.2e}")
        if failed:
            lines.append(f"FAILED: {', '.join(failed)}")
            lines += [str(self.culprit)] if self.culprit is not None else []
        else:
            lines.append("verified" if self.ok else "FAILED: no site was served by a kernel and compared")
        return "\n".join(lines)


def badness(check: Check) -> float:
    if check.error is None or not check.limit:
        return -1.0
    return check.error / check.limit


def _cells(check: Check, where: str) -> list[Text | str]:
    numbers = [
        "" if n is None else f"{n:.2e}" for n in (check.error, check.eager, check.limit, check.difference)
    ]  # fmt: skip
    verdict = Text(check.note, "yellow")
    if check.ok is not None:
        verdict = Text("ok", "green") if check.ok else Text("FAILED", "red")
        verdict.append(f": {check.note}" if check.note else "")
    return [Text(where), check.cls, *numbers, verdict]

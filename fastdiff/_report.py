"""What runs where: the report of a patched pipeline, model or scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from fastdiff._launches import count_launches
from fastdiff._table import Printable, grouped
from fastdiff.patching import Patch, components_of, follows, patches_of, unwrap
from fastdiff.patching._graphs import GraphStats, ModelGraphs
from fastdiff.patching._site import Site
from fastdiff.patching.families import example_of

#: Instead of a backend's name, for sites that did not run yet and for places left as they were.
NOT_RUN, STOCK = "not run yet", "stock"


@dataclass(frozen=True)
class Row:
    """One place.

    Attributes:
        path: as in ``named_modules``, below the component's name in a pipeline.
        cls: the class of the module or scheduler.
        what: what is computed there, or would be.
        served_by: operation of the site -> backend of the latest call; empty if left stock or not run yet.
        backend: the backends of the latest call, ``"not run yet"`` or ``"stock"``.
        reason: why not, or not only, by a kernel; empty where kernels serve everything.
        kernel: whether fused kernels are what would serve it, and not a layer with a packed weight.
    """

    path: str
    cls: str
    what: str
    served_by: Mapping[str, str]
    backend: str
    reason: str
    kernel: bool = True

    @property
    def fused(self) -> bool:
        """Whether fused kernels, and nothing but fused kernels, served the latest call."""
        return self.kernel and bool(self.served_by) and "eager" not in self.served_by.values()


@dataclass(frozen=True)
class Launches:
    """Operations dispatched in one forward of one component, views excluded."""

    component: str
    before: int
    after: int


@dataclass(frozen=True)
class Part:
    """The coverage of one component: a model of one family, or the scheduler.

    Attributes:
        component: its name in the pipeline; empty for a model by itself.
        cls: its class.
        fused: places that kernels alone served at the latest call; one that ran eager or did not run is none.
        places: all places for fused kernels.
    """

    component: str
    cls: str
    fused: int
    places: int

    @property
    def coverage(self) -> float:
        return self.fused / self.places if self.places else 0.0


@dataclass(frozen=True)
class Graphs:
    """The CUDA graphs of one model, where ``patch`` was asked for them.

    Attributes:
        component: the model's name in the pipeline; empty for a model by itself.
        cls: its class.
        stats: what became of its calls; ``None`` for a model that is not captured at all.
        reason: why nothing is captured in its present state, or empty.
    """

    component: str
    cls: str
    stats: GraphStats | None
    reason: str

    def __str__(self) -> str:
        name = f"CUDA graphs of {self.component or 'the model'} ({self.cls})"
        if self.stats is None:
            return f"{name}: none: {self.reason}"
        stats = self.stats
        lines = [f"{name}: {stats.graphs} held, {stats.captures} captured, {stats.replays} calls replayed"]
        if self.reason:
            lines.append(f"  now none: {self.reason}")
        lines += [f"  {count} calls ordinary: {reason}" for reason, count in stats.ordinary.items()]
        lines += [f"  {count} graphs dropped: {reason}" for reason, count in stats.dropped.items()]
        if stats.evicted:
            lines.append(f"  {stats.evicted} graphs made room for others")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report(Printable):
    """The report of one object; prints as a table with :mod:`rich` (``rich.print(report)``).

    Attributes:
        name: the class of the object.
        rows: every site, and every place that could have been one.
        savings: what is saved besides, as sentences.
        launches: per component, when asked for.
        layouts: models whose memory layout is chosen, ``backend`` being the layout of the latest call.
        parts: the coverage of every component.
        graphs: of every model, if CUDA graphs were asked for.
    """

    name: str
    rows: tuple[Row, ...]
    savings: tuple[str, ...] = ()
    launches: tuple[Launches, ...] = field(default=())
    layouts: tuple[Row, ...] = ()
    parts: tuple[Part, ...] = ()
    graphs: tuple[Graphs, ...] = ()

    @property
    def fused(self) -> int:
        """How many places kernels alone served at the latest call."""
        return sum(row.fused for row in self.rows)

    @property
    def coverage(self) -> float:
        """The share that is fused of the places for fused kernels; one that ran eager or did not run is not."""
        places = sum(row.kernel for row in self.rows)
        return self.fused / places if places else 0.0

    @property
    def backends(self) -> dict[str, int]:
        """How many places each backend, or combination of backends, served."""
        return dict(Counter(row.backend for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "name": self.name,
            "coverage": self.coverage,
            "parts": [{**asdict(part), "coverage": part.coverage} for part in self.parts],
            "backends": self.backends,
            "savings": list(self.savings),
            "rows": [{**asdict(row), "served_by": dict(row.served_by)} for row in self.rows],
            "layouts": [{**asdict(row), "served_by": dict(row.served_by)} for row in self.layouts],
            "launches": [asdict(entry) for entry in self.launches],
            "graphs": [asdict(entry) for entry in self.graphs],
        }

    def table(self, *, full: bool = False) -> Table:
        """The rows as a table; unless ``full``, rows of one part that differ only in their paths are one."""
        table = Table(title=f"fastdiff: {self.name}", title_justify="left")
        for name in ("where", "class", "computes", "by", "reason"):
            table.add_column(name, overflow="fold")
        for where, rows in grouped(self.rows, lambda r: (r.cls, r.what, r.backend, r.reason), full=full):
            row = rows[0]
            style = "green" if row.fused else "" if row.backend == NOT_RUN else "yellow"
            table.add_row(Text(where), row.cls, row.what, Text(row.backend, style), Text(row.reason))
        table.add_section()
        for row in self.layouts:
            style = "" if row.backend in (NOT_RUN, STOCK) else "green"
            table.add_row(Text(row.path), row.cls, row.what, Text(row.backend, style), Text(row.reason))
        return table

    def summary(self) -> str:
        """The totals in one line or a few."""
        places = [row for row in self.rows if row.kernel]
        lines = [f"{self.fused} of {len(places)} places fused ({self.coverage:.0%}): {_parts(places)}"]
        if len(self.parts) > 1:
            lines += [f"  {p.component} ({p.cls}): {p.fused} of {p.places} ({p.coverage:.0%})" for p in self.parts]
        if len(places) < len(self.rows):
            lines.append(f"packed weights: {_parts([row for row in self.rows if not row.kernel])}")
        lines += self.savings
        lines += map(str, self.graphs)
        for entry in self.launches:
            saved = 1 - entry.after / entry.before
            lines.append(
                f"{entry.component}: {entry.before} launches a forward before, {entry.after} after (-{saved:.0%})"
            )
        return "\n".join(lines)


def report(x: Any, *, launches: bool | Mapping[str, Any] = False) -> Report:
    """What fastdiff does in ``x``: per place the kernel and backend of the latest call, or the reason why not.

    Args:
        x: a patched pipeline, model or scheduler.
        launches: also count the operations that a real forward of every patched model dispatches, before and
            after. ``True`` uses small synthetic inputs; for a single model, a mapping is its forward's keyword
            arguments.

    Raises:
        TypeError: if ``x`` is neither a pipeline nor a model or scheduler that fastdiff knows.
        ValueError: if ``x`` is not patched, or ``launches`` is something else.
    """
    if not isinstance(launches, (bool, Mapping)):
        raise ValueError(f"launches is {launches!r}; expected True, False or the keyword arguments of a forward")
    found = patches_of(x)
    if not found:
        raise ValueError(f"this {type(x).__name__} is not patched")
    components = components_of(x)
    rows: list[Row] = []
    layouts: list[Row] = []
    counts: list[Launches] = []
    parts: list[Part] = []
    graphs: list[Graphs] = []
    patches = {id(root): patch for root, patch in found}
    for name, component in ({"": x} if components is None else components).items():
        component = unwrap(component)
        patch, before = patches.get(id(component)), len(rows)
        if patch is not None:
            rows += [_row(name, site) for site in patch.sites]
            rows += [
                Row(_join(name, left.path), left.cls, left.what, {}, STOCK, left.reason, left.kernel)
                for left in patch.left
            ]
            layouts += [_row(name, site) for site in patch.layouts]
            if patch.graphs is not None:
                graphs.append(_graphs(name, patch))
            if launches and isinstance(component, nn.Module):
                inputs = launches if isinstance(launches, Mapping) else None
                counts.append(_launches(name or type(component).__name__, patch, inputs))
        elif isinstance(component, nn.Module):
            rows.append(
                Row(name, type(component).__name__, "", {}, STOCK, "not a model that fastdiff knows, or not patched")
            )
        elif hasattr(component, "set_timesteps"):
            what_next = "the pipeline's next call patches it" if follows(x) else "patch the pipeline again"
            reason = f"set after patching; {what_next}"
            rows.append(Row(name, type(component).__name__, "scheduler step", {}, STOCK, reason))
        places = [row for row in rows[before:] if row.kernel]
        if places:
            parts.append(Part(name, type(component).__name__, sum(row.fused for row in places), len(places)))
    savings = tuple(saving for _, patch in found for saving in patch.savings)
    return Report(type(x).__name__, tuple(rows), savings, tuple(counts), tuple(layouts), tuple(parts), tuple(graphs))


def _row(prefix: str, site: Site) -> Row:
    path, cls = _join(prefix, site.path), type(site.owner).__name__
    if not all(replacement.installed() for replacement in site.replacements):
        reason = "replaced by somebody else since it was patched"
        return Row(path, cls, site.what, {}, STOCK, reason, site.kernel)
    served = {slot: choice.backend for slot, choice in list(site.served.items())}
    if site.declined:
        served["call"] = "eager"
    backend = ", ".join(dict.fromkeys(served.values())) or NOT_RUN
    return Row(path, cls, site.what, served, backend, site.reason, site.kernel)


def _graphs(name: str, patch: Patch) -> Graphs:
    cls = type(patch.root).__name__
    if isinstance(patch.graphs, ModelGraphs):
        stats = patch.graphs.stats()
        return Graphs(name, cls, stats, stats.unavailable)
    return Graphs(name, cls, None, patch.graphs or "")


def _parts(rows: list[Row]) -> str:
    counts = Counter(row.backend for row in rows)
    return ", ".join(f"{n} {backend}" for backend, n in counts.most_common())


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}".strip(".")


def _launches(name: str, patch: Patch, inputs: Mapping[str, Any] | None) -> Launches:
    model = patch.root
    arguments = dict(inputs) if inputs is not None else example_of(model)
    after = count_launches(lambda: model(**arguments))
    with patch.suspended():
        before = count_launches(lambda: model(**arguments))
    return Launches(name, before.total(), after.total())

"""What ``patch`` did to one model or scheduler, and who asked for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fastdiff.patching._graphs import ModelGraphs, graphed_forward, why_no_denoiser
from fastdiff.patching._site import Replacement, Site, site_of

#: Name, in the ``__dict__`` of a patched model or scheduler, of its :class:`Patch`.
PATCH = "_fastdiff_patch"


class Absent:
    """Stands for an attribute that the object did not have."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`fastdiff.patch`.

    Attributes:
        only: patterns of site paths (as in :mod:`fnmatch`); other sites are left alone. Empty: all.
        skip: patterns of site paths to leave alone.
        backend: the only backend that may serve the sites, or ``None`` for the usual order.
        prepack_weights: keep packed copies of the weights, see ``blocks/packed.py``.
        cuda_graphs: capture denoisers, see ``_graphs.py``.
        prefix: of the paths that the patterns are about: the name of a pipeline's component.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    backend: str | None = None
    prepack_weights: bool = False
    cuda_graphs: bool = False
    prefix: str = ""

    def named(self, path: str) -> bool:
        """Whether ``only`` lets a site be patched."""
        path = f"{self.prefix}.{path}".strip(".")
        return not self.only or any(fnmatchcase(path, p) for p in self.only)

    def why_not(self, path: str) -> str | None:
        """Why the options leave a site alone, or ``None``."""
        if not self.named(path):
            return "not among only=..."
        path = f"{self.prefix}.{path}".strip(".")
        if any(fnmatchcase(path, p) for p in self.skip):
            return "excluded by skip=..."
        return None


@dataclass(frozen=True)
class Left:
    """A place that could have been a site and was left alone."""

    path: str
    cls: str
    what: str
    reason: str
    kernel: bool = True


class Claim:
    """Held by whoever asked for patches, a pipeline or the model itself, and by nobody else: it dies with it.

    Attributes:
        patches: those asked for.
        options: of a pipeline, those of the latest :func:`fastdiff.patch`.
        schedulers: of a pipeline, those that it had when it was last looked at.
    """

    def __init__(self) -> None:
        self.patches: weakref.WeakSet[Patch] = weakref.WeakSet()
        self.options = Options()
        self.schedulers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._watch: Replacement | None = None

    def follow(self, pipe: Any, options: Options, progress_bar: Callable[..., Any]) -> None:
        """Let ``progress_bar`` take the place of the pipeline's, to patch with ``options`` the schedulers it gets."""
        from diffusers import SchedulerMixin

        self.options = options
        self.schedulers = weakref.WeakSet(c for c in pipe.components.values() if isinstance(c, SchedulerMixin))
        if self._watch is None:
            watch = Replacement(pipe, "progress_bar", progress_bar)
            self._watch = watch if watch.install() is None else None

    def unfollow(self) -> None:
        """Undo :meth:`follow`."""
        if self._watch is not None:
            self._watch.restore()
            self._watch = None

    def following(self) -> bool:
        """Whether the pipeline's ``progress_bar`` is still the one of :meth:`follow`."""
        return self._watch is not None and self._watch.installed()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "patches": list(self.patches), "schedulers": list(self.schedulers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sets = {name: weakref.WeakSet(state[name]) for name in ("patches", "schedulers")}
        vars(self).update({**state, **sets})


@dataclass(eq=False)
class _Change:
    """A plain attribute set on an object of the model."""

    owner: Any
    name: str
    new: Any
    old: Any = None
    installed: bool = False

    def install(self) -> None:
        if not self.installed:
            self.old = vars(self.owner).get(self.name, Absent)
            self.installed = True
            setattr(self.owner, self.name, self.new)

    def restore(self) -> None:
        if self.installed and vars(self.owner).get(self.name, Absent) is self.new:
            if self.old is Absent:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.old)
        self.installed = False


@dataclass(eq=False)
class Patch:
    """The patch of one model or scheduler, kept in its ``__dict__`` under :data:`PATCH`.

    Attributes:
        root: the model or scheduler.
        sites: what was replaced.
        layouts: whole models that compute in another memory layout; neither checked nor counted as sites.
        left: what was not, with the reasons.
        savings: what else is saved, as sentences: Diffusers' own switches, repeated work done once.
        graphs: the CUDA graphs of the root; where they were asked for and are not possible, the reason.
        own: set when ``patch`` was called on the root itself.
        claims: of all who asked for the patch and are alive, with the options of each, the latest last; the patch
            goes with the last.
    """

    root: Any
    options: Options = field(default_factory=Options)
    sites: list[Site] = field(default_factory=list)
    layouts: list[Site] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    savings: list[str] = field(default_factory=list)
    graphs: ModelGraphs | str | None = None
    own: Claim | None = None
    claims: weakref.WeakKeyDictionary[Claim, Options] = field(default_factory=weakref.WeakKeyDictionary)
    _changes: list[_Change | Replacement] = field(default_factory=list)

    def install(
        self,
        path: str,
        owner: Any,
        what: str,
        *replaced: tuple[Any, str, Callable[..., Any]],
        state: Any = None,
        reference: Callable[..., Any] | None = None,
        layout: bool = False,
        kernel: bool = True,
    ) -> Site | None:
        """Replace methods and keep the site; or note in ``left`` why not and return ``None``.

        Args:
            path: of the owner, as in ``named_modules``; empty for the root.
            owner: the module or scheduler that the site is about.
            what: what is computed there now.
            replaced: (object, method name, module-level function taking the object first).
            state: initial :attr:`Site.state`.
            reference: see :attr:`Site.reference`.
            layout: keep it in ``layouts``.
            kernel: see :attr:`Site.kernel`.
        """
        replacements = [_replacement(*r) for r in replaced]
        site = Site(
            owner, path, what, replacements, self.options.backend, state=state, reference=reference, kernel=kernel
        )  # fmt: skip
        sites = self.layouts if layout else self.sites
        sites.append(site)  # first, so that restore undoes what an interrupt leaves half done
        reason = self.options.why_not(path) or site.install()
        if reason is not None:
            sites.remove(site)
            self.leave(path, owner, what, reason, kernel=kernel and not layout)
            return None
        return site

    def leave(self, path: str, owner: Any, what: str, reason: str, *, kernel: bool = True) -> None:
        """Note a place that stays stock."""
        self.left.append(Left(path, type(owner).__name__, what, reason, kernel))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set a plain attribute; :meth:`restore` puts the old value back unless somebody else changed it."""
        self._changes.append(_Change(owner, name, value))
        self._changes[-1].install()

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> str | None:
        """Replace a method without making it a site; returns why that is impossible."""
        replacement = Replacement(owner, name, function)
        self._changes.append(replacement)
        reason = replacement.install()
        if reason is not None:
            self._changes.remove(replacement)
        return reason

    def capture(self) -> None:
        """Run the root's forward, with all that was installed in it so far, from CUDA graphs where that is possible."""
        reason = why_no_denoiser(self.root)
        if reason is not None:
            self.graphs = reason
            return
        installed = [r for site in (*self.sites, *self.layouts) for r in site.replacements]
        installed += [change for change in self._changes if isinstance(change, Replacement)]
        for replacement in installed:
            if replacement.owner is self.root and replacement.name == "forward":
                self.graphs = ModelGraphs(self.root, replacement.function)
                replacement.wrap(graphed_forward)
                return
        self.graphs = ModelGraphs(self.root, type(self.root).forward)
        self.graphs = self.replace(self.root, "forward", graphed_forward) or self.graphs

    def names_any(self) -> bool:
        """Whether the option ``only`` names any place here."""
        paths = [*(s.path for s in (*self.sites, *self.layouts)), *(left.path for left in self.left)]
        return any(map(self.options.named, paths))

    def restore(self) -> None:
        """Undo everything; the root no longer refers to the patch afterwards. Nothing if another took its place."""
        if patch_of(self.root) is not self:
            return
        for change in reversed(self._changes):
            change.restore()
        for site in reversed([*self.sites, *self.layouts]):
            site.restore()
        vars(self.root).pop(PATCH, None)
        if isinstance(self.graphs, ModelGraphs):
            self.graphs.release()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block the root is stock."""
        self.restore()
        try:
            yield
        finally:
            self.reinstall()

    def reinstall(self) -> None:
        """Undo :meth:`restore`, even one that was interrupted."""
        vars(self.root)[PATCH] = self
        for site in [*self.sites, *self.layouts]:
            site.install()
        for change in self._changes:
            change.install()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "claims": list(self.claims.items())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Claims copied or unpickled with their pipeline live on in it, all others end here.
        vars(self).update(state, claims=weakref.WeakKeyDictionary(state["claims"]))


def _replacement(owner: Any, name: str, function: Callable[..., Any]) -> Replacement:
    """A new one, or that of the site which has it already: an activation may follow several norms."""
    new, other = Replacement(owner, name, function), site_of(owner)
    same = (r for r in (other.replacements if other is not None else ()) if r.owner is owner and r.new == new.new)
    return next(same, new)


def patch_of(root: Any) -> Patch | None:
    """The patch a model or scheduler carries, if any."""
    return getattr(root, "__dict__", {}).get(PATCH)

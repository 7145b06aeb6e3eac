"""A pytest plugin that runs somebody else's tests of Diffusers with fastdiff: ``pytest -p autopatch``.

Every model and scheduler that fastdiff knows is patched when it is created, and every pipeline at its first call.
At the end it prints how many sites there were and what served their calls, so that a run in which nothing was patched
cannot pass for a good one. ``make diffusers-tests DIFFUSERS=/path/to/checkout`` runs Diffusers' own suite with it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autopatch_schedulers import patch_every_scheduler
from autopatch_schedulers import summary as summary_of_schedulers

#: Sites by class of their owner, backends by operation, and what was patched, over all tests.
sites: Counter[str] = Counter()
served: Counter[tuple[str, str]] = Counter()
patched: Counter[str] = Counter()
#: Calls that ran stock, by class of the owner and reason.
declined: Counter[str] = Counter()
#: Classes of pipelines that patch at their first call.
pipelines: set[type] = set()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Not earlier: the suite's conftest chooses the Diffusers that is imported."""
    from diffusers import DiffusionPipeline

    from fastdiff.patching._fingerprint import resolve
    from fastdiff.patching._site import Site
    from fastdiff.patching.families import families

    for family in families():
        model = resolve(family.model)
        model.__init__ = _patching_init(model.__init__)
    register = DiffusionPipeline.register_modules

    @functools.wraps(register)
    def registering(self: Any, **modules: Any) -> None:  # every pipeline calls it when it is created
        for cls in type(self).__mro__:
            if "__call__" in vars(cls) and cls not in pipelines:
                cls.__call__ = _patching_call(cls.__call__)
                pipelines.add(cls)
        register(self, **modules)

    DiffusionPipeline.register_modules = registering

    patch_every_scheduler()
    note = Site.note

    @functools.wraps(note)
    def counting(self: Site, slot: str, choice: Any) -> None:
        served[(f"{type(self.owner).__name__}.{slot}", choice.backend)] += 1
        note(self, slot, choice)

    Site.note = counting  # type: ignore[method-assign]
    stock = Site.stock

    @functools.wraps(stock)
    def declining(self: Site, reason: str, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            declined[f"{type(self.owner).__name__} ({reason})"] += 1
        return stock(self, reason, *args, **kwargs)

    Site.stock = declining  # type: ignore[method-assign]


def _patching_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def patching_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _patch(self)

    return patching_init


def _patching_call(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def patching_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_fastdiff_claim" not in vars(self):
            _patch(self)
        return call(self, *args, **kwargs)

    return patching_call


def _patch(x: Any) -> None:
    import fastdiff
    from fastdiff.patching import patches_of

    fastdiff.patch(x)
    patched[type(x).__name__] += 1
    for _, found in patches_of(x):
        sites.update(type(site.owner).__name__ for site in found.sites)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("fastdiff")
    terminalreporter.write_line(f"patched: {_counts(patched)}")
    terminalreporter.write_line(f"sites: {_counts(sites)}")
    for backend in sorted({backend for _, backend in served}):
        operations = Counter({slot: n for (slot, by), n in served.items() if by == backend})
        terminalreporter.write_line(f"served by {backend}: {sum(operations.values())} calls: {_counts(operations)}")
    terminalreporter.write_line(f"declined: {sum(declined.values())} calls: {_counts(declined)}")
    for line in summary_of_schedulers():
        terminalreporter.write_line(line)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counter.most_common()) or "nothing"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and not patched:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

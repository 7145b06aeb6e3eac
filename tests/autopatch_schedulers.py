"""A pytest plugin that runs somebody else's tests of Diffusers with patched schedulers.

``PYTHONPATH=tests python -m pytest -p autopatch_schedulers /path/to/diffusers/tests/schedulers`` patches every
scheduler when it is created, and prints at the end how many steps ran fused and why the others did not. Another plugin
calls :func:`patch_every_scheduler` and :func:`summary` itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

#: Schedulers patched by class, fused steps by class, and stock steps by class and reason.
patched: Counter[str] = Counter()
fused: Counter[str] = Counter()
stock: Counter[tuple[str, str]] = Counter()


def patch_every_scheduler() -> None:
    """From now on a scheduler of Diffusers is patched as soon as it is created, and its steps are counted."""
    import diffusers.schedulers

    from fastdiff.schedulers.stepper import Stepper

    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin:
            cls.__init__ = _patching_init(cls.__init__)

    run = Stepper._fused

    @functools.wraps(run)
    def counting(self: Stepper, *args: Any) -> Any:
        result, name = run(self, *args), type(self.scheduler).__name__
        if type(result) is str:
            stock[name, result] += 1
        else:
            fused[name] += 1
        return result

    Stepper._fused = counting  # type: ignore[method-assign]


def _patching_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def patching_init(self: Any, *args: Any, **kwargs: Any) -> None:
        import fastdiff
        from fastdiff.patching import patch_of

        init(self, *args, **kwargs)
        fastdiff.patch(self)
        found = patch_of(self)
        assert found is not None
        name = type(self).__name__
        patched[name] += bool(found.sites)
        if not found.sites:
            stock[name, f"not patched: {found.left[0].reason}"] += 0

    return patching_init


def summary() -> Iterator[str]:
    """Lines that say what was patched, and what ran."""
    yield f"schedulers patched: {sum(patched.values())} of {sum(n > 0 for n in patched.values())} classes"
    yield f"steps fused: {sum(fused.values())}, of classes {', '.join(sorted(fused))}"
    yield f"steps of patched schedulers that ran stock: {sum(stock.values())}"
    for (name, reason), count in sorted(stock.items()):
        yield f"  {count or ''} {name}: {reason}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Not earlier: the suite's conftest chooses the Diffusers that is imported."""
    patch_every_scheduler()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("fastdiff")
    for line in summary():
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and not fused:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

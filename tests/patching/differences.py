"""What there is to test with another Diffusers than the newest, where everything was tested already.

Most of the functions that the replacements rely on have the same source in both; the table of fingerprints says which
do not. Each of these has one model here that is tested in full. All other models keep what is marked ``smoke``.
"""

from __future__ import annotations

import pytest
from models import Case
from torch import nn
from transformer_models import TRANSFORMERS, Transformer
from zoo import ALL_CASES

from fastdiff.patching._fingerprint import base, fingerprint, resolve
from fastdiff.patching._fingerprints import FINGERPRINTS
from fastdiff.patching.families import family_of
from fastdiff.schedulers.guidance import SOURCES

NEWEST = max(
    (version for known in FINGERPRINTS.values() for versions in known.values() for version in versions.split()),
    key=lambda version: tuple(map(int, version.split("."))),
)


def differing() -> set[str]:
    """The functions of models, ``module:qualname``, with another source here than in the newest Diffusers."""
    found = set()
    for source in FINGERPRINTS.keys() - SOURCES:
        try:
            here = fingerprint(resolve(source))
        except (ImportError, AttributeError):  # this Diffusers does not have it
            continue
        if NEWEST not in FINGERPRINTS[source].get(here, "").split():
            found.add(source)
    return found


def relied_on(model: nn.Module) -> set[str]:
    """The functions of the table that the replacements in a model rely on."""
    family, kinds = family_of(model), {type(module) for module in model.modules()}
    assert family is not None
    rows = [block.all_sources() for block in family.blocks if any(base(kind, block.cls) for kind in kinds)]
    rows += [switch.sources for switch in family.switches]
    return {source for row in rows for source in row if not _of_another(kinds, source)}


def _of_another(kinds: set[type], source: str) -> bool:
    """Whether it is a method of a module that is none of these."""
    owner = resolve(source.rpartition(".")[0]) if "." in source.partition(":")[2] else None
    return isinstance(owner, type) and issubclass(owner, nn.Module) and not any(issubclass(k, owner) for k in kinds)


def in_full() -> dict[str, set[str]]:
    """Name of a model to test in full -> the differing functions that it, and no model before it, relies on."""
    left, chosen = differing(), {}
    for row in (*ALL_CASES, *TRANSFORMERS):
        if left and (found := left & relied_on(row.build())):
            chosen[row.name] = found
            left -= found
    return chosen


def skip_repeated(items: list[pytest.Item]) -> None:
    """Mark the tests of single models that would show nothing new."""
    full = in_full()
    others = ", ".join(full)
    reason = f"stock code as in Diffusers {NEWEST}, or the same as in {others} (FASTDIFF_TEST_ALL=1 runs it)"
    for item in items:
        values = item.callspec.params.values() if isinstance(item, pytest.Function) and "callspec" in vars(item) else ()
        names = {value.name for value in values if isinstance(value, (Case, Transformer))}
        if names and not names & full.keys() and item.get_closest_marker("smoke") is None:
            item.add_marker(pytest.mark.skip(reason=reason))

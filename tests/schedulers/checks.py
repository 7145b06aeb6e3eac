"""What the tests of a patched scheduler share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trajectory import AVAILABLE, SHAPE, Walk, error, run

from fastdiff import _extension

DPM = "DPMSolverMultistepScheduler"
CORE = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", DPM)
every_sampler = pytest.mark.parametrize("name", AVAILABLE)


def compare(stock: Any, patched: Any, **options: Any) -> None:
    """A trajectory of each in fp64: equal, and every step fused."""
    theirs, ours = run(stock, torch.float64, **options), run(patched, torch.float64, **options)
    assert len(ours) == len(theirs)
    assert {record["site"] for record in ours} == {"eager"}
    assert max(error(a["prev_sample"], b["prev_sample"]) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def count_bound(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each step, from now on, that a CPU runs by its addresses, without torch's dispatcher."""
    calls: list[Any] = []
    bind = _extension.module.bind_scheduler_step  # type: ignore[union-attr]

    def counted(*arguments: Any) -> Any:
        step = bind(*arguments)
        return lambda *addresses: calls.append(addresses) or step(*addresses)

    monkeypatch.setattr(_extension.module, "bind_scheduler_step", counted)
    return calls


def one_step(scheduler: Any, dtype: torch.dtype = torch.float32, index: int = 0, **step: Any) -> Any:
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Walk(scheduler, **step).step(index, sample.flip(0), sample)

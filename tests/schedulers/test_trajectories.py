"""Full trajectories against the stock scheduler, in every dtype and under every option; ``sweep.py`` runs longer ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from configurations import CONFIGURATIONS, Configuration, label
from torch import Tensor
from trajectory import error, make, run, tensors

from fastdiff import _extension

every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=label)


def assert_same_books(
    ours: dict[str, Any], stock: dict[str, Any], tolerance: float, dtypes: bool = True
) -> None:
    """One step's result and the attributes after it: equal but for rounding; types, and dtypes if asked, exactly."""
    assert ours["type"] is stock["type"]
    a, b = tensors(ours), tensors(stock)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype or not dtypes, name
        assert a[name].stride() == b[name].stride(), name
        assert error(a[name], b[name]) <= tolerance, name
    assert ours["attributes"].keys() == stock["attributes"].keys()
    for name, value in stock["attributes"].items():
        mine = ours["attributes"][name]
        assert type(mine) is type(value), name
        if isinstance(value, list):
            assert [type(v) for v in mine] == [type(v) for v in value], name
        elif isinstance(value, Tensor):
            assert mine.shape == value.shape, name
            assert mine.dtype == value.dtype or not dtypes, name
        elif not isinstance(value, (dict, np.ndarray)):
            assert mine == value, name


@every_configuration
def test_fp64(configuration: Configuration) -> None:
    assert_fp64(configuration)


def assert_fp64(configuration: Configuration) -> None:
    """Within 1e-12 of the stock step kept from rounding to fp32, and 1e-6 of the stock step as it is.

    A sampler that keeps fp32 tensors between steps rounds there itself. DEIS keeps (x - a (x - s m) / a) / s, which is
    m but for what x takes from s m: eps |x| / (s |m|), at the last exponential sigma 2.2e-16 * 164 / 0.029 = 1.2e-12.
    Stock loses that in its subtraction, ours in the coefficient of x that it reads off stock.
    """
    name, config, schedule, step = configuration
    options: dict[str, Any] = {"schedule": schedule, "step": step}
    narrow = 2.4e-12 if name == "DEISMultistepScheduler" and config.get("use_exponential_sigmas") else 1e-12
    ours = run(make(name, True, **config), torch.float64, **options)
    rounds = any(t.dtype is not torch.float64 for record in ours for t in tensors(record).values())
    for wide, tolerance in ((None, 1e-6), (ours[-1]["drawn"], 1e-6 if rounds else narrow)):
        reference = run(make(name, **config), torch.float64, wide=wide, inputs_dtype=torch.float64, **options)
        assert len(ours) == len(reference)
        for mine, theirs in zip(ours, reference, strict=True):
            assert mine["site"] == "eager"  # fp64 has no kernel; it must not be the stock step
            assert_same_books(mine, theirs, tolerance, dtypes=wide is None or not rounds)
        assert torch.equal(ours[-1]["generator"], reference[-1]["generator"])


@every_configuration
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_no_further_from_fp64_than_stock(configuration: Configuration, half: bool) -> None:
    """In fp32 and in one of the half precisions, taken in turns."""
    halves = torch.bfloat16, torch.float16
    dtype = halves[CONFIGURATIONS.index(configuration) % 2] if half else torch.float32
    if dtype is torch.float32 and (reason := _extension.why_not_cpu()) is not None:
        pytest.skip(reason)
    assert_no_further_from_fp64_than_stock(configuration, dtype)


def assert_no_further_from_fp64_than_stock(configuration: Configuration, dtype: torch.dtype) -> None:
    """Over ten draws and all steps, ours is at most 1.05 times as far from fp64 as stock.

    Stock rounds several times, the kernel once. The reference that serves fp32 without kernels has its own rule.
    """
    name, config, schedule, step = configuration
    options: dict[str, Any] = {"schedule": schedule, "step": step}
    stock, patched, reference = make(name, **config), make(name, True, **config), make(name, **config)
    pools: dict[str, list[float]] = {}
    theirs, ours = run(stock, dtype, **options), run(patched, dtype, **options)
    exact = run(reference, torch.float64, wide=theirs[-1]["drawn"], inputs_dtype=dtype, **options)
    assert torch.equal(ours[-1]["generator"], theirs[-1]["generator"])
    for mine, their, x in zip(ours, theirs, exact, strict=True):
        assert not mine["site"].startswith("stock"), mine["site"]
        assert_same_books(mine, their, float("inf"))  # the pools judge the numbers
        a, b = tensors(mine), tensors(their)
        for key, value in tensors(x).items():
            pool = pools.setdefault(key, [0.0, 0.0])
            # Relative per step, or a trajectory's first samples drown the last.
            pool[0] += error(a[key], value) ** 2
            pool[1] += error(b[key], value) ** 2
    for key, (mine_, theirs_) in pools.items():
        assert mine_**0.5 <= 1.05 * theirs_**0.5, (key, (mine_ / theirs_) ** 0.5)

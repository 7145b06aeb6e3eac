"""The sampler's step as one kernel.

:func:`install` replaces ``step`` on one scheduler object. The coefficients of every step come from the
scheduler itself (:mod:`~fastdiff.schedulers.probe`), once per configuration; a step is then one
:func:`fastdiff.ops.scheduler_step` with host scalars and no read from the device. What a step returns, the
attributes it leaves, the noise it draws and the errors it raises are the stock step's. What is not such a map
(thresholding, learned variance, a needed gradient, ...) runs the stock step, and the site says why.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from fastdiff.patching._fingerprint import why_not_version
from fastdiff.patching._patch import Patch
from fastdiff.patching._site import SITE, Site
from fastdiff.schedulers.samplers import SAMPLERS, unsupported
from fastdiff.schedulers.stepper import REPLACED, Stepper

__all__ = ["SAMPLERS", "install", "why_not"]


def install(patch: Patch) -> None:
    """Replace the step of the scheduler that ``patch`` is of, or note why not."""
    scheduler = patch.root
    cls = type(scheduler)
    reason = why_not_version() or why_not(scheduler)
    if reason is not None:
        patch.leave("", scheduler, "scheduler step", reason)
        return
    site = patch.install(
        "", scheduler, "scheduler step",
        (scheduler, "step", step), (scheduler, "set_timesteps", set_timesteps),
        state=Stepper(scheduler, SAMPLERS[cls.__name__]),
    )
    if site is not None:
        for name in REPLACED:  # pipelines look at these signatures for eta, generator, timesteps and sigmas
            signature = inspect.signature(getattr(cls, name))
            parameters = list(signature.parameters.values())[1:]
            vars(scheduler)[name].__signature__ = signature.replace(parameters=parameters)


def why_not(scheduler: Any) -> str | None:
    """Why the step of ``scheduler`` is left stock, or ``None``.

    The probe reads what the step computes, so no fingerprint of its source is needed; but it has to be
    Diffusers' own, since a wrapper may do things besides stepping.
    """
    import diffusers

    cls = type(scheduler)
    if getattr(diffusers, cls.__name__, None) is not cls:
        return f"{cls.__name__} is not a class of Diffusers"
    if cls.__name__ not in SAMPLERS:
        return f"no fused step for {cls.__name__}"
    code = getattr(vars(cls).get("step"), "__code__", None)
    if code is None or code.co_filename != sys.modules[cls.__module__].__file__:
        return f"{cls.__name__}.step is not the one of Diffusers"
    return unsupported(scheduler)


def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``step`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    return site.state.step(site, args, kwargs)


def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """In place of ``set_timesteps`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    site.state.set_timesteps(*args, **kwargs)

"""The sampler's step as one kernel.

:func:`install` replaces ``step`` on one scheduler object. The coefficients of every step come from the
scheduler itself (:mod:`~fastdiff.schedulers.probe`), once per configuration; a step is then one
:func:`fastdiff.ops.scheduler_step` with host scalars and no read from the device. What a step returns, the
attributes it leaves, the noise it draws and the errors it raises are the stock step's. What is not such a map
(thresholding, learned variance, a needed gradient, ...) runs the stock step, and the site says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fastdiff.patching._fingerprint import why_not_version
from fastdiff.patching._patch import Patch
from fastdiff.patching._site import SITE, Site, packed
from fastdiff.schedulers import guidance
from fastdiff.schedulers.guidance import is_guider
from fastdiff.schedulers.samplers import SAMPLERS, STOCK, unsupported
from fastdiff.schedulers.stepper import Stepper

__all__ = ["SAMPLERS", "install", "why_not"]


def install(patch: Patch) -> None:
    """Replace the step of the scheduler that ``patch`` is of, or the guidance of the guider, or note why not."""
    if is_guider(patch.root):
        guidance.install(patch)
        return
    scheduler = patch.root
    cls = type(scheduler)
    reason = why_not_version() or why_not(scheduler)
    if reason is not None:
        patch.leave("", scheduler, "scheduler step", reason)
        return
    sampler = SAMPLERS[cls.__name__]
    replaced: dict[str, Callable[..., Any]] = {sampler.method: step, "set_timesteps": set_timesteps}
    if "_init_step_index" in _names_in(cls, "scale_model_input"):
        replaced["scale_model_input"] = scale_model_input
    for name, function in (("add_noise", add_noise), ("get_velocity", get_velocity)):
        if "alphas_cumprod" in _names_in(cls, name):
            replaced[name] = function
    patch.install(
        "", scheduler, "scheduler step", *[(scheduler, name, function) for name, function in replaced.items()],
        state=Stepper(scheduler, sampler),
    )
    for name, reason in sampler.others:
        patch.leave("", scheduler, name, reason)


def _names_in(cls: type, method: str) -> tuple[str, ...]:
    """The names of globals and attributes in the code of a method, if there is such a method."""
    function = getattr(cls, method, None)
    return () if function is None else function.__code__.co_names


def why_not(scheduler: Any) -> str | None:
    """Why the step of ``scheduler`` is left stock, or ``None``.

    The probe reads what the step computes, so no fingerprint of its source is needed; but it has to be
    Diffusers' own, since a wrapper may do things besides stepping.
    """
    cls = type(scheduler)
    module = sys.modules[cls.__module__]
    if not cls.__module__.startswith("diffusers.schedulers.") or getattr(module, cls.__name__, None) is not cls:
        return f"{cls.__name__} is not a class of Diffusers"
    if cls.__name__ not in SAMPLERS:
        return f"no fused step for {cls.__name__}: {STOCK.get(cls.__name__, 'it is not known')}"
    method = SAMPLERS[cls.__name__].method
    code = getattr(vars(cls).get(method), "__code__", None)
    if code is None or code.co_filename != module.__file__:
        return f"{cls.__name__}.{method} is not the one of Diffusers"
    return unsupported(scheduler)


@packed
def step(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of ``step`` of a patched scheduler."""
    site: Site = scheduler.__dict__[SITE]
    return site.state.step(site, args, kwargs)


@packed
def set_timesteps(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In place of ``set_timesteps`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    site.state.set_timesteps(*args, **kwargs)


@packed
def scale_model_input(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of ``scale_model_input`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    return site.state.scale_model_input(*args, **kwargs)


@packed
def add_noise(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of ``add_noise`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    return site.state.with_tables("add_noise", args, kwargs)


@packed
def get_velocity(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In place of ``get_velocity`` of a patched scheduler."""
    site: Site = vars(scheduler)[SITE]
    return site.state.with_tables("get_velocity", args, kwargs)

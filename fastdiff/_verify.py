"""Proof on the user's own pipeline: every site against eager and fp64, the denoiser, and the final latents.

Sites are checked inside of a real run, one at a time: at a site's first call its stock code runs on the same
inputs, as it is and on an fp64 copy of this one module. So memory grows by one site, not by one model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._nested import clone_generators, relative, tensors
from fastdiff._verify_checks import SiteChecks, Whole
from fastdiff._verify_result import Verification
from fastdiff.patching import components_of, patched, patches_of, unwrap
from fastdiff.patching._patch import Patch
from fastdiff.patching.families import Family, example_of, family_of


def verify(
    x: Any, *, seed: int = 0, tolerance: float | None = None, bisect: bool = False, **call: Any
) -> Verification:
    """Compare what the patched ``x`` computes with eager and with fp64, during a real run.

    Args:
        x: a pipeline, model or scheduler. If it is not patched, it is while this runs.
        seed: of the run; ignored where ``call`` brings a generator.
        tolerance: the largest relative RMS error against fp64 that a site or model may have; by default what follows
            from eager's own error, see :func:`fastdiff._nested.limit_of`.
        bisect: if something fails, find the first site of the run that is wrong, and the operation and function
            behind it; :attr:`Verification.culprit` of the result.
        **call: arguments of the pipeline or the model. Without any, every patched model runs on small synthetic
            inputs.

    Raises:
        TypeError: if ``x`` is none of these.
        ValueError: if there is nothing to run: a scheduler by itself, or a pipeline without patched models.
    """
    if not patches_of(x):
        with patched(x):
            return verify(x, seed=seed, tolerance=tolerance, bisect=bisect, **call)
    components = components_of(x)
    named = {"": x} if components is None else components
    patches = {
        name: patch for name, c in named.items() for root, patch in patches_of(x)
        if root is unwrap(c)
    }  # fmt: skip
    models = {name: patch for name, patch in patches.items() if isinstance(patch.root, nn.Module)}
    if not models:
        raise ValueError(f"this {type(x).__name__} has no patched model that verify could run")
    if not call:
        run: Callable[[], Any] = functools.partial(_run_examples, [patch.root for patch in models.values()])
    elif components is None:
        run = functools.partial(x, **call)
    else:
        run = functools.partial(_run_pipeline, x, call, seed)

    wholes = {
        f"{name}.{part}".strip("."): Whole(patch, patch.root.get_submodule(part), tolerance)
        for name, patch in models.items()
        for part in _family(patch.root).forwards
    }
    sites = SiteChecks(patches, tolerance, bisect=bisect)
    with torch.no_grad():
        with contextlib.ExitStack() as stack:
            stack.enter_context(_seeded(seed))
            stack.enter_context(sites)
            for whole in wholes.values():
                stack.enter_context(whole)
            ours = stack.enter_context(_last_sample(patches))
            run()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_seeded(seed))
            for patch in patches.values():
                stack.enter_context(patch.suspended())
            eager = stack.enter_context(_last_sample(patches))
            if ours:
                run()
        checks = tuple(whole.check(path) for path, whole in wholes.items())
        culprit = sites.culprit
        if bisect and culprit is None:
            order = [(path, sites.sites[path]) for path in sites.checks]
            wrong = (c.path for c in checks if c.ok is False)
            culprit = next((found for path in wrong if (found := wholes[path].first_wrong(path, order))), None)
    latents = relative(ours[0], eager[0].double()) if ours and eager else None
    return Verification(type(x).__name__, sites.results(), checks, latents, culprit)


@contextlib.contextmanager
def _last_sample(patches: dict[str, Patch]) -> Iterator[list[Tensor]]:
    """Within the block, the list holds what the scheduler's latest step returned."""
    kept: list[Tensor] = []
    sites = [site for p in patches.values() if not isinstance(p.root, nn.Module) for site in p.sites]
    if not sites:
        yield kept
        return
    scheduler, method = sites[0].owner, sites[0].replacements[0].name
    own = vars(scheduler).get(method)
    step = getattr(scheduler, method)

    @functools.wraps(step)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        kept[:] = tensors(result)[:1]
        return result

    vars(scheduler)[method] = keeping
    try:
        yield kept
    finally:
        if own is None:
            del vars(scheduler)[method]
        else:
            vars(scheduler)[method] = own


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _run_examples(models: list[Any]) -> None:
    for model in models:
        if len(models) == 1 or _family(model).example is not None:
            model(**example_of(model))


def _run_pipeline(pipe: Any, call: dict[str, Any], seed: int) -> None:
    call = clone_generators(call)
    if "generator" in inspect.signature(pipe.__call__).parameters:
        call.setdefault("generator", torch.Generator().manual_seed(seed))
    pipe(**call)


def _family(model: Any) -> Family:
    family = family_of(model)
    assert family is not None
    return family

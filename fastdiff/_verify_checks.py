"""How :func:`fastdiff.verify` compares: a site, an operation of a site, or a whole model, with eager and with fp64."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastdiff._nested import clone_generators, limit_of, relative, tensors, to_fp64
from fastdiff._verify_result import Check, Culprit, badness
from fastdiff.ops._library import FusedOp
from fastdiff.patching._patch import PATCH, Patch
from fastdiff.patching._site import SITE, Site, name_of, site_of


class SiteChecks:
    """Within the context, the first call of every module's site is checked, and every step of a scheduler.

    Attributes:
        checks: by path, in the order in which the calls ended: a site's after those of the sites within it.
        culprit: with ``bisect``, what is behind the first failure.
    """

    def __init__(self, patches: dict[str, Patch], tolerance: float | None, *, bisect: bool) -> None:
        self.tolerance = tolerance
        self.bisect = bisect
        self.checks: dict[str, Check] = {}
        self.culprit: Culprit | None = None
        self.sites = {f"{name}.{site.path}".strip("."): site for name, patch in patches.items() for site in patch.sites}

    def __enter__(self) -> SiteChecks:
        self.originals: dict[str, Callable[..., Any]] = {}
        for path, site in self.sites.items():
            check = self._module if isinstance(site.owner, nn.Module) else self._step
            first = site.replacements[0]
            new = functools.partial(check, path, site)
            functools.update_wrapper(new, first.new)
            if not first.installed():
                note = "replaced by somebody else since it was patched"
                self.checks[path] = Check(path, type(site.owner).__name__, note=note)
            self.originals[path] = first.exchange(new)
        return self

    def __exit__(self, *exc: Any) -> None:
        for path in list(self.originals):
            self._done(path)

    def results(self) -> tuple[Check, ...]:
        return tuple(
            self.checks.get(path, Check(path, type(site.owner).__name__, note="not reached"))
            for path, site in self.sites.items()
        )

    def _done(self, path: str) -> Callable[..., Any]:
        original = self.originals.pop(path)
        self.sites[path].replacements[0].exchange(original)
        return original

    def _module(self, path: str, site: Site, *args: Any, **kwargs: Any) -> Any:
        ours = self._done(path)(*args, **kwargs)
        module = site.owner
        reason = _why_eager(site)
        if reason is not None:
            self.checks[path] = Check(path, type(module).__name__, note=f"ran eager: {reason}")
            return ours
        stock = site.reference or getattr(type(module), site.replacements[0].name)
        check = against_stock(path, module, stock, args, kwargs, ours, stock_inside(module), self.tolerance)[0]
        self.checks[path] = check
        if self.bisect and self.culprit is None and check.ok is False:
            self.culprit = self._locate(check, site, args, kwargs)
        return ours

    def _step(self, path: str, site: Site, *args: Any, **kwargs: Any) -> Any:
        """Every step is compared, and the worst kept: a sampler's order grows over its first steps."""
        drawn: list[torch.dtype] = []
        eager = _step_of_copy(site, args, kwargs, drawn, exact=False)
        cls, failure, exact = type(site.owner).__name__, "", None
        try:
            exact = _step_of_copy(site, args, kwargs, drawn, exact=True)
        except Exception as error:
            failure = _no_fp64(error)
        ours = self.originals[path](*args, **kwargs)
        reason = _why_eager(site)
        if reason is not None or failure:
            check = Check(path, cls, note=f"ran eager: {reason}" if reason is not None else failure)
        else:
            check = compare(path, cls, ours, eager, exact, self.tolerance)
        self.checks[path] = max(self.checks.get(path, check), check, key=badness)
        if self.bisect and self.culprit is None and check.ok is False:
            self.culprit = culprit_at(site, check, function=self.originals[path])
        return ours

    def _locate(self, check: Check, site: Site, args: Any, kwargs: Any) -> Culprit:
        """Repeat a site's call that failed, each of its operations checked by itself."""
        found: list[Culprit] = []
        serve = Site.serve

        def checking(self_: Site, slot: str, op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = serve(self_, slot, op, *args, **kwargs)
            if self_ is site:
                eager, exact = op.eager(*args, **kwargs), op.eager(*to_fp64(args), **to_fp64(kwargs))
                single = compare(check.path, check.cls, result, eager, exact, self.tolerance)
                if single.ok is False:
                    found.append(culprit_at(site, single, operation=slot, op=op.name))
            return result

        with mock.patch.object(Site, "serve", checking), torch.random.fork_rng():
            site.replacements[0].new(*args, **kwargs)
        return found[0] if found else culprit_at(site, check, "its operations hold one by one")


def culprit_at(
    site: Site, check: Check, note: str = "", *, operation: str = "", op: str = "", function: Any = None
) -> Culprit:
    """What is behind a check that failed at ``site``, whose first method is replaced by ``function``."""
    served = [site.served[operation]] if operation else list(site.served.values())
    backends = ", ".join(dict.fromkeys(choice.backend for choice in served))
    name = name_of(function or site.replacements[0].new)
    return Culprit(check.path, check.cls, name, operation, op, backends, check.error, check.limit, note)


class Whole:
    """Within the context, keeps the first call of one module; then compares it as a whole."""

    def __init__(self, patch: Patch, module: nn.Module, tolerance: float | None) -> None:
        self.patch = patch
        self.tolerance = tolerance
        self.module = module
        self.call: tuple[Any, Any, Any] | None = None
        self.results: tuple[Any, Any] | None = None

    def __enter__(self) -> Whole:
        self.handle = self.module.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()

    def check(self, path: str) -> Check:
        """The verdict; the eager and fp64 results are kept for :meth:`first_wrong`."""
        if self.call is None:
            return Check(path, type(self.module).__name__, note="not reached")
        args, kwargs, ours = self.call
        stock = type(self.module).forward
        check, self.results = against_stock(
            path, self.module, stock, args, kwargs, ours, self.patch.suspended(), self.tolerance
        )
        return check

    def first_wrong(self, path: str, sites: list[tuple[str, Site]]) -> Culprit | None:
        """Of ``sites``, in the order of computation, the first one with which the whole fails; by bisection.

        Serves where every site holds by itself, as when one spoils what another one has computed.
        """
        assert self.call is not None and self.results is not None
        args, kwargs, _ = self.call
        sites = [(p, s) for p, s in sites if s in self.patch.sites]

        def check(count: int) -> Check:
            """With the first ``count`` sites patched."""
            with without([site for _, site in sites[count:]]):
                result = self.module(*args, **kwargs)
            assert self.results is not None
            return compare(path, type(self.module).__name__, result, *self.results, self.tolerance)

        if not sites or check(0).ok is False or check(len(sites)).ok is not False:
            return None  # it comes from elsewhere, or does not come again
        good, bad = 0, len(sites)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if check(middle).ok is False else (middle, bad)
        where, site = sites[bad - 1]
        whole = check(bad)
        found = Check(where, type(site.owner).__name__, whole.error, whole.eager, whole.limit)
        return culprit_at(site, found, f"it holds by itself, but with it {path or 'the model'} as a whole does not")

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if self.call is None:
            self.call = (args, kwargs, result)


def against_stock(
    path: str,
    module: nn.Module,
    stock: Callable[..., Any],
    args: Any,
    kwargs: Any,
    ours: Any,
    as_stock: contextlib.AbstractContextManager[None],
    tolerance: float | None,
) -> tuple[Check, tuple[Any, Any] | None]:
    """Compare ``ours`` with ``stock`` on the module and on an fp64 copy of it, both within ``as_stock``.

    Returns:
        The check, and if there was one the eager and the fp64 result.
    """
    cls = type(module).__name__
    parameters = list(module.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return Check(path, cls, note="its weights are offloaded"), None
    free = _free_bytes(parameters[0].device if parameters else torch.device("cpu"))
    if free is not None and 12 * sum(p.numel() for p in parameters) > free:  # the copy, and activations
        return Check(path, cls, note="an fp64 copy does not fit in memory"), None
    with as_stock:
        eager = stock(module, *args, **kwargs)
        try:
            twin = copy.deepcopy(module).double()
        except Exception as error:  # hooks and wrappers of any kind
            return Check(path, cls, note=f"it cannot be copied: {type(error).__name__}: {error}"), None
        try:
            exact = stock(twin, *to_fp64(args), **to_fp64(kwargs))
        except Exception as error:  # a module may insist on its dtype
            return Check(path, cls, note=_no_fp64(error)), None
    return compare(path, cls, ours, eager, exact, tolerance), (eager, exact)


def compare(path: str, cls: str, ours: Any, eager: Any, exact: Any, tolerance: float | None) -> Check:
    """One check, over all floating-point tensors of a result; each counts relative to its own size."""
    sums = dict.fromkeys(("ours", "eager", "rounded", "difference"), 0.0)
    count, dtype, note = 0, torch.float32, ""
    for o, e, x in zip(tensors(ours), tensors(eager), tensors(exact), strict=True):
        x = x.double()
        if (~torch.isfinite(o) & torch.isfinite(e)).any():
            sums["ours"] = float("inf")
        elif (torch.isnan(o) != torch.isnan(e)).any() or (torch.isinf(o) != torch.isinf(e)).any():
            note = "NaN or Inf at other places than in eager"
        seen = torch.isfinite(o) & torch.isfinite(e) & torch.isfinite(x)
        o, e, x, dtype = o[seen], e[seen], x[seen], o.dtype
        n = o.numel()
        for name, value, target in (
            ("ours", o, x), ("eager", e, x), ("rounded", x.to(dtype), x), ("difference", o, e.double()),
        ):  # fmt: skip
            sums[name] += n * relative(value, target) ** 2
        count += n
    if count == 0 and sums["ours"] == 0:
        return Check(path, cls, note="nothing finite to compare", wrong=True)
    error, of_eager, rounded, difference = ((s / max(count, 1)) ** 0.5 for s in sums.values())
    limit = limit_of(of_eager, rounded, count, dtype) if tolerance is None else tolerance
    return Check(path, cls, error, of_eager, limit, difference, note)


def _no_fp64(error: Exception) -> str:
    return f"no fp64 result: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _why_eager(site: Site) -> str | None:
    """Why no kernel had a part in the site's latest call, or ``None``."""
    if site.declined or all(choice.backend == "eager" for choice in site.served.values()):
        return site.reason
    return None


def stock_inside(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block all sites in ``module`` are stock."""
    found = [site for m in module.modules() if (site := site_of(m)) is not None]
    return without(list(dict.fromkeys(found)))  # a site may replace methods of several modules


@contextlib.contextmanager
def without(sites: list[Site]) -> Iterator[None]:
    """Within the block these sites are stock."""
    for site in sites:
        site.restore()
    try:
        yield
    finally:
        for site in sites:
            site.install()


def _step_of_copy(site: Site, args: Any, kwargs: Any, drawn: list[torch.dtype], *, exact: bool) -> Any:
    """The stock step on a copy of a scheduler in its present state, with the noise that the step will draw.

    ``exact``: on fp64 tensors; the sampler's tables stay in the precision that Diffusers gives them. ``drawn`` are the
    dtypes of the noise, which the other run notes.
    """
    cls = type(site.owner)
    sampler = site.state.sampler
    twin: Any = object.__new__(cls)
    ours = {SITE, PATCH, *(replacement.name for replacement in site.replacements)}
    vars(twin).update(copy.deepcopy({k: v for k, v in vars(site.owner).items() if k not in ours}))
    args, kwargs = clone_generators((args, kwargs))
    module = inspect.getmodule(cls)
    draw = getattr(module, "randn_tensor", None)
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        if draw is not None:
            again = functools.partial(_draw_again, draw, iter(drawn))
            noise = again if exact else functools.partial(_draw, draw, drawn)
            stack.enter_context(mock.patch.object(module, "randn_tensor", noise))
        if exact:
            for name in set(sampler.history) & vars(twin).keys():
                setattr(twin, name, to_fp64(getattr(twin, name)))
            args, kwargs = to_fp64((args, kwargs))
        return getattr(twin, sampler.method)(*args, **kwargs)


def _draw(stock: Callable[..., Tensor], drawn: list[torch.dtype], *args: Any, **kwargs: Any) -> Tensor:
    noise = stock(*args, **kwargs)
    drawn.append(noise.dtype)
    return noise


def _draw_again(stock: Callable[..., Tensor], drawn: Iterator[torch.dtype], *args: Any, **kwargs: Any) -> Tensor:
    return stock(*args, **{**kwargs, "dtype": next(drawn)}).double()


def _free_bytes(device: torch.device) -> int | None:
    """Free memory, ``None`` where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

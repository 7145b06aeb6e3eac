"""Proof on the user's own pipeline: every site against eager and fp64, the denoiser, and the final latents.

Sites are checked inside of a real run, one at a time: at a site's first call its stock code runs on the same
inputs, as it is and on an fp64 copy of this one module. So memory grows by one site, not by one model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fastdiff.patching import components_of, patched, patches_of, unwrap
from fastdiff.patching._patch import PATCH, Patch
from fastdiff.patching._site import SITE, Site, site_of
from fastdiff.patching.families import Family, example_of, family_of

#: How far from fp64 a site or a model may be, as a multiple of eager's distance.
FACTOR_HALF, FACTOR_FP32 = 1.05, 2.0


@dataclass(frozen=True)
class Check:
    """One comparison. Errors are relative RMS errors against the fp64 result, as numbers of eager's inputs.

    Attributes:
        path, cls: of the site; of a model its component's name and class.
        error: ours; ``None`` if not compared.
        eager: eager's.
        limit: what ``error`` must not exceed, see :func:`limit_of`.
        difference: relative RMS difference of ours and eager's result.
        note: why not compared, or what else is to be known.
        wrong: whether it fails without numbers.
    """

    path: str
    cls: str
    error: float | None = None
    eager: float | None = None
    limit: float | None = None
    difference: float | None = None
    note: str = ""
    wrong: bool = False

    @property
    def ok(self) -> bool | None:
        """The verdict; ``None`` if not compared."""
        if self.wrong:
            return False
        return None if self.error is None or self.limit is None else self.error <= self.limit


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`; prints as a table with :mod:`rich`, true if everything holds.

    Attributes:
        name: the class of the object.
        sites: one check per patched site.
        models: one check per patched model, of its whole output.
        latents: relative RMS difference of patched and eager after the last step of the sampler, if one ran.
    """

    name: str
    sites: tuple[Check, ...]
    models: tuple[Check, ...]
    latents: float | None

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and at least one site was served by a kernel and compared."""
        failed = any(check.ok is False for check in (*self.sites, *self.models))
        return not failed and any(check.ok for check in self.sites)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self), "ok": self.ok}

    def table(self, *, full: bool = False) -> Table:
        """The checks; unless ``full``, of the sites of one class in one part of the model only the worst."""
        table = Table(title=f"fastdiff verify: {self.name}", title_justify="left")
        table.add_column("where", overflow="fold")
        table.add_column("class")
        for name in ("error", "eager's error", "limit", "from eager"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        groups: dict[tuple[str, ...], list[Check]] = {}
        for check in self.sites:
            path = check.path if full else check.path.partition(".")[0]
            groups.setdefault((path, check.cls, check.note), []).append(check)
        for (path, *_), checks in groups.items():
            worst = max(checks, key=_badness)
            table.add_row(*_cells(worst, worst.path if len(checks) == 1 else f"{path} x{len(checks)}"))
        table.add_section()
        for check in self.models:
            table.add_row(*_cells(check, f"{check.path}, whole".strip(", ")))
        return table

    def summary(self) -> str:
        """The verdict in words."""
        done = [check for check in self.sites if check.ok is not None]
        failed = [check.path for check in (*self.sites, *self.models) if check.ok is False]
        lines = [f"{len(done)} of {len(self.sites)} sites compared, {len(self.models)} models"]
        if self.latents is not None:
            lines.append(f"final latents: relative RMS difference from eager {self.latents:.2e}")
        if failed:
            lines.append(f"FAILED: {', '.join(failed)}")
        else:
            lines.append("verified" if self.ok else "FAILED: no site was served by a kernel and compared")
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(self.table(), Text(self.summary()))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def verify(x: Any, *, seed: int = 0, **call: Any) -> Verification:
    """Compare what the patched ``x`` computes with eager and with fp64, during a real run.

    Args:
        x: a pipeline, model or scheduler. If it is not patched, it is while this runs.
        seed: of the run; ignored where ``call`` brings a generator.
        **call: arguments of the pipeline or the model. Without any, every patched model runs on small synthetic
            inputs.

    Raises:
        TypeError: if ``x`` is none of these.
        ValueError: if there is nothing to run: a scheduler by itself, or a pipeline without patched models.
    """
    if not patches_of(x):
        with patched(x):
            return verify(x, seed=seed, **call)
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
        f"{name}.{part}".strip("."): _Whole(patch, patch.root.get_submodule(part))
        for name, patch in models.items()
        for part in _family(patch.root).forwards
    }
    sites = _SiteChecks(patches)
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
    latents = _relative(ours[0], eager[0].double()) if ours and eager else None
    return Verification(type(x).__name__, sites.results(), checks, latents)


def limit_of(eager: float, rounded: float, count: int, dtype: torch.dtype) -> float:
    """The largest acceptable error.

    Args:
        eager: eager's relative RMS error.
        rounded: the error of the fp64 result, correctly rounded to ``dtype``.
        count: elements compared.
        dtype: of the result.

    Half precision: 1.05 times eager's error or 1.02 times that of one rounding, whichever is larger; fp32: twice
    either, or one unit in the last place, which is a matter of the order of additions. The RMS of a finite sample
    of errors is itself uncertain, by about 1 / sqrt(2 count) of its value; of the ratio of two, three standard
    deviations are added.
    """
    if dtype in (torch.float32, torch.float64):
        limit = max(FACTOR_FP32 * max(eager, rounded), torch.finfo(dtype).eps)
    else:
        limit = max(FACTOR_HALF * eager, 1.02 * rounded)
    return limit * (1 + 3 / max(count, 1) ** 0.5)


class _SiteChecks:
    """Within the context, the first call of every module's site is checked, and every step of a scheduler."""

    def __init__(self, patches: dict[str, Patch]) -> None:
        self.checks: dict[str, Check] = {}
        self.sites = {f"{name}.{site.path}".strip("."): site for name, patch in patches.items() for site in patch.sites}

    def __enter__(self) -> _SiteChecks:
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
        self.checks[path] = _against_stock(path, module, stock, args, kwargs, ours, _stock_inside(module))
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
            check = _compare(path, cls, ours, eager, exact)
        self.checks[path] = max(self.checks.get(path, check), check, key=_badness)
        return ours


class _Whole:
    """Within the context, keeps the first call of one module; then compares it as a whole."""

    def __init__(self, patch: Patch, module: nn.Module) -> None:
        self.patch = patch
        self.module = module
        self.call: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> _Whole:
        self.handle = self.module.register_forward_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()

    def check(self, path: str) -> Check:
        if self.call is None:
            return Check(path, type(self.module).__name__, note="not reached")
        args, kwargs, ours = self.call
        stock = type(self.module).forward
        return _against_stock(path, self.module, stock, args, kwargs, ours, self.patch.suspended())

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if self.call is None:
            self.call = (args, kwargs, result)


def _against_stock(
    path: str,
    module: nn.Module,
    stock: Callable[..., Any],
    args: Any,
    kwargs: Any,
    ours: Any,
    as_stock: contextlib.AbstractContextManager[None],
) -> Check:
    """Compare ``ours`` with ``stock`` on the module and on an fp64 copy of it, both within ``as_stock``."""
    cls = type(module).__name__
    parameters = list(module.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return Check(path, cls, note="its weights are offloaded")
    free = _free_bytes(parameters[0].device if parameters else torch.device("cpu"))
    if free is not None and 12 * sum(p.numel() for p in parameters) > free:  # the copy, and activations
        return Check(path, cls, note="an fp64 copy does not fit in memory")
    with as_stock:
        eager = stock(module, *args, **kwargs)
        try:
            twin = copy.deepcopy(module).double()
        except Exception as error:  # hooks and wrappers of any kind
            return Check(path, cls, note=f"it cannot be copied: {type(error).__name__}: {error}")
        try:
            exact = stock(twin, *_to_fp64(args), **_to_fp64(kwargs))
        except Exception as error:  # a module may insist on its dtype
            return Check(path, cls, note=_no_fp64(error))
    return _compare(path, cls, ours, eager, exact)


def _no_fp64(error: Exception) -> str:
    return f"no fp64 result: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _why_eager(site: Site) -> str | None:
    """Why no kernel had a part in the site's latest call, or ``None``."""
    if site.declined or all(choice.backend == "eager" for choice in site.served.values()):
        return site.reason
    return None


@contextlib.contextmanager
def _stock_inside(module: nn.Module) -> Iterator[None]:
    """Within the block all sites in ``module`` are stock."""
    found = [site for m in module.modules() if (site := site_of(m)) is not None]
    sites = list(dict.fromkeys(found))  # a site may replace methods of several modules
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
    args, kwargs = _clone_generators((args, kwargs))
    module = inspect.getmodule(cls)
    draw = getattr(module, "randn_tensor", None)
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        if draw is not None:
            again = functools.partial(_draw_again, draw, iter(drawn))
            noise = again if exact else functools.partial(_draw, draw, drawn)
            stack.enter_context(mock.patch.object(module, "randn_tensor", noise))
        if exact:
            for name in set(sampler.history) & vars(twin).keys():
                setattr(twin, name, _to_fp64(getattr(twin, name)))
            args, kwargs = _to_fp64((args, kwargs))
        return getattr(twin, sampler.method)(*args, **kwargs)


def _draw(stock: Callable[..., Tensor], drawn: list[torch.dtype], *args: Any, **kwargs: Any) -> Tensor:
    noise = stock(*args, **kwargs)
    drawn.append(noise.dtype)
    return noise


def _draw_again(stock: Callable[..., Tensor], drawn: Iterator[torch.dtype], *args: Any, **kwargs: Any) -> Tensor:
    return stock(*args, **{**kwargs, "dtype": next(drawn)}).double()


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
        kept[:] = _tensors(result)[:1]
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
    call = _clone_generators(call)
    if "generator" in inspect.signature(pipe.__call__).parameters:
        call.setdefault("generator", torch.Generator().manual_seed(seed))
    pipe(**call)


def _family(model: Any) -> Family:
    family = family_of(model)
    assert family is not None
    return family


def _compare(path: str, cls: str, ours: Any, eager: Any, exact: Any) -> Check:
    """One check, over all floating-point tensors of a result; each counts relative to its own size."""
    sums = dict.fromkeys(("ours", "eager", "rounded", "difference"), 0.0)
    count, dtype, note = 0, torch.float32, ""
    for o, e, x in zip(_tensors(ours), _tensors(eager), _tensors(exact), strict=True):
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
            sums[name] += n * _relative(value, target) ** 2
        count += n
    if count == 0 and sums["ours"] == 0:
        return Check(path, cls, note="nothing finite to compare", wrong=True)
    error, of_eager, rounded, difference = ((s / max(count, 1)) ** 0.5 for s in sums.values())
    return Check(path, cls, error, of_eager, limit_of(of_eager, rounded, count, dtype), difference, note)


def _relative(value: Tensor, target: Tensor) -> float:
    """Relative RMS difference; absolute where the target is zero."""
    distance, size = (value.double() - target).norm().item(), target.norm().item()
    return distance / size if size else distance


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, v) for v in value])
    return function(value)


def _to_fp64(value: Any) -> Any:
    """Floating-point tensors and dtypes, in any nesting, as fp64."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.double() if leaf.is_floating_point() else leaf
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    return _map(convert, value)


def _clone_generators(value: Any) -> Any:
    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Generator):
            return leaf
        twin = torch.Generator(leaf.device)
        twin.set_state(leaf.get_state())
        return twin

    return _map(clone, value)


def _free_bytes(device: torch.device) -> int | None:
    """Free memory, ``None`` where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _badness(check: Check) -> float:
    if check.error is None or not check.limit:
        return -1.0
    return check.error / check.limit


def _cells(check: Check, where: str) -> list[Text | str]:
    numbers = [
        "" if n is None else f"{n:.2e}" for n in (check.error, check.eager, check.limit, check.difference)
    ]  # fmt: skip
    verdict = Text(check.note, "yellow")
    if check.ok is not None:
        verdict = Text("ok", "green") if check.ok else Text("FAILED", "red")
        verdict.append(f": {check.note}" if check.note else "")
    return [Text(where), check.cls, *numbers, verdict]

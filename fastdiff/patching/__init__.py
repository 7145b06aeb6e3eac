"""Patching: install the fused ops in a pipeline, a model or a scheduler, and take them out again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from fastdiff.backends import BACKENDS
from fastdiff.patching._fingerprint import base, resolve, why_not_source, why_not_version
from fastdiff.patching._patch import PATCH, Claim, Options, Patch, patch_of
from fastdiff.patching.blocks import Block
from fastdiff.patching.blocks.dispatched import DISPATCHED
from fastdiff.patching.families import Family, family_of

T = TypeVar("T")
#: Name, in the ``__dict__`` of a patched pipeline, of its :class:`Claim` on its components' patches.
CLAIM = "_fastdiff_claim"

__all__ = ["Options", "Patch", "components_of", "patch", "patch_of", "patched", "patches_of", "unpatch", "unwrap"]


def patch(
    x: T,
    *,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    backend: str | None = None,
    prepack_weights: bool = False,
    cuda_graphs: bool = False,
) -> T:
    """Replace chains of small operations in ``x`` by fused kernels, on this object only.

    What is not covered is left alone, with the reason in :func:`fastdiff.report`. Patching again reconfigures.
    A component that several pipelines share stays patched until the last of them is unpatched.

    Args:
        x: a Diffusers pipeline, model or scheduler.
        only: patterns (:mod:`fnmatch`) of site paths, as the report shows them; all other sites stay stock.
        skip: patterns of site paths that stay stock.
        backend: the only backend that may serve the sites (one of ``fastdiff.backends.BACKENDS``); what it does
            not take runs eager. By default the best that takes the call.
        prepack_weights: on a CPU, in bf16 and fp16, keep the weights of convolutions and linear layers packed for
            oneDNN as well, made at each layer's first use. Costs a second copy of these weights in memory (1.7 GB
            for SD 1.5), and makes the U-Net of SD 1.5 up to twice as fast as eager (bf16, a CPU with AMX). Changed
            weights (LoRAs loaded, fused or scaled, state dicts, casts) are seen and packed again; only edits of few
            elements that go through ``.data``, around PyTorch's version counter, may not be.
        cuda_graphs: on a CUDA device, run whole denoisers from CUDA graphs, captured when a kind of input (shapes,
            dtypes, structure and constants of the arguments) comes for the second time. At most 8 per model share
            one memory pool of about a forward's activations. Weights are read live; another LoRA, adapter,
            processor or attribute drops a model's graphs, and they are captured again. What cannot be captured runs
            as it would without graphs, and the report says why. Whole models, whatever ``only`` and ``skip`` say.

    Returns:
        ``x``.

    Raises:
        TypeError: if ``x`` is none of these.
        ValueError: if the backend is unknown, an option is malformed, or ``only`` names no place in ``x``.
    """
    options = Options(
        _patterns("only", only), _patterns("skip", skip), _backend(backend),
        _flag("prepack_weights", prepack_weights), _flag("cuda_graphs", cuda_graphs),
    )  # fmt: skip
    components = components_of(x)
    before = _Before(x)
    try:
        if components is None:
            _patch_one(x, options, None)
        else:
            claim = vars(x).setdefault(CLAIM, Claim())
            claim.follow(x, options, progress_bar)
            for name, component in components.items():
                if _is_patchable(component):
                    _patch_one(component, replace(options, prefix=name), claim)
        made = [found for _, found in patches_of(x)]
        if options.only and not any(found.names_any() for found in made):
            raise ValueError(f"only={only!r} names no place in this {type(x).__name__}")
    except BaseException:
        before.restore()
        raise
    return x


def unpatch(x: T) -> T:
    """Put back exactly what :func:`patch` replaced in ``x``.

    Of a pipeline, the components that another patched pipeline uses too, or that were patched by themselves as
    well, stay patched. A model or scheduler is restored whoever patched it.

    Returns:
        ``x``.

    Raises:
        TypeError: if ``x`` is neither a pipeline nor a model or scheduler that fastdiff knows.
        ValueError: if ``x`` is not patched.
    """
    if components_of(x) is None:
        found = patch_of(unwrap(x))
        if found is None:
            raise ValueError(f"this {type(x).__name__} is not patched")
        found.restore()
        return x
    claim = vars(x).get(CLAIM)
    if claim is None:
        raise ValueError(f"this {type(x).__name__} is not patched")
    claim.unfollow()
    for found in list(claim.patches):
        _release(claim, found)
    del vars(x)[CLAIM]  # last: what was interrupted can be repeated
    return x


def _release(claim: Claim, found: Patch) -> None:
    """Take a claim from a patch, which goes with the last."""
    found.claims.pop(claim, None)
    if not found.claims:
        found.restore()
    elif (wanted := list(found.claims.values())[-1]) != found.options:
        _patch_one(found.root, wanted, None, keep_claims=True)
    claim.patches.discard(found)


def progress_bar(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``progress_bar`` of a patched pipeline, which a call makes before its first step.

    Here the pipeline is seen to have another scheduler than the last time: that is patched, the old one let go. One
    that was unpatched by itself is not patched again.
    """
    from diffusers import SchedulerMixin

    claim: Claim = vars(pipe)[CLAIM]
    components = components_of(pipe) or {}
    for name, component in components.items():
        if isinstance(component, SchedulerMixin) and component not in claim.schedulers:
            claim.schedulers.add(component)
            _patch_one(component, replace(claim.options, prefix=name), claim)
    for found in list(claim.patches):
        if isinstance(found.root, SchedulerMixin) and all(found.root is not c for c in components.values()):
            claim.schedulers.discard(found.root)
            _release(claim, found)
    return type(pipe).progress_bar(pipe, *args, **kwargs)


def follows(pipe: Any) -> bool:
    """Whether the next call of a patched pipeline patches a scheduler that was set since."""
    claim: Claim | None = vars(pipe).get(CLAIM)
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return claim is not None and claim.following() and code is not None and "progress_bar" in code.co_names


@contextlib.contextmanager
def patched(x: T, **options: Any) -> Iterator[T]:
    """Patch ``x`` within the block and afterwards restore the state before it; options as for :func:`patch`."""
    components_of(x)  # of anything else this raises
    before = _Before(x)
    patch(x, **options)
    try:
        yield x
    finally:
        before.restore()


class _Before:
    """The patches in ``x``, to come back to."""

    def __init__(self, x: Any) -> None:
        components = components_of(x)
        roots = [unwrap(c) for c in ([x] if components is None else components.values()) if _is_patchable(c)]
        self.patches = [(root, patch_of(root)) for root in roots]
        self.claims = [dict(found.claims) if found is not None else {} for _, found in self.patches]
        self.x = x
        self.claim: Claim | None = vars(x).get(CLAIM)
        self.options = self.claim.options if self.claim is not None else Options()

    def restore(self) -> None:
        """Go back; what others have asked for in the meantime stays."""
        claim = vars(self.x).get(CLAIM)
        for (root, earlier), claims in zip(self.patches, self.claims, strict=True):
            found = patch_of(root)
            if found is earlier:
                if found is not None:  # an interrupt may have come while it was being taken out
                    found.reinstall()
                    for holder in found.claims:
                        holder.patches.add(found)
                continue
            if found is not None:
                ours = {claim, found.own} - {None}
                others = {c: o for c, o in found.claims.items() if c not in claims and c not in ours}
                gone = [c for c in claims if c not in found.claims and c not in ours]
                claims = {c: o for c, o in claims.items() if c not in gone} | others
                for holder in found.claims:
                    holder.patches.discard(found)
                found.restore()
            if earlier is not None and claims:
                earlier.reinstall()
                earlier.claims.clear()
                earlier.claims.update(claims)
                for holder in claims:
                    holder.patches.add(earlier)
            elif claims:  # another pipeline has come to share the component
                _patch_one(root, list(claims.values())[-1], None, keep_claims=True, claims=claims)
        if self.claim is None and claim is not None:
            vars(self.x).pop(CLAIM)
            claim.unfollow()
            for found in list(claim.patches):  # of schedulers that the pipeline was given since
                _release(claim, found)
        elif self.claim is not None:
            self.claim.options = self.options


def patches_of(x: Any) -> list[tuple[Any, Patch]]:
    """The patched objects in ``x`` with their patches: of a pipeline its components, else ``x`` itself."""
    components = components_of(x)
    roots = [unwrap(x)] if components is None else [unwrap(c) for c in components.values()]
    return [(root, found) for root in roots if (found := patch_of(root)) is not None]


def _patch_one(
    x: Any,
    options: Options,
    claim: Claim | None,
    *,
    keep_claims: bool = False,
    claims: Mapping[Claim, Options] | None = None,
) -> None:
    """Patch one object for whoever has claims on it already, and for ``claim``, or else for itself."""
    root = unwrap(x)
    earlier = patch_of(root)
    new = Patch(root, options)
    claims = dict(claims or {})
    if earlier is not None:
        earlier.restore()
        new.own, claims = earlier.own, dict(earlier.claims)
        for holder in claims:
            holder.patches.discard(earlier)
    if not keep_claims:
        if claim is None:
            claim = new.own = new.own or Claim()
        claims.pop(claim, None)  # the latest comes last
        claims[claim] = options
    for holder, wanted in claims.items():
        new.claims[holder] = wanted
        holder.patches.add(new)
    vars(root)[PATCH] = new
    try:
        if isinstance(root, nn.Module):
            family = family_of(root)
            assert family is not None
            _patch_model(new, family)
        else:
            from fastdiff import schedulers

            schedulers.install(new)
    except BaseException:
        new.restore()
        raise


def _patch_model(patch: Patch, family: Family) -> None:
    """Install the family's blocks wherever their classes occur; of several for an owner, the first that takes it."""
    version = why_not_version()
    covered: set[Any] = set()  # modules whose work the block that they belong to does
    known: set[Any] = set()  # modules with a row of their own, or of the block they belong to
    paths = {module: path for path, module in patch.root.named_modules()}
    for module, path in paths.items():
        refused: dict[Any, tuple[str, Any, str, str]] = {}
        taken: set[Any] = set()
        for block in (*family.blocks, DISPATCHED):
            cls = base(type(module), block.cls)
            if cls is None or module in covered or not block.applies(module):
                continue
            owner = block.owner(module)
            if owner in taken:
                continue
            owner_path = path if owner is module else paths[owner]
            inside = [
                inner for name in block.covers
                for inner in getattr(functools.reduce(getattr, name.split("."), module), "modules", list)()
            ]  # fmt: skip
            known.update([owner, *inside])
            reason = version or _why_changed(module, cls, block) or block.refuse(module)
            if reason is not None:
                refused.setdefault(owner, (owner_path, owner, block.describe(module), reason))
                continue
            covered.update(inside)
            if block is not DISPATCHED:  # that is not all which other blocks were refused for
                taken.add(owner)
            patch.install(
                owner_path, owner, block.describe(module), *block.methods(module),
                state=block.state(module), reference=block.reference,
            )  # fmt: skip
        for owner, left in refused.items():
            if owner not in taken:
                patch.leave(*left)
    for path, module in patch.root.named_modules():
        if isinstance(module, nn.GroupNorm) and module not in known:
            patch.leave(path, module, "GroupNorm", "nothing is known to replace the code around it")
    written_for = resolve(family.model).forward
    stock = written_for is nn.Module.forward or type(patch.root).forward is written_for
    for switch in family.switches:
        if version is None and stock and why_not_source(switch.sources) is None:
            switch.apply(patch, patch.root)
    if patch.options.cuda_graphs:
        patch.capture()
    if not (patch.sites or patch.left):
        patch.leave("", patch.root, "", "no block that fastdiff knows")


def _why_changed(module: nn.Module, cls: type, block: Block) -> str | None:
    """Why the methods of ``module`` are not the stock ones that ``block`` was written for, or ``None``."""
    for source in block.sources:
        if ":" not in source and getattr(type(module), source) is not getattr(cls, source):
            return f"{type(module).__name__} is a subclass of {cls.__name__} with a {source} of its own"
    return why_not_source(block.all_sources())


def unwrap(x: Any) -> Any:
    """The module inside of wrappers of ``torch.compile`` and ``DistributedDataParallel``, or ``x``."""
    while isinstance(x, nn.Module):
        wrapper = "module" if isinstance(x, nn.parallel.DistributedDataParallel) else "_orig_mod"
        if wrapper not in x._modules:
            break
        x = x._modules[wrapper]
    return x


def components_of(x: Any) -> dict[str, Any] | None:
    """The components of a pipeline; ``None`` for a model or scheduler.

    Raises:
        TypeError: for anything else.
    """
    from diffusers import DiffusionPipeline

    if isinstance(x, DiffusionPipeline):
        return {name: c for name, c in x.components.items() if c is not None}
    if _is_patchable(x):
        return None
    raise TypeError(f"expected a Diffusers pipeline, model or scheduler, got {type(x).__name__}")


def _is_patchable(x: Any) -> bool:
    from diffusers import SchedulerMixin

    from fastdiff.schedulers.guidance import is_guider

    return isinstance(x, SchedulerMixin) or is_guider(x) or family_of(unwrap(x)) is not None


def _patterns(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name} is {value!r}; expected a pattern of site paths, or a sequence of patterns")
    return patterns


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return value


def _backend(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected None or one of {', '.join(BACKENDS)}")
    return name

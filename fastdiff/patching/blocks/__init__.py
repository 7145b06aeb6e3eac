"""Block shapes that model families share: what replaces the methods of one Diffusers class, one file each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

Method = tuple[Any, str, Callable[..., Any]]


@dataclass(frozen=True)
class Block:
    """A class of Diffusers and what fastdiff does with its instances.

    Attributes:
        cls: ``module:name`` of the class.
        what: what the replacement computes, for the report; may depend on the module.
        sources: methods of ``cls``, and ``module:qualname`` of other functions, whose source the replacement
            reproduces or relies on; the guard compares their fingerprints.
        methods: module -> the replaced (object, method name, function).
        refuse: module -> why its structure is not covered, or ``None``; asked once, when patching.
        owner: module -> the object the site is reported under; the module itself by default.
        state: module -> :attr:`fastdiff.patching._site.Site.state`.
        reference: see :attr:`fastdiff.patching._site.Site.reference`.
        covers: paths of submodules whose work the replacement does, so that they are not sites of their own.
        applies: module -> whether the row is about it at all; one that is not leaves no trace in the report.
    """

    cls: str
    what: str | Callable[[Any], str]
    sources: tuple[str, ...]
    methods: Callable[[Any], Sequence[Method]]
    refuse: Callable[[Any], str | None] = lambda module: None
    owner: Callable[[Any], Any] = lambda module: module
    state: Callable[[Any], Any] = lambda module: None
    reference: Callable[..., Any] | None = None
    covers: tuple[str, ...] = ()
    applies: Callable[[Any], bool] = lambda module: True

    def describe(self, module: Any) -> str:
        """``what`` for one module."""
        return self.what if isinstance(self.what, str) else self.what(module)

    def all_sources(self) -> list[str]:
        """The names of all fingerprinted functions, as ``module:qualname``."""
        return [s if ":" in s else f"{self.cls}.{s}" for s in self.sources]


def forward(function: Callable[..., Any]) -> Callable[[Any], Sequence[Method]]:
    """The usual ``methods``: the module's forward, replaced by ``function``."""
    return lambda module: [(module, "forward", function)]


def why_stock(x: Tensor, *norms: nn.Module, kind: type[nn.Module] = nn.GroupNorm) -> str | None:
    """Why this call cannot do the work of ``norms`` outside of their own forward, or ``None``.

    A norm may have hooks (a user's, or those that bring its offloaded weights here), or have been replaced by
    something else than a ``kind``.
    """
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if _has_any_global_hook():
        return "hooks for all modules are set"
    device = x.device
    for norm in norms:
        if type(norm) is not kind:
            return f"a norm is a {type(norm).__name__}"
        if not is_unwatched(norm):
            return "a norm has hooks"
        weight = parameter(norm, "weight")
        if weight is not None and weight.device != device:
            return f"a norm's weight is on {weight.device.type}"
    return None


def parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` for what is a parameter nearly always: a tenth of the time of a module's getattr."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the module would miss a call, or its result, if its work were done elsewhere."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def is_unwatched(module: nn.Module) -> bool:
    """Whether the module's forward is the one of its class, and nobody sees it being called."""
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return False  # hooks that were removed leave the stock method behind
    return not has_hooks(module)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module does what its class ``kind`` does, and nobody sees it being called."""
    return type(module) is kind and is_unwatched(module)


def drop(dropout: nn.Module, x: Tensor) -> Tensor:
    """``dropout(x)``, not called where that would do nothing."""
    return x if not dropout.training and is_plain(dropout, nn.Dropout) else dropout(x)


def once(x: Tensor, key: Hashable, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """``compute(x)``, done once for all blocks of a forward that are handed the same tensor.

    It is kept on ``x`` itself, as long as that lives and is not written to.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference():
        return compute(x)
    # A CUDA graph must not refer to what was computed before its capture.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    kept: dict[Hashable, tuple[int, bool, Tensor]] = x.__dict__.setdefault("_fastdiff_once", {})
    known = kept.get(key)
    if known is None or known[0] != x._version or known[1] is not capturing:
        known = kept[key] = (x._version, capturing, compute(x))
    return known[2]


def halves(joint: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first ``length`` tokens of (B, S, D) and the others; :func:`rejoined` makes them one again without a copy."""
    first, second = joint[:, :length], joint[:, length:]
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        first.__dict__["_fastdiff_halves"] = joint, second
    return first, second


def rejoined(first: Tensor, second: Tensor) -> Tensor:
    """The two along the tokens: the tensor that they are the :func:`halves` of, if they are, and so share memory."""
    if torch.compiler.is_compiling():
        return torch.cat([first, second], dim=1)
    joint, other = first.__dict__.get("_fastdiff_halves", (None, None))
    if joint is not None and other is second:
        storage = joint.untyped_storage()._cdata
        if first.untyped_storage()._cdata == second.untyped_storage()._cdata == storage:  # no ``.data`` was exchanged
            return joint
    return torch.cat([first, second], dim=1)


def activated_once(activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(x)`` of a time embedding that all blocks activate, see :func:`once`."""
    kind = type(activation)
    if kind not in (nn.SiLU, nn.GELU) or not is_plain(activation, kind):
        return activation(x)
    return once(x, (kind, activation.__dict__.get("approximate")), activation)

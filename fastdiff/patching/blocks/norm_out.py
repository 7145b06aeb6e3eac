"""A norm and an activation, called one after the other by their parent: at the exit of U-Nets and VAEs, and in the
ResNet blocks of VAEs, whose forwards keep caches of their convolutions in ways of their own.

The parent's forward stays. The norm computes the SiLU too, unless the parent has another activation by now, either
has hooks, or autocast is on. The activation passes through what the norm marked as activated, and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdiff.backends import Choice
from fastdiff.patching._site import Site, site_of
from fastdiff.patching.blocks import Block, has_hooks
from fastdiff.patching.blocks.channel_norms import GROUP_NORM, NORMS, name_of_class, sources_of
from fastdiff.patching.blocks.channel_norms import refuse as refuse_norm


class Pair(NamedTuple):
    """The state of a site.

    Attributes:
        parent: of the norms and of the activation.
        norms: names of all the norms that the activation follows.
        activation: its name.
        kind: class of the site's norm, a key of ``NORMS``.
    """

    parent: Any
    norms: tuple[str, ...]
    activation: str
    kind: str


def norm_with_activation(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the norm's forward."""
    site = self._fastdiff_site
    reason = _why_separate(site)
    if reason is not None:
        return site.stock(reason, self, *args, **kwargs)
    norm = NORMS[site.state.kind]
    reason = norm.why_not(self, *args, **kwargs)
    if reason is None:
        output = norm.serve(site, self, *args, **kwargs, silu=True)
    else:
        site.note("norm", Choice("stock", stock_pair, reason))
        output = stock_pair(self, *args, **kwargs)
    if not torch.compiler.is_compiling():
        (output[0] if isinstance(output, tuple) else output).__dict__[_ACTIVATED] = True
    return output


def activation_done(self: Any, input: Tensor) -> Tensor:
    """Replaces the activation's forward."""
    if torch.compiler.is_compiling():
        done = _why_separate(self._fastdiff_site) is None
    else:
        done = input.__dict__.pop(_ACTIVATED, False)
    return input if done else type(self).forward(self, input)


def stock_pair(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What the two compute in stock code."""
    output = type(self).forward(self, *args, **kwargs)
    return (F.silu(output[0]), *output[1:]) if isinstance(output, tuple) else F.silu(output)


#: In the ``__dict__`` of a tensor on its way from the norm to the activation.
_ACTIVATED = "_fastdiff_activated"


def _why_separate(site: Site) -> str | None:
    """Why the norm cannot do the work of the activation that its parent calls next."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if _has_any_global_hook():
        return "hooks for all modules are set"
    pair: Pair = site.state
    for name in pair.norms if torch.compiler.is_compiling() else ():
        # What is compiled has no marks: all norms that the activation follows must be of one mind.
        other = site_of(getattr(pair.parent, name))
        if other is None or (other is not site and _why_not_pair(other) is not None):
            return f"{name} is not patched, and the two share their activation"
    return _why_not_pair(site)


def _why_not_pair(site: Site) -> str | None:
    norm, activation = (replacement.owner for replacement in site.replacements)
    pair: Pair = site.state
    if all(getattr(pair.parent, name) is not norm for name in pair.norms) or (
        getattr(pair.parent, pair.activation) is not activation
    ):
        return "the norm or the activation was replaced since it was patched"
    for module, replacement in zip((norm, activation), site.replacements, strict=True):
        function = getattr(module.__dict__.get("forward"), "func", None)
        if has_hooks(module) or function is not getattr(replacement.new, "func", None):
            return "the norm or the activation has hooks"
    return None


def then_silu(
    cls: str, norms: tuple[str, ...] = ("norm1", "norm2"), activation: str = "nonlinearity", *kinds: str
) -> tuple[Block, ...]:
    """Blocks for the norms of modules of one class, each of which the module activates as soon as it is computed.

    Args:
        cls: of the modules, as ``module:name``.
        norms: their names.
        activation: the name of the activation, which they share.
        kinds: the classes they may have, keys of ``NORMS``; a ``GroupNorm`` if none is given.
    """
    kinds = kinds or (GROUP_NORM,)

    def refuse(module: Any, norm: str) -> str | None:
        act = getattr(module, activation)
        if name_of_class(getattr(module, norm)) not in kinds:
            return f"{norm} is a {type(getattr(module, norm)).__name__}"
        if type(act) is not nn.SiLU:
            return f"{activation} is a {type(act).__name__}"
        if sum(m is act for _, m in module.named_modules(remove_duplicate=False)) > 1:
            return f"{activation} is used elsewhere too"
        if getattr(module, "temb_proj", None) is not None:
            return f"{activation} is used for a time embedding too"
        return refuse_norm(getattr(module, norm))

    def row(name: str) -> Block:
        return Block(
            cls=cls,
            what=lambda module: f"{NORMS[name_of_class(getattr(module, name))].what} + SiLU",
            sources=("forward", *(source for kind in kinds for source in sources_of(kind))),
            methods=lambda module: [
                (getattr(module, name), "forward", norm_with_activation),
                (getattr(module, activation), "forward", activation_done),
            ],
            refuse=lambda module: refuse(module, name),
            owner=lambda module: getattr(module, name),
            state=lambda module: Pair(module, norms, activation, name_of_class(getattr(module, name))),
            reference=stock_pair,
            covers=(name,),
            # A U-Net may have none, and a SpatialNorm has a row of its own.
            applies=lambda module: type(getattr(module, name)).__name__ not in ("NoneType", "SpatialNorm"),
        )

    return tuple(map(row, norms))


def norm_out(cls: str, norm: str = "conv_norm_out", activation: str = "conv_act", *kinds: str) -> Block:
    """The exit of the class named ``module:name``; ``norm`` and ``activation`` are the attributes' names."""
    return then_silu(cls, (norm,), activation, *kinds)[0]

"""The exit of U-Nets and VAEs: a norm and an activation, called one after the other by their parent.

The parent's forward stays. The norm computes the SiLU too, unless the parent has another activation by now, either
has hooks, or autocast is on. The activation passes through what the norm marked as activated, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdiff.ops import group_norm_silu
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, has_hooks


def norm_with_activation(self: Any, input: Tensor) -> Tensor:
    """Replaces the norm's forward."""
    site = self._fastdiff_site
    reason = _why_separate(site)
    if reason is not None:
        return site.stock(reason, self, input)
    output = site.serve("norm", group_norm_silu, input, self.num_groups, self.weight, self.bias, self.eps)
    if not torch.compiler.is_compiling():
        output.__dict__[_ACTIVATED] = True
    return output


def activation_done(self: Any, input: Tensor) -> Tensor:
    """Replaces the activation's forward."""
    if torch.compiler.is_compiling():
        done = _why_separate(self._fastdiff_site) is None
    else:
        done = input.__dict__.pop(_ACTIVATED, False)
    return input if done else type(self).forward(self, input)


def stock_pair(self: Any, input: Tensor) -> Tensor:
    """What the two compute in stock code."""
    return F.silu(type(self).forward(self, input))


#: In the ``__dict__`` of a tensor on its way from the norm to the activation.
_ACTIVATED = "_fastdiff_activated"


def _why_separate(site: Site) -> str | None:
    """Why the norm cannot do the work of the activation that its parent calls next."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if _has_any_global_hook():
        return "hooks for all modules are set"
    norm, activation = (replacement.owner for replacement in site.replacements)
    parent, norm_name, activation_name = site.state
    if getattr(parent, norm_name) is not norm or getattr(parent, activation_name) is not activation:
        return "the norm or the activation was replaced since it was patched"
    for module, replacement in zip((norm, activation), site.replacements, strict=True):
        function = getattr(module.__dict__["forward"], "func", None)
        if has_hooks(module) or function is not getattr(replacement.new, "func", None):
            return "the norm or the activation has hooks"
    return None


def norm_out(cls: str, norm: str = "conv_norm_out", activation: str = "conv_act") -> Block:
    """The exit of the class named ``module:name``; ``norm`` and ``activation`` are the attributes' names."""

    def refuse(module: Any) -> str | None:
        act = getattr(module, activation)
        if type(getattr(module, norm)) is not nn.GroupNorm:
            return f"{norm} is a {type(getattr(module, norm)).__name__}"
        if type(act) is not nn.SiLU:
            return f"{activation} is a {type(act).__name__}"
        if sum(m is act for _, m in module.named_modules(remove_duplicate=False)) > 1:
            return f"{activation} is used elsewhere too"
        return None

    return Block(
        cls=cls,
        what="GroupNorm + SiLU",
        sources=("forward",),
        methods=lambda module: [
            (getattr(module, norm), "forward", norm_with_activation),
            (getattr(module, activation), "forward", activation_done),
        ],
        refuse=refuse,
        owner=lambda module: getattr(module, norm),
        state=lambda module: (module, norm, activation),
        reference=stock_pair,
        covers=(norm,),
        # A U-Net may have none, and a SpatialNorm has a row of its own.
        applies=lambda module: type(getattr(module, norm)).__name__ not in ("NoneType", "SpatialNorm"),
    )

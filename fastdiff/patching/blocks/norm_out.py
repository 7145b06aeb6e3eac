"""The exit of U-Nets and VAEs: ``conv_norm_out`` and ``conv_act``, called one after the other by their parent.

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
    """Why the norm cannot do the work of the activation that its parent, the site's state, calls next."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if _has_any_global_hook():
        return "hooks for all modules are set"
    norm, activation = (replacement.owner for replacement in site.replacements)
    parent = site.state
    if parent.conv_norm_out is not norm or parent.conv_act is not activation:
        return "the norm or the activation was replaced since it was patched"
    for module, replacement in zip((norm, activation), site.replacements, strict=True):
        function = getattr(module.__dict__["forward"], "func", None)
        if has_hooks(module) or function is not getattr(replacement.new, "func", None):
            return "the norm or the activation has hooks"
    return None


def _refuse(module: Any) -> str | None:
    if type(module.conv_norm_out) is not nn.GroupNorm:
        return f"conv_norm_out is a {type(module.conv_norm_out).__name__}"
    if type(module.conv_act) is not nn.SiLU:
        return f"conv_act is a {type(module.conv_act).__name__}"
    if sum(m is module.conv_act for _, m in module.named_modules(remove_duplicate=False)) > 1:
        return "conv_act is used elsewhere too"
    return None


def norm_out(cls: str) -> Block:
    """The exit of the class named ``module:name``."""
    return Block(
        cls=cls,
        what="GroupNorm + SiLU",
        sources=("forward",),
        methods=lambda module: [
            (module.conv_norm_out, "forward", norm_with_activation),
            (module.conv_act, "forward", activation_done),
        ],
        refuse=_refuse,
        owner=lambda module: module.conv_norm_out,
        state=lambda module: module,
        reference=stock_pair,
        covers=("conv_norm_out",),
    )

"""Attention of processors that dispatch to a backend, as far as no row says what else they do.

A site has set the backend of its processor to fastdiff's (``Site.set_backend``), which serves the attention within the
stock forward: of processors that nothing is known of, and of known ones whenever a call is not what their row says. A
backend that somebody chose for the processor, or for all models, wins.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdiff._attention_backend import DEFAULTS, NAME, attention_of
from fastdiff.patching._site import Site, is_ours
from fastdiff.patching.blocks import Block, forward


def dispatched_attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a module whose processor dispatches."""
    return stock_attention(self._fastdiff_site, "", self, *args, **kwargs)


def stock_attention(site: Site, reason: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock forward with fused attention, where its processor dispatches.

    Args:
        site: of ``self``.
        reason: why fused attention is all that this call can have; empty where the site is about nothing else.
        self: the attention module.
        *args: of its forward.
        **kwargs: likewise.
    """
    why = _why_not(self)
    if not torch.compiler.is_compiling():
        # What reads its own processor's backend finds none while others are in effect.
        site.set_backend() if why is None else site.unset_backend()
    if why is not None:
        return site.stock(reason or why, self, *args, **kwargs)
    with attention_of(site):
        out = site.stock(reason, self, *args, **kwargs)
    if not torch.compiler.is_compiling():
        site.declined = reason or ("" if site.served else "its processor did not dispatch this call to us")
    return out


def dispatches(module: Any) -> bool:
    """Whether the module has a processor that dispatches attention to a backend of its own."""
    return hasattr(getattr(module, "processor", None), "_attention_backend")


def chosen_backend(processor: Any = None) -> Any:
    """The attention backend that somebody chose for the processor, or for all models, instead of fastdiff's; ``None``
    if nobody did."""
    backend, allowed = getattr(processor, "_attention_backend", None), [NAME]
    if backend is None or is_ours(backend):
        backend, allowed = _AttentionBackendRegistry._active_backend, DEFAULTS
    return None if backend in allowed else backend


def _why_not(attn: Any) -> str | None:
    """Why fused attention is not what its processor dispatches to now, or ``None``."""
    processor = attn.processor
    if not dispatches(attn):
        return f"its processor is {type(processor).__name__}, which does not dispatch attention"
    backend = chosen_backend(processor)
    if backend is not None:
        return f"the attention backend is {getattr(backend, 'value', backend)}"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is on"
    return "autocast is on" if torch._C._is_any_autocast_enabled() else why_not_mode()


def why_not_mode() -> str | None:
    """Which mode wants to see ``scaled_dot_product_attention``: Diffusers' layer skip replaces it by such a mode."""
    if torch._C._len_torch_function_stack() == 0:
        return None
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    return f"a {type(modes[-1]).__name__} is active" if modes else None


#: Any module with such a processor that no other row takes.
DISPATCHED = Block(
    cls="torch.nn.modules.module:Module",
    what="attention of a processor that fastdiff does not know",
    sources=(),
    methods=forward(dispatched_attention),
    applies=dispatches,
)

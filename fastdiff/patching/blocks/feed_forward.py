"""The activations of the transformers' feed-forward: GEGLU and tanh GELU, each after its own projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.ops import geglu, gelu_tanh
from fastdiff.patching.blocks import Block, forward


def geglu_projection(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces ``GEGLU.forward``."""
    site = self._fastdiff_site
    if args or kwargs:
        return site.stock("called with deprecated arguments", self, hidden_states, *args, **kwargs)
    return site.serve("geglu", geglu, self.proj(hidden_states))


def gelu_projection(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces ``GELU.forward`` where ``approximate="tanh"``."""
    site = self._fastdiff_site
    if self.approximate != "tanh":
        return site.stock(_EXACT, self, hidden_states)
    return site.serve("gelu_tanh", gelu_tanh, self.proj(hidden_states))


_EXACT = "its GELU is exact: one operation already"

GEGLU = Block(
    cls="diffusers.models.activations:GEGLU",
    what="GELU and product",
    sources=("forward", "gelu"),
    methods=forward(geglu_projection),
)

GELU_TANH = Block(
    cls="diffusers.models.activations:GELU",
    what="tanh GELU",
    sources=("forward", "gelu"),
    methods=forward(gelu_projection),
    refuse=lambda module: None if module.approximate == "tanh" else _EXACT,
)

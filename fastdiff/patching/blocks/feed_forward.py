"""The activations of the transformers' feed-forward: GEGLU, SwiGLU and tanh GELU, each after its own projection."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import FP32SiLU
from torch import Tensor, nn

from fastdiff.backends import Choice
from fastdiff.ops import geglu, gelu_tanh, swiglu
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, forward, is_plain


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


def swiglu_projection(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces ``SwiGLU.forward``."""
    x, gate = self.proj(hidden_states).chunk(2, dim=-1)
    return silu_product(self._fastdiff_site, self.activation, gate, x)


def silu_feed_forward(self: Any, x: Tensor) -> Tensor:
    """Replaces a forward that is ``out(silu(gate(x)) * up(x))``; the site's state holds the three names."""
    site = self._fastdiff_site
    gate, up, out = site.state
    x = silu_product(site, self._modules.get("silu"), getattr(self, gate)(x), getattr(self, up)(x))
    return getattr(self, out)(x)


def silu_feed_forward_row(cls: str, gate: str, up: str, out: str, *sources: str) -> Block:
    """The row of such a class ``module:name``, whose three linear layers have these names."""
    return Block(
        cls=cls,
        what="SiLU and product",
        sources=("forward", *sources),
        methods=forward(silu_feed_forward),
        state=lambda module: (gate, up, out),
    )


def activated(site: Site, activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(x)`` of a block's own feed-forward; a tanh GELU by the fused op."""
    if is_plain(activation, nn.GELU) and activation.approximate == "tanh":
        return site.serve("gelu_tanh", gelu_tanh, x)
    _note_left(site, "gelu_tanh", activation)
    return activation(x)


def silu_product(site: Site, activation: nn.Module | None, gate: Tensor, x: Tensor) -> Tensor:
    """``activation(gate) * x``; of a SiLU, which a function is if there is no module, by the fused op."""
    if activation is None or is_plain(activation, nn.SiLU) or is_plain(activation, FP32SiLU):
        return site.serve("swiglu", swiglu, gate, x)
    _note_left(site, "swiglu", activation)
    return activation(gate) * x


def _note_left(site: Site, slot: str, activation: nn.Module) -> None:
    reason = f"its activation is a {type(activation).__name__}, another one or with hooks"
    site.note(slot, Choice("eager", activation, reason))


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

SWIGLU = Block(
    cls="diffusers.models.activations:SwiGLU",
    what="SiLU and product",
    sources=("forward",),
    methods=forward(swiglu_projection),
)

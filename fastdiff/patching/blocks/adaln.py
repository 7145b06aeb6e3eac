"""adaLN outside of the blocks' own code, and the second half that transformer blocks share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.ops import gate_residual
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, activated_once, forward
from fastdiff.patching.blocks.token_norms import (
    NORM_SOURCES,
    gated_then_modulated,
    modulated,
    modulated_twice,
    why_not_kinds,
    why_not_norms,
)

F = TypeVar("F", bound=Callable[..., Any])
GATES = "gate + residual + norm + modulation; gate + residual"


def gated_feed_forward(
    site: Site,
    stream: str,
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    norm: Any,
    scale: Tensor,
    shift: Tensor | None,
    feed_forward: Callable[[Tensor], Tensor],
    feed_forward_gate: Tensor,
) -> Tensor:
    """A stream of a block after its attention: ``x + gate * branch``, norm, modulation, feed-forward, gate.

    Args:
        stream: its name, for the report.
        x: the residual.
        branch: what attention gave.
    """
    x, h = gated_then_modulated(site, f"{stream} norm", branch, gate, x, norm, scale, shift)
    return gated(site, f"{stream} gate", feed_forward(h), feed_forward_gate, x)


def sandwich(
    site: Site,
    x: Tensor,
    branch: Tensor,
    norms: tuple[Any, Any, Any],
    feed_forward: Callable[[Tensor], Tensor],
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    feed_forward_gate: Tensor | None = None,
    *,
    stream: str = "",
) -> Tensor:
    """A block after its attention where every branch is normalised on its way in and out (Lumina 2, Z-Image, Mochi):
    ``x + tanh(gate) * norm(branch)``, norm, scale, feed-forward, and again ``x + tanh(gate) * norm(...)``.

    Args:
        norms: of the branch, before and after the feed-forward.
        gate, scale, feed_forward_gate: all or none.
        stream: before the names for the report, where a block has two.
    """
    after, before_feed_forward, after_feed_forward = norms
    h = modulated(site, f"{stream}norm after attention", after, branch)
    if gate is None or feed_forward_gate is None:
        x, h = gated_then_modulated(site, f"{stream}norm before feed-forward", h, None, x, before_feed_forward)
        return x + modulated(site, f"{stream}norm after feed-forward", after_feed_forward, feed_forward(h))
    x, h = gated_then_modulated(site, f"{stream}gate and norm", h, gate.tanh(), x, before_feed_forward, scale)
    h = modulated(site, f"{stream}norm after feed-forward", after_feed_forward, feed_forward(h))
    return gated(site, f"{stream}gate", h, feed_forward_gate.tanh(), x)


def gated(site: Site, slot: str, x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """``residual + gate * x``."""
    return site.serve(slot, gate_residual, x, gate, residual)


def clip_half(x: Tensor) -> Tensor:
    """What blocks do in fp16 against overflow."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def guarded(*norms: str, or_identity: str = "") -> Callable[[F], F]:
    """Decorator for a replaced forward: what cannot do the work of the norms named runs the stock code.

    Args:
        or_identity: of another norm, in place of which the class may have an ``nn.Identity``.
    """

    def norms_of(module: Any) -> list[Any]:
        found = [getattr(module, name) for name in norms]
        if or_identity and type(other := getattr(module, or_identity)) is not nn.Identity:
            found.append(other)
        return found

    def decorate(function: F) -> F:
        first = list(inspect.signature(function).parameters)[1]

        @functools.wraps(function)
        def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs[first]
            reason = why_not_norms(x, *norms_of(self))
            if reason is not None:
                return self._fastdiff_site.stock(reason, self, *args, **kwargs)
            return function(self, *args, **kwargs)

        vars(replaced)["norms_of"] = norms_of
        vars(replaced)["norms"] = norms
        return replaced  # type: ignore[return-value]

    return decorate


def block_row(
    cls: str,
    what: str,
    function: Any,
    *,
    sources: tuple[str, ...] = (),
    refuse: Callable[[Any], str | None] = lambda module: None,
) -> Block:
    """The row of a class ``module:name`` whose forward a :func:`guarded` function replaces."""
    return Block(
        cls=cls,
        what=what,
        sources=("forward", *sources, *(NORM_SOURCES if function.norms else ())),
        methods=forward(function),
        refuse=lambda module: refuse(module) or why_not_kinds(*function.norms_of(module)),
    )


def left_row(cls: str, what: str, reason: str, applies: Callable[[Any], bool] = lambda module: True) -> Block:
    """The row of a class that stays stock, for the report."""
    return Block(
        cls=cls, what=what, sources=(), methods=lambda module: [], refuse=lambda module: reason, applies=applies
    )


@guarded("norm")
def zero_single(self: Any, x: Tensor, emb: Any = None) -> tuple[Tensor, Tensor]:
    """Replaces ``AdaLayerNormZeroSingle.forward``."""
    shift, scale, gate = self.linear(activated_once(self.silu, emb)).chunk(3, dim=1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift), gate


@guarded("norm")
def zero_x(self: Any, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
    """Replaces ``SD35AdaLayerNormZeroX.forward``: one norm, modulated for each of two attentions."""
    modulation = self.linear(activated_once(self.silu, emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = modulation
    pairs = (scale, shift), (scale2, shift2)
    x, x2 = modulated_twice(self._fastdiff_site, "norm", self.norm, hidden_states, *pairs)
    return x, gate, shift_mlp, scale_mlp, gate_mlp, x2, gate2


@guarded("norm")
def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Replaces ``AdaLayerNormContinuous.forward``."""
    scale, shift = self.linear(activated_once(self.silu, conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(self._fastdiff_site, "norm", self.norm, x, scale, shift)


_FILE = "diffusers.models.normalization"
MODULATED = "norm + modulation"
ADA_LAYER_NORM_ZERO_SINGLE = block_row(f"{_FILE}:AdaLayerNormZeroSingle", MODULATED, zero_single)
SD35_ADA_LAYER_NORM_ZERO_X = block_row(f"{_FILE}:SD35AdaLayerNormZeroX", "norm + two modulations", zero_x)
ADA_LAYER_NORM_CONTINUOUS = block_row(f"{_FILE}:AdaLayerNormContinuous", MODULATED, continuous)

"""Blocks of your own: what :func:`fastdiff.patch` replaces in models that it does not know, or knows otherwise.

A block is a class of modules and the function that takes the place of its forward::

    import fastdiff
    from fastdiff.patching.extending import gated, guarded, modulated

    @guarded("norm")                       # with hooks on the norm, autocast, offloaded weights: your own forward
    def my_block(self, x, temb):           # named like MyBlock.forward's arguments; at module level, so it pickles
        site = self._fastdiff_site
        shift, scale, gate = self.linear(temb).chunk(3, dim=-1)
        h = modulated(site, "norm", self.norm, x, scale, shift)
        return gated(site, "gate", self.mlp(h), gate, x)

    fastdiff.register_block(MyBlock, my_block, model=MyTransformer, what="norm + modulation; gate")

From then on ``fastdiff.patch`` takes any ``MyTransformer``, alone or in a pipeline. ``site.serve("name", op, ...)``
calls any op of :mod:`fastdiff.ops` so that the report shows what served it, and why not a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdiff.patching._fingerprint import resolve
from fastdiff.patching.blocks import Block
from fastdiff.patching.blocks import forward as replaced_forward
from fastdiff.patching.blocks.adaln import gated, gated_feed_forward, guarded
from fastdiff.patching.blocks.token_norms import gated_then_modulated, modulated, modulated_twice, why_not_kinds
from fastdiff.patching.families import add_block

__all__ = [
    "gated",
    "gated_feed_forward",
    "gated_then_modulated",
    "guarded",
    "modulated",
    "modulated_twice",
    "register_block",
]


def register_block(
    block: type[nn.Module],
    forward: Callable[..., Any],
    *,
    model: type[nn.Module],
    what: str,
    example: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """Let :func:`fastdiff.patch` replace the forward of ``block``'s instances inside of ``model``'s.

    Registering a block again replaces the row before, also one of fastdiff's own. No fingerprint guards the code of
    ``block``: it is yours, and ``forward`` must compute what it does.

    Args:
        block: the class; subclasses are left alone if their forward is another.
        forward: (module, arguments of its forward) -> what the forward returns.
        model: the class of models it is for, of Diffusers or your own.
        what: what the replacement computes, for the report.
        example: model -> keyword arguments of a small forward, for :func:`fastdiff.verify`; a model of a known family
            has one.

    Raises:
        TypeError: if ``block`` or ``model`` is no class of modules.
        ValueError: if one of the three cannot be imported by its name, as pickles of a patched model need it.
    """
    for name, cls in (("block", block), ("model", model)):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{name} is {cls!r}; expected a subclass of torch.nn.Module")
    names = {name: _importable(name, value) for name, value in (("block", block), ("forward", forward))}
    norms_of = getattr(forward, "norms_of", lambda module: ())
    row = Block(
        cls=names["block"],
        what=what,
        sources=(),
        methods=replaced_forward(forward),
        refuse=lambda module: _why_other(module, block) or why_not_kinds(*norms_of(module)),
    )
    add_block(_importable("model", model), row, example)


def _why_other(module: nn.Module, block: type[nn.Module]) -> str | None:
    if type(module).forward is not block.forward:
        return f"{type(module).__name__} is a subclass of {block.__name__} with a forward of its own"
    return None


def _importable(what: str, value: Any) -> str:
    name = f"{value.__module__}:{value.__qualname__}"
    try:
        found = resolve(name)
    except (ImportError, AttributeError):
        found = None
    if found is not value:
        raise ValueError(f"{what} is {name.replace(':', '.')}, which cannot be imported: define it at module level")
    return name

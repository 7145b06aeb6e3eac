"""Savings without a kernel: forwards of small modules, replaced by what gives the same numbers in fewer launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.patching._fingerprint import base
from fastdiff.patching._patch import Patch
from fastdiff.patching.families import Switch


def replacing(cls: str, function: Callable[..., Any], saving: str, *sources: str) -> Switch:
    """A switch that replaces the forward of all modules of the class ``module:name``.

    Args:
        function: takes the forward's place.
        saving: what that saves, for the report; ``{count}`` in it is the number of modules.
        sources: further functions that ``function`` relies on.
    """

    def apply(patch: Patch, model: Any) -> None:
        found = [
            module for path, module in model.named_modules()
            if base(type(module), cls) is type(module) and patch.options.why_not(path) is None
        ]  # fmt: skip
        if count := sum(patch.replace(module, "forward", function) is None for module in found):
            patch.savings.append(saving.format(count=count))

    return Switch((f"{cls}.forward", *sources), apply)


def tables_at_once(self: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces the forwards of ``FluxPosEmbed`` and ``Flux2PosEmbed``, which make rotary tables axis by axis: here
    neighbouring axes of one size are made together."""
    if ids.device.type not in ("cpu", "cuda", "meta"):  # some others have no fp64
        result: tuple[Tensor, Tensor] = type(self).forward(self, ids)
        return result
    position, dims, start, angles = ids.float(), list(self.axes_dim[: ids.shape[-1]]), 0, []
    while start < len(dims):
        stop = start + 1
        while stop < len(dims) and dims[stop] == dims[start]:
            stop += 1
        exponents = torch.arange(0, dims[start], 2, dtype=torch.float64, device=ids.device) / dims[start]
        angles.append((position[..., start:stop, None] * (1.0 / self.theta**exponents)).flatten(-2))
        start = stop
    angle = angles[0] if len(angles) == 1 else torch.cat(angles, dim=-1)
    cos, sin = (t.float().repeat_interleave(2, dim=-1, output_size=2 * t.shape[-1]) for t in (angle.cos(), angle.sin()))
    return cos, sin


def rotary_tables(cls: str, angles: str = "diffusers.models.embeddings:get_1d_rotary_pos_embed") -> Switch:
    """Of position embeddings of the class ``module:name``, one like Flux's, which calls the function ``angles``."""
    return replacing(cls, tables_at_once, "rotary tables of all axes at once", angles)


FLUX_TABLES = rotary_tables("diffusers.models.transformers.transformer_flux:FluxPosEmbed")
FLUX2_TABLES = rotary_tables("diffusers.models.transformers.transformer_flux2:Flux2PosEmbed")

"""``DiTTransformer2DModel``: class-conditional DiT, adaLN-Zero."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from fastdiff.patching._patch import Patch
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GEGLU, GELU_TANH
from fastdiff.patching.blocks.packed import prepack
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO, ADA_NORM_ZERO_BLOCK
from fastdiff.patching.families import Family, Switch

_CLASS = "diffusers.models.transformers.dit_transformer_2d:DiTTransformer2DModel"
_TIMESTEPS = "diffusers.models.embeddings:Timesteps"

#: Within a forward: configuration of a sinusoid -> (timesteps, sinusoid).
_sinusoids: ContextVar[dict[tuple[Any, ...], tuple[Tensor, Tensor]] | None] = ContextVar("sinusoids", default=None)


def dit_forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Replaces ``DiTTransformer2DModel.forward``: the stock forward, within which sinusoids are shared."""
    stock = type(self).forward
    if torch.compiler.is_compiling():  # the compiler finds the common subexpression itself
        return stock(self, hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
    token = _sinusoids.set({})
    try:
        return stock(self, hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
    finally:
        _sinusoids.reset(token)


def shared_sinusoid(self: Any, timesteps: Tensor) -> Tensor:
    """Replaces ``Timesteps.forward``, which has no parameters: equal calls within one forward are made once."""
    known = None if torch.compiler.is_compiling() else _sinusoids.get()
    if known is None:
        return type(self).forward(self, timesteps)
    key = (self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift, self.scale)
    entry = known.get(key)
    if entry is None or entry[0] is not timesteps:
        entry = known[key] = (timesteps, type(self).forward(self, timesteps))
    return entry[1]


def _sinusoid_once(patch: Patch, model: Any) -> None:
    sinusoids = [
        module for path, module in model.named_modules()
        if type(module) is Timesteps and patch.options.why_not(path) is None
    ]  # fmt: skip
    if len(sinusoids) > 1 and patch.replace(model, "forward", dit_forward) is None:
        replaced = sum(patch.replace(module, "forward", shared_sinusoid) is None for module in sinusoids)
        patch.savings.append(f"sinusoid of the timestep once instead of {replaced} times")


def example(model: Any) -> dict[str, Any]:
    """A forward on 2 latents of the configured size."""
    config, weight = model.config, next(model.parameters())
    size = config.sample_size
    return {
        "hidden_states": torch.randn(2, config.in_channels, size, size, device=weight.device, dtype=weight.dtype),
        "timestep": torch.tensor([500, 500], device=weight.device),
        "class_labels": torch.tensor([0, 1], device=weight.device),
    }


DIT = Family(
    model=_CLASS,
    blocks=(ADA_NORM_ZERO_BLOCK, ADA_LAYER_NORM_ZERO, ATTENTION, GELU_TANH, GEGLU),
    switches=(
        Switch((f"{_CLASS}.forward", f"{_TIMESTEPS}.forward"), _sinusoid_once),
        Switch((), prepack),
    ),
    example=example,
)

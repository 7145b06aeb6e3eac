"""What the tests do with a transformer's row: build it tiny, deep or of published size, give it inputs, run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
from models import randomized
from published_transformers import REAL
from torch import Tensor, nn

from fastdiff.patching.families import family_of


@dataclass(frozen=True)
class Transformer:
    """One row.

    Attributes:
        name: of the family, as people know it.
        cls: of the model.
        config: of the tiny model: all kinds of blocks, few of each.
        depth: changes of ``config`` to the real numbers of blocks, for counting launches.
        saved: least share of a forward's launches that patching must remove at that depth, counted by dispatch on a
            CPU, where an ``nn.RMSNorm`` is six operations.
        sites: class name -> how many sites of it there must be.
        left: (class name, reason) -> how many of its instances are left alone for that reason.
    """

    name: str
    cls: type
    config: dict[str, Any]
    depth: dict[str, Any]
    saved: float
    sites: dict[str, int]
    left: dict[tuple[str, str], int] = field(default_factory=dict)

    def build(self, *, deep: bool = False) -> Any:
        """The model with random weights."""
        return randomized(self.cls(**self.config | (self.depth if deep else {})))

    def published(self, *, deep: bool = False, device: str = "meta") -> Any:
        """A model of published sizes without weights, with few blocks of each kind or all."""
        with torch.device(device):
            return self.cls(**self._published(deep)).eval().requires_grad_(False)

    def loaded(self) -> Any:
        """The same on the CPU, as ``from_pretrained`` gives it for bf16; for fake tensors."""
        return as_loaded(self.published(device="cpu"), lambda weight, dtype: weight.to(dtype))

    def hollow(self) -> Any:
        """The same with real tensors, every matrix being one zero in all its places: it runs, and takes no memory."""

        def zeros(weight: Tensor, dtype: torch.dtype) -> Tensor:
            shape = weight.shape if weight.dim() < 2 else (1,) * weight.dim()
            return torch.zeros(shape, dtype=dtype).expand(weight.shape)

        with accelerate.init_empty_weights():
            return as_loaded(self.cls(**self._published(deep=False)), zeros)

    def _published(self, deep: bool) -> dict[str, Any]:
        config = {"num_layers": 2} | REAL[self.name] | (self.depth if deep else {})
        return {key: value for key, value in config.items() if key != "num_layers" or value is not None}

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32, model: Any = None) -> dict[str, Any]:
        """The family's example for one seed; rotary tables stay in fp32, as pipelines make them."""
        model = self.build() if model is None else model
        family = family_of(model)
        assert family is not None
        torch.manual_seed(seed)
        found = family.example(model)
        return {key: to_dtype(value, torch.float32 if "rotary" in key else dtype) for key, value in found.items()}


def as_loaded(model: Any, make: Callable[[Tensor, torch.dtype], Tensor]) -> Any:
    """With new weights, in bf16 but for those that the class keeps in fp32, and for buffers that are not saved."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                dtype = torch.float32 if kept & {*path.split("."), name} else torch.bfloat16
                module._parameters[name] = nn.Parameter(make(weight, dtype), requires_grad=False)
        for name, buffer in module._buffers.items():
            if name not in module._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.bfloat16)
    return model.eval()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a model's result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in (value or ()) for t in tensors(v)]


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """All results of a forward, flat."""
    with torch.no_grad():
        return torch.cat([t.flatten() for t in tensors(model(**inputs, return_dict=False))])


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``dtype``."""
    if isinstance(value, dict):
        return {k: to_dtype(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_dtype(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

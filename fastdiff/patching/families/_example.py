"""Synthetic inputs for the families' ``example``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Inputs:
    """Random tensors with the dtype and on the device of a model's weights."""

    def __init__(self, model: Any) -> None:
        weight = next(model.parameters())
        dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16  # fp8 storage is cast per layer
        self.like = {"device": weight.device, "dtype": dtype}
        self.device = weight.device

    def noise(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, **self.like)

    def timestep(self, value: float = 0.5, batch: int = 1) -> Tensor:
        """The same time for the whole batch."""
        return torch.full((batch,), value, **self.like)

    def positions(self, *sizes: int) -> Tensor:
        """The coordinates of a grid, (prod(sizes), len(sizes)), as rotary embeddings take them."""
        axes = [torch.arange(n, device=self.device) for n in sizes]
        return torch.cartesian_prod(*axes).reshape(-1, len(sizes)).to(self.like["dtype"])

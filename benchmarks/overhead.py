"""Host time that a patched layer adds to the operations it consists of: checks, the choice of a kernel, the report.

    python -m fastdiff bench overhead [--save]

Layers and inputs are so small that a call is nearly all host time. "bare" makes the calls a patched layer makes (its
linear layers and convolutions, and the kernels directly, already chosen) and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import compare
from _results import Row, result_file
from _runner import Job, add_options, prepare, run_section, wanted
from _targets import verdicts
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from rich.table import Table
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.patching._patch import Patch
from fastdiff.patching.blocks.attention import ATTENTION
from fastdiff.patching.blocks.feed_forward import GEGLU as GEGLU_BLOCK
from fastdiff.patching.blocks.resnet import RESNET_BLOCK
from fastdiff.patching.blocks.transformer import ADA_LAYER_NORM_ZERO

#: Allowed on top of the bare operations, per kernel that the layer calls.
TARGET_US = 15.0


def _chosen(op: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The kernel that serves such calls of ``op``."""
    choice = op.choose(*args, **kwargs)
    assert choice.backend != "eager", choice.reason
    return choice.run


@dataclass
class Layer:
    """A layer, its block, its inputs, and what it consists of."""

    name: str
    module: nn.Module
    block: Any
    inputs: tuple[Any, ...]
    bare: Callable[[], Any]
    kernels: int = 1


def _geglu() -> Layer:
    layer, x = GEGLU(16, 16), torch.randn(1, 4, 16)
    kernel = _chosen(ops.geglu, layer.proj(x))
    return Layer("GEGLU", layer, GEGLU_BLOCK, (x,), lambda: kernel(layer.proj(x)))


def _ada_layer_norm_zero() -> Layer:
    layer = AdaLayerNormZero(16, num_embeddings=None)
    x, emb = torch.randn(1, 4, 16), torch.randn(1, 16)
    kernel = _chosen(ops.adaln_modulate, x, emb, emb)

    def bare() -> Any:
        shift, scale, *rest = layer.linear(layer.silu(emb)).chunk(6, dim=1)
        return kernel(x, scale, shift), rest

    return Layer("AdaLayerNormZero", layer, ADA_LAYER_NORM_ZERO, (x, None, None, None, emb), bare)


def _resnet() -> Layer:
    layer = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4)
    x, temb = torch.randn(1, 8, 4, 4), torch.randn(1, 16)
    norm1, norm2 = layer.norm1, layer.norm2
    kernel = _chosen(ops.group_norm_silu, x, 4, norm1.weight, norm1.bias, norm1.eps)

    def bare() -> Tensor:
        h = layer.conv1(kernel(x, 4, norm1.weight, norm1.bias, norm1.eps))
        embedding = layer.time_emb_proj(F.silu(temb))
        h = layer.conv2(kernel(h, 4, norm2.weight, norm2.bias, norm2.eps, temb=embedding))
        h += x
        return h

    return Layer("ResnetBlock2D", layer, RESNET_BLOCK, (x, temb), bare, kernels=2)


def _attention() -> Layer:
    layer = Attention(16, heads=2, dim_head=8)
    x = torch.randn(1, 4, 16)
    kernel = _chosen(ops.attention, *(torch.randn(1, 4, 2, 8),) * 3)

    def bare() -> Tensor:
        q, k, v = (f(x).view(1, 4, 2, 8) for f in (layer.to_q, layer.to_k, layer.to_v))
        return layer.to_out[0](kernel(q, k, v)[0].flatten(2))

    return Layer("Attention", layer, ATTENTION, (x,), bare)


def measure(layer: Layer, rounds: int) -> Row:
    """Time stock, patched and bare in turns."""
    layer.module.eval()
    patch = Patch(layer.module)
    stock = type(layer.module).forward
    site = patch.install("", layer.module, layer.name, *layer.block.methods(layer.module))
    assert site is not None, patch.left
    layer.module(*layer.inputs)
    assert not site.reason, site.reason
    timings = compare(
        {
            "stock": lambda: stock(layer.module, *layer.inputs),
            "patched": lambda: layer.module(*layer.inputs),
            "bare": layer.bare,
        },
        rounds=rounds,
    )
    _, patched, bare = (t.median_ms * 1e3 for t in timings)
    extra = {"kernels": layer.kernels, "overhead_us": (patched - bare) / layer.kernels}
    return Row(layer.name, "fp32", "stock", timings, target=TARGET_US, extra=extra)


def show(rows: list[Row]) -> Table:
    """Microseconds per call."""
    table = Table(title="host time per call, us")
    for column in ("layer", "kernels", "stock", "patched", "bare", "on top, per kernel"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        color = "green" if all(v.met for v in verdicts(asdict(row))) else "red"
        times = (f"{t.median_ms * 1e3:.1f}" for t in row.timings)
        table.add_row(row.name, str(row.extra["kernels"]), *times, f"[{color}]{row.extra['overhead_us']:.1f}[/]")
    return table


LAYERS = {"GEGLU": _geglu, "AdaLayerNormZero": _ada_layer_norm_zero, "ResnetBlock2D": _resnet, "Attention": _attention}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=31, dtypes=False, devices=("cpu",))
    parser.set_defaults(threads=1)  # nothing here is large enough to share
    options = parser.parse_args()
    options.device_name = options.device_name or result_file(None).stem  # named by all threads, as other sections are
    prepare(options)

    def row(name: str) -> Row:
        return replace(measure(LAYERS[name](), options.rounds), allocator=options.allocator)

    jobs = [Job(name, "fp32", options.allocator, partial(row, name)) for name in LAYERS if wanted(name, options)]
    with torch.no_grad():
        return run_section("overhead", jobs, options, show)


if __name__ == "__main__":
    sys.exit(main())

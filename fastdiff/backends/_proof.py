"""The kernels on the GPU that is here, checked against fp64 and timed: what lets them serve there unasked.

``python -m fastdiff tune`` does this, for a kind of GPU that fastdiff ships no measurements of, and keeps the result in
the user's cache folder. It holds for these versions of fastdiff and torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fastdiff._nested import limit_of, relative, tensors, to_fp64
from fastdiff.backends import kernels_of, losses

#: A backend must be this much faster than eager, over all examples of an op.
MARGIN = 1.03
#: How many examples there are in each dtype.
COUNT = 28
#: Of attention, so many queries are checked: fp64 holds all logits.
CHECKED = 256

Measure = Callable[[Callable[[], Any]], float]
Example = tuple[str, tuple[Any, ...], dict[str, Any]]


def examples(device: torch.device, dtype: torch.dtype) -> Iterator[Example]:
    """Calls of every op at sizes of SD1.5, SDXL, DiT-XL/2, SD3.5, Flux, Z-Image and Wan."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for channels, size in ((320, 64), (1280, 16)):
        image, weight = random(2, channels, size, size), random(channels)
        for x in (image, image.to(memory_format=torch.channels_last)):
            yield "group_norm_silu", (x, 32, weight, weight), {"temb": random(2, channels)}
    for channels, size in ((96, 256), (384, 64)):
        video = random(1, channels, 5, size, size)
        yield "rms_norm_silu", (video, random(channels), None, 1e-12), {"clamp": True}
    for width in (1152, 3072):
        rows, (gate, scale, shift, scale2) = random(2, 4096, width), random(2, 4 * width).chunk(4, 1)
        yield "adaln_modulate", (rows, scale, shift), {}
        yield "adaln_modulate_dual", (rows, scale, shift, scale2, gate), {}
        yield "gate_residual", (rows, gate, rows), {}
        yield "gate_residual_adaln", (rows, gate, rows, scale, shift), {}
    rows, weight = random(2, 4096, 640), random(640)
    yield "gate_residual_adaln", (rows, None, rows, None, None, weight, weight), {}
    yield "geglu", (random(2, 4096, 5120),), {}
    yield "gelu_tanh", (random(2, 4096, 6144),), {}
    yield "swiglu", tuple(random(1, 4096, 20480).chunk(2, -1)), {}
    q, weight, angle = random(1, 4096, 24, 128), random(128), torch.randn(4096, 64, device=device)
    cos, sin = (f(angle).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    yield "qk_norm_rope", (q, q, weight, weight, None, None, cos, sin), {}
    for depth, keys in ((40, 77), (64, 77), (40, 4096), (64, 4096), (72, 1024), (128, 4096)):
        k = random(2, keys, 8, depth)
        yield "attention", (random(2, 4096, 8, depth), k, k), {}
    latent, noise = random(2, 4, 128, 128), random(2, 4, 128, 128)
    yield "scheduler_step", (latent, noise, [noise], None, [0.8, 0.0, 0.3, 0.0, -0.1], [1.2, -0.7]), {}
    yield "cfg_combine", (latent, noise, 7.5), {}
    yield "cfg_combine", (latent, noise, 7.5, 0.7), {}


def is_right(run: Callable[..., Any], eager: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a kernel is as close to fp64 as :func:`fastdiff.verify` wants it."""
    exact = tensors(eager(*to_fp64(args), **to_fp64(kwargs)))
    for ours, stock, want in zip(tensors(run(*args, **kwargs)), tensors(eager(*args, **kwargs)), exact, strict=True):
        limit = limit_of(relative(stock, want), relative(want.to(ours.dtype), want), ours.numel(), ours.dtype)
        if not relative(ours, want) <= limit:  # NaN is wrong, too
            return False
    return True


def is_of_the_compiler(error: Exception) -> bool:
    """Whether a kernel's code or configuration is at fault. A failed pass of Triton's compiler is a RuntimeError, as
    CUDA's errors are."""
    names = ("OutOfResources", "PTXASError", "CompilationError")
    return type(error).__name__ in names or "PassManager" in str(error)


def speeds(example: Example, measure: Measure) -> dict[str, float]:
    """How many times as fast as eager each backend is that serves the call; 0 if it is wrong or does not compile."""
    from fastdiff.ops._library import OPS

    name, args, kwargs = example
    op, found = OPS[name], {}
    few = (args[0][:, :CHECKED], *args[1:]) if name == "attention" else args
    time = 0.0
    for kernel in kernels_of(name):
        reason = kernel.refuse(*args, **kwargs)
        if reason is None and kernel.yields is not None:
            reason = kernel.yields(*args, **kwargs)
        if reason is not None or not kernel.on_request:
            continue
        try:
            right = is_right(kernel.run, op.eager, few, kwargs)
        except Exception as error:
            if not is_of_the_compiler(error):
                raise
            right = False
        if not right:
            found[kernel.backend] = 0.0
            continue
        time = time or measure(partial(op.eager, *args, **kwargs))
        found[kernel.backend] = time / measure(partial(kernel.run, *args, **kwargs))
    return found


def prove(device: torch.device, measure: Measure) -> dict[tuple[str, str], tuple[str, float]]:
    """By op and dtype the fastest backend and how many times as fast as eager it is; kept in the cache, for the choice.

    A backend that is wrong anywhere is not chosen; what it does not take counts as eager.
    """
    by_op: dict[tuple[str, str], list[dict[str, float]]] = {}
    calls = ((name, example) for dtype, name in losses.DTYPES.items() for example in examples(device, dtype))
    for dtype_name, example in track(calls, "checking and timing", total=COUNT * len(losses.DTYPES)):
        by_op.setdefault((example[0], dtype_name), []).append(speeds(example, measure))
    found: dict[tuple[str, str], tuple[str, float]] = {}
    fastest: dict[str, dict[str, str]] = {}
    for (op, dtype_name), rows in by_op.items():
        means = {}
        for backend in dict.fromkeys(b for row in rows for b in row):
            values = [row.get(backend, 1.0) for row in rows]
            mean = statistics.geometric_mean(values) if min(values) > 0 and math.isfinite(max(values)) else 0
            if mean > MARGIN:
                means[backend] = mean
        order = sorted(means, key=lambda b: -means[b]) or ["eager"]
        found[op, dtype_name] = order[0], means.get(order[0], 1.0)
        fastest.setdefault(op, {})[dtype_name] = ", ".join(order)
    path = losses.own_file(losses.kind(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": losses.own_versions(), "fastest": fastest}, indent=1) + "\n")
    losses.own.cache_clear()
    return found


def forget(device: torch.device) -> None:
    """Undo :func:`prove`."""
    losses.own_file(losses.kind(device)).unlink(missing_ok=True)
    losses.own.cache_clear()

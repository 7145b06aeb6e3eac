"""The ops at the sizes of real models, by the kernels of both GPU backends; and the Triton kernels in tests/ops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_suite import NUMBERS, assert_numerics_rule, host_microseconds, run_numbers, tensors_of
from torch import Tensor

from fastdiff import ops, use_backend
from fastdiff.backends import _proof, kernels_of, triton, unavailable
from fastdiff.ops._library import OPS

needs_triton = pytest.mark.skipif(triton.why_not() is not None, reason=str(triton.why_not()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@needs_triton
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    run_numbers(name, "triton")


Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def real_calls(dtype: torch.dtype, device: str) -> dict[str, Callable[[], Call]]:
    """One call of every op at sizes of SD1.5, SDXL, DiT, SD3, Flux and the VAE."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def norm(shape: tuple[int, ...], last: bool, **kwargs: Any) -> Call:
        x, c = random(*shape), shape[1]
        x = x.to(memory_format=torch.channels_last) if last else x
        return "group_norm_silu", (x, 32, random(c), random(c)), {"temb": random(shape[0], c), **kwargs}

    def rms(channels: int, last: bool) -> Call:
        x = random(2, channels, 3, 40, 64)
        x = x.to(memory_format=torch.channels_last_3d) if last else x
        return "rms_norm_silu", (x, random(channels), random(channels), 1e-12), {"clamp": True}

    def attention(queries: int, keys: int, heads: int, depth: int, **kwargs: Any) -> Call:
        q, k, v = (random(2, n, heads * depth).unflatten(-1, (heads, depth)) for n in (queries, keys, keys))
        return "attention", (q, k, v), {"return_lse": True, **kwargs}

    def rows(name: str, width: int) -> Call:
        x, residual = random(2, 4096, width), random(2, 4096, width)
        shift, scale, gate, scale2 = random(2, 4 * width).chunk(4, 1)
        arguments = {
            "adaln_modulate": (x, scale, shift),
            "adaln_modulate_dual": (x, scale, shift, scale2, gate),
            "gate_residual": (x, gate, residual),
            "gate_residual_adaln": (x, gate, residual, scale, shift),
        }
        return name, arguments[name], {}

    def rope() -> Call:
        q, k = (random(1, 4096, 3072).unflatten(-1, (24, 128)) for _ in range(2))
        text = random(1, 512, 3072).unflatten(-1, (24, 128))
        w, table = random(128), torch.randn(4608, 128, device=device)
        return "qk_norm_rope", (q, k, w, w, None, None, table, table, text, text, w, w), {}

    def rope_across_heads() -> Call:
        q, k = (random(1, 2048, 5120).unflatten(-1, (40, 128)) for _ in range(2))
        w, angle = random(5120), torch.randn(2048, 64, device=device)
        pairs = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        return "qk_norm_rope", (q, k, w, w, None, None, pairs), {"across_heads": True}

    calls: dict[str, Callable[[], Call]] = {
        "swiglu": lambda: ("swiglu", tuple(random(1, 4608, 2 * 12288).chunk(2, -1)), {}),
        "geglu": lambda: ("geglu", (random(2, 4096, 2560),), {}),
        "gelu_tanh": lambda: ("gelu_tanh", (random(2, 4096, 4608),), {}),
        "cfg_combine": lambda: ("cfg_combine", (random(2, 4, 128, 128), random(2, 4, 128, 128), 7.5, 0.7), {}),
        "scheduler_step": lambda: (
            "scheduler_step",
            (random(2, 4, 128, 128), random(2, 4, 128, 128), [random(2, 4, 128, 128)], None,
             [0.9, 0.1, 0.2, 0.0, 0.3], []),
            {},
        ),
        "qk_norm_rope": rope,
        "qk_norm_rope across heads": rope_across_heads,
        "attention few queries": lambda: attention(16, 273, 20, 64),
        "attention one query": lambda: attention(1, 77, 8, 128),
    }
    for name in ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln"):
        for width in (320, 1152, 3072, 9000, 12288):
            calls[f"{name} {width}"] = lambda name=name, width=width: rows(name, width)
    for shape in ((2, 320, 64, 64), (2, 1280, 8, 8), (2, 960, 64, 64), (1, 128, 512, 512), (1, 64 * 1280, 4, 4)):
        for last in (False, True):
            for tokens in (False, True):
                key = f"group_norm_silu {shape} {'NHWC' if last else 'NCHW'}{' tokens' if tokens else ''}"
                calls[key] = lambda s=shape, n=last, t=tokens: norm(s, n, tokens=t)
    for channels in (96, 384, 1100):
        for last in (False, True):
            key = f"rms_norm_silu {channels} {'NDHWC' if last else 'NCDHW'}"
            calls[key] = lambda c=channels, n=last: rms(c, n)
    for depth in (40, 64, 72, 80, 88, 96, 112, 128, 160, 256, 512):
        for keys in (77, 1000):
            heads = 4 if depth < 512 else 1
            calls[f"attention {depth} {keys}"] = lambda k=keys, h=heads, d=depth: attention(1000, k, h, d)
    for depth in (64, 72, 128):
        for keys in (1, 154, 300, 512):
            calls[f"attention {depth} {keys}"] = lambda k=keys, d=depth: attention(4096, k, 8, d)
    calls["attention causal"] = lambda: attention(1000, 1000, 8, 64, is_causal=True)
    for keys in (77, 1000):
        mask = torch.rand(2, 1, 1, keys, device=device) > 0.3
        calls[f"attention bool {keys}"] = lambda k=keys, m=mask: attention(1000, k, 8, 64, attn_mask=m)
    mask = torch.randn(2, 1, 1000, 1, device=device)  # adds the same to all keys: the log-sum-exp shows it
    calls["attention mask of queries"] = lambda: attention(1000, 300, 8, 64, attn_mask=mask.to(dtype))
    return calls


def check(call: Call, backend: str) -> None:
    """Strictly that backend's kernel, into poisoned memory, held to the numerics rule."""
    name, args, kwargs = call
    op = OPS[name]
    kernel = next(k for k in kernels_of(name) if k.backend == backend)
    if reason := kernel.refuse(*args, **kwargs):
        pytest.skip(reason)
    eager = tensors_of(op.eager(*args, **kwargs))
    held = [torch.full_like(t, torch.nan) for t in eager]
    del held  # the kernel's results are allocated where it was
    assert_numerics_rule(name, tensors_of(kernel.run(*args, **kwargs)), eager, args, kwargs)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", real_calls(torch.float32, "meta"))
def test_real_sizes(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend in unavailable:
        pytest.skip(unavailable[backend])
    torch.manual_seed(0)
    with torch.no_grad():
        check(real_calls(dtype, "cuda")[name](), backend)


@needs_triton
def test_first_use_costs_less_than_a_second(tmp_path: Path) -> None:
    """Of each kernel, with an empty cache and torch and Triton imported."""
    code = """
import time, torch, fastdiff
from fastdiff import ops
fastdiff.use_backend("triton", strict=True).__enter__()
x = torch.randn(2, 320, 64, 64, device="cuda", dtype=torch.bfloat16); w = torch.ones(320, device="cuda").bfloat16()
ops.gelu_tanh(x)
for call in (lambda: ops.group_norm_silu(x, 32, w, w), lambda: ops.adaln_modulate(x), lambda: ops.geglu(x)):
    start = time.perf_counter(); call(); torch.cuda.synchronize(); print(time.perf_counter() - start)
"""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    times = [float(line) for line in result.stdout.split()]
    assert len(times) == 3 and max(times) < 2.0, times  # group_norm_silu is two kernels


@needs_triton
def test_a_new_size_compiles_nothing() -> None:
    from fastdiff.backends.triton import group_norm_silu as module

    def call(batch: int, size: int) -> None:
        x = torch.randn(batch, 320, size, size, device="cuda", dtype=torch.bfloat16)
        with use_backend("triton", strict=True):
            ops.group_norm_silu(x, 32)

    def compiled() -> int:
        functions = [f for k in (module._partial, module._apply) for f in (k.aligned, k.loose)]
        return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())

    call(2, 64)
    before = compiled()
    for batch, size in ((1, 96), (2, 128), (3, 72)):
        call(batch, size)
    assert compiled() == before > 0


@needs_triton
def test_launch_overhead() -> None:
    """Host time of a call, mostly Python: printed, and far below what a stock chain of operations takes."""
    x, scale, shift = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((1, 16, 64), (1, 64), (1, 64)))
    with use_backend("triton", strict=True):
        microseconds = host_microseconds(lambda: ops.adaln_modulate(x, scale, shift))
    print(f"adaln_modulate: {microseconds:.1f} us of host time a call")
    assert microseconds < 60


def test_what_tune_asks_for_is_right() -> None:
    """Else ``python -m fastdiff tune`` would leave the op to eager."""
    with torch.no_grad():
        for example in _proof.examples(torch.device("cuda", 0)):
            found = _proof.speeds(example, lambda call: 1.0)
            assert all(found.values()), (example[0], found)


@pytest.mark.anywhere
def test_every_op_has_a_real_size() -> None:
    assert {call()[0] for call in real_calls(torch.float32, "meta").values()} == set(ops.__all__)


@pytest.mark.anywhere
@pytest.mark.kernel
@pytest.mark.parametrize("name", ["gate_residual_adaln 320", "attention few queries", "scheduler_step", "cfg_combine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_passes_kernels_that_are_right(name: str, dtype: torch.dtype) -> None:
    """Those of the CPU, which are known to be; it is the check that is tested."""
    with torch.no_grad():
        check(real_calls(dtype, "cpu")[name](), "cpu")

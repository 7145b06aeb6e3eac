"""Every Triton kernel and every shipped configuration compiles for GPUs that are not here, and what comes out.

Each kernel is compiled for two architectures. With FASTDIFF_TEST_ALL=1 (``make test-triton-all``) so is every kind of
call, in every dtype, for all four: that takes the better part of an hour.
"""

from __future__ import annotations

import importlib.util
import os
import re

import pytest
import torch
from triton_aot import GPUS, Binary, Variant, calls, compile_for, recorded

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

#: One call for each kernel and each kind of memory access.
SOME = (
    "group_norm_silu NCHW 320 64 all",
    "group_norm_silu NHWC 320 64",
    "adaln_modulate 1152",
    "adaln_modulate 9000",
    "gate_residual_adaln 3072",
    "geglu",
    "swiglu",
    "qk_norm_rope flux",
    "gelu_tanh",
    "scheduler_step",
    "cfg_combine",
    "cfg_combine rescaled",
    "attention 40",
    "attention 40, 77 keys",
    "attention additive",
)
WIDE_LOAD = re.compile(
    r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64|v8\.b16|v8\.b32)|cp\.async\.[\w.]*shared[\w.]*global[^;]*0x10"
)
MATRIX = re.compile(r"mma\.sync|wgmma|tcgen05\.mma")
#: Its registers hold the whole row of logits; the others are bound by memory, and spills would be more of it.
MAY_SPILL = {"_flash"}


def check(variant: Variant, binary: Binary, capability: int) -> None:
    assert binary.shared <= GPUS[capability][0], f"{variant} wants {binary.shared} bytes of shared memory"
    name = variant.kernel.__name__
    if name not in MAY_SPILL:
        assert binary.stack == 0, f"{variant} spills {binary.stack} bytes"
    if variant.constants[0] > 1:
        assert WIDE_LOAD.search(binary.ptx), f"{variant} has no 16-byte load"
    if name in ("_flash", "_few_keys") and torch.float32 not in variant.dtypes[:3]:
        assert MATRIX.search(binary.ptx), f"{variant} has no matrix instruction"


def check_call(name: str, dtype: torch.dtype, capability: int) -> set[str]:
    """Compile what the call launches; the names of the kernels."""
    with recorded(capability) as launches:
        calls(dtype)[name]()
    assert launches
    for variant in launches:
        check(variant, compile_for(variant, capability), capability)
    return {f"{v.kernel.__module__}.{v.kernel.__name__}" for v in launches}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel(capability: int) -> None:
    from fastdiff.backends.triton import (
        _gated,
        _launch,
        _rows,
        attention,
        cfg_combine,
        gelu_tanh,
        group_norm_silu,
        qk_norm_rope,
        scheduler_step,
    )

    dtype = torch.float16 if capability == 80 else torch.bfloat16
    compiled = set().union(*(check_call(name, dtype, capability) for name in SOME))
    modules = (_gated, _rows, attention, cfg_combine, gelu_tanh, group_norm_silu, qk_norm_rope, scheduler_step)
    kernels = {
        f"{m.__name__}.{k.__name__}" for m in modules for k in vars(m).values() if isinstance(k, _launch.Kernel)
    }
    assert compiled == kernels


@pytest.mark.slow
@pytest.mark.skipif("FASTDIFF_TEST_ALL" not in os.environ, reason="compiles for long; FASTDIFF_TEST_ALL=1 runs it")
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", calls(torch.bfloat16) if importlib.util.find_spec("triton") else [])
def test_every_call(name: str, dtype: torch.dtype, capability: int) -> None:
    check_call(name, dtype, capability)


def test_group_norm_fills_the_gpu() -> None:
    """A (sample, group) is not one program: 64 of them would leave half the processors idle."""
    for name in ("NCHW 320 64", "NHWC 320 64", "NCHW 128 512", "NHWC 128 512"):
        with recorded(90) as launches:
            calls(torch.bfloat16)[f"group_norm_silu {name}"]()
        assert [v.kernel.__name__ for v in launches] == ["_partial", "_apply"]
        assert all(v.grid >= GPUS[90][1] for v in launches), [v.grid for v in launches]


@pytest.mark.parametrize("name", ["group_norm_silu NCHW 1280 8", "scheduler_step", "cfg_combine rescaled"])
def test_one_launch(name: str) -> None:
    with recorded(90) as launches:
        calls(torch.bfloat16)[name]()
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("depth", "held"), [(40, 48), (64, 64), (72, 80), (80, 80), (88, 96), (96, 96), (112, 128), (160, 160), (512, 512)]
)
def test_head_dimensions_are_split(depth: int, held: int) -> None:
    from fastdiff.backends.triton.attention import split

    assert sum(split(depth)) == held


@pytest.mark.parametrize("keys", [1, 77, 154, 300, 512])
def test_few_keys_stay_on_the_chip(keys: int) -> None:
    with recorded(90) as launches:
        calls(torch.bfloat16)[f"attention 64, {keys} keys"]()
    assert [v.kernel.__name__ for v in launches] == ["_few_keys"]


def test_new_sizes_are_the_same_kernels() -> None:
    """Nothing that is compiled depends on resolution, batch or number of tokens; so nothing is compiled again."""
    from triton_aot import meta

    from fastdiff.backends.triton import adaln_modulate, attention, group_norm_silu

    def call(batch: int, size: int) -> None:
        x = meta(batch, 320, size, size)
        group_norm_silu.run(x, 32, meta(320), meta(320), temb=meta(batch, 320))
        tokens = meta(batch, size * size, 640)
        modulation = meta(batch, 6 * 640).chunk(6, 1)
        adaln_modulate.run(tokens, modulation[0], modulation[1])
        q = tokens.unflatten(-1, (8, 80))
        attention.run(q, q, q)

    with recorded(90) as launches:
        call(2, 64)
        known = len(launches)
        for batch, size in ((1, 96), (3, 64), (2, 128), (4, 104)):
            call(batch, size)
    assert len(launches) == known

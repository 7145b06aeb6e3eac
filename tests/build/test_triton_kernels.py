"""Every Triton kernel and every shipped configuration compiles for GPUs that are not here, and what comes out.

Each kernel is compiled for two architectures. With FASTDIFF_TEST_ALL=1 (``make test-triton-all``) so is every kind of
call, in every dtype, for all of them: some 1400 kernels, 15 minutes of one core; Triton's cache keeps them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any
from unittest import mock

import pytest
import torch
from extent import ALL
from triton_aot import GPUS, Binary, Variant, calls, compile_for, meta, recorded

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

#: One call for each kernel and each kind of memory access.
SOME = (
    "group_norm_silu NCHW 320 64 all",
    "group_norm_silu NHWC 320 64",
    "group_norm_silu one group",
    "rms_norm_silu NCHW 384",
    "rms_norm_silu NHWC 2048",
    "adaln_modulate 1152",
    "adaln_modulate 9000",
    "adaln_modulate_dual 1536",
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
#: Of them, what is compiled for an AMD GPU too: a row kernel, and matrix products.
SOME_AMD = ("adaln_modulate 1152", "attention 40, 77 keys")
WIDE_LOAD = re.compile(
    r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64|v8\.b16|v8\.b32)|cp\.async\.[\w.]*shared[\w.]*global[^;]*0x10|load_dwordx[24]"
)
MATRIX = re.compile(r"mma\.sync|wgmma|tcgen05\.mma|v_mfma")
#: Its registers hold the whole row of logits; the others are bound by memory, and spills would be more of it.
MAY_SPILL = {"_flash"}


def check(variant: Variant, binary: Binary, gpu: int | str) -> None:
    assert binary.shared <= GPUS[gpu][0], f"{variant} wants {binary.shared} bytes of shared memory"
    name = variant.kernel.__name__
    if name not in MAY_SPILL:
        assert binary.stack == 0, f"{variant} spills {binary.stack} bytes at {binary.registers} registers"
    if variant.constants[0] > 1:
        assert WIDE_LOAD.search(binary.text), f"{variant} has no 16-byte load"
    if name in ("_flash", "_few_keys") and torch.float32 not in variant.dtypes[:3]:
        assert MATRIX.search(binary.text), f"{variant} has no matrix instruction"


def check_call(name: str, dtype: torch.dtype, gpu: int | str) -> set[str]:
    """Compile what the call launches; the names of the kernels."""
    with recorded(gpu) as launches:
        calls(dtype)[name]()
    assert launches
    for variant in launches:
        check(variant, compile_for(variant, gpu), gpu)
    return {f"{v.kernel.__module__}.{v.kernel.__name__}" for v in launches}


def kernels() -> dict[str, Any]:
    """Every kernel, by its name."""
    from fastdiff.backends.triton._launch import KERNELS

    calls(torch.bfloat16)  # imports all
    return {f"{k.__module__}.{k.__name__}": k for k in KERNELS}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel(capability: int) -> None:
    dtype = torch.float16 if capability == 80 else torch.bfloat16
    assert set().union(*(check_call(name, dtype, capability) for name in SOME)) == kernels().keys()


@pytest.mark.parametrize("name", SOME_AMD)
def test_amd(name: str) -> None:
    check_call(name, torch.bfloat16, "gfx942")


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="compiles for long; FASTDIFF_TEST_ALL=1 runs it")
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", calls(torch.bfloat16) if ALL else [])
def test_every_call(name: str, dtype: torch.dtype, gpu: int | str) -> None:
    check_call(name, dtype, gpu)


class Watched(dict[str, Any]):
    """A table that knows which entries were asked for."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_configuration_is_among_the_calls(gpu: int | str) -> None:
    from fastdiff.backends.triton import _config

    with recorded(gpu):
        table = Watched(_config.table(torch.device("meta")))
        with mock.patch.object(_config, "table", return_value=table):
            for dtype in (torch.bfloat16, torch.float32):
                for call in calls(dtype).values():
                    call()
    assert table.asked == table.keys() - {"torch_attention"}


def test_group_norm_fills_the_gpu() -> None:
    """A (sample, group) is not one program: 64 of them would leave half the processors idle."""
    for name in ("NCHW 320 64", "NHWC 320 64", "NCHW 128 512", "NHWC 128 512"):
        with recorded(90) as launches:
            calls(torch.bfloat16)[f"group_norm_silu {name}"]()
        assert [v.kernel.__name__ for v in launches] == ["_partial", "_apply"]
        assert all(v.grid >= GPUS[90][1] for v in launches), [v.grid for v in launches]


@pytest.mark.parametrize(
    "name", ["group_norm_silu NCHW 1280 8", "adaln_modulate_dual 1536", "scheduler_step", "cfg_combine rescaled"]
)
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


#: As in the docstring of fastdiff/backends/triton/attention.py: head dimension -> keys on sm_80, sm_89, sm_90, sm_100.
MOST_KEYS = {
    32: (512, 512, 512, 320),
    64: (512, 352, 512, 320),
    40: (160, 160, 512, 160),
    80: (160, 160, 512, 160),
    96: (160, 160, 512, 160),
    128: (160, 160, 416, 160),
    160: (160, 96, 160, 160),
    256: (128, 80, 128, 128),
}


@pytest.mark.parametrize("depth", MOST_KEYS)
def test_few_keys_stay_on_the_chip(depth: int) -> None:
    from fastdiff.backends.triton import attention

    for capability, most in zip((80, 89, 90, 100), MOST_KEYS[depth], strict=True):
        with recorded(capability) as launches:
            for keys in {1, 77, most, most + 1}:
                q, k = (meta(2, n, 8, depth) for n in (4096, keys))
                if keys <= most + 1:
                    launches.clear()
                    attention.run(q, k, k)
                    assert launches[0].kernel.__name__ == ("_few_keys" if keys <= most else "_flash"), keys


def test_no_scalar_is_specialized_on() -> None:
    """So that a new size, stride or coefficient compiles nothing."""
    for kernel in kernels().values():
        for function in (kernel.aligned, kernel.loose):
            assert {p.name for p in function.params if p.do_not_specialize} == {*kernel.scalars}
        assert all(p.do_not_specialize_on_alignment for p in kernel.loose.params if p.name in kernel.tensors)


def test_new_sizes_are_the_same_kernels() -> None:
    """Nothing that is compiled depends on resolution, batch or number of tokens; so nothing is compiled again."""
    from fastdiff.backends.triton import (
        adaln_modulate,
        adaln_modulate_dual,
        attention,
        cfg_combine,
        gate_residual,
        gate_residual_adaln,
        geglu,
        gelu_tanh,
        group_norm_silu,
        qk_norm_rope,
        scheduler_step,
        swiglu,
    )

    def call(batch: int, size: int) -> None:
        x = meta(batch, 320, size, size)
        group_norm_silu.run(x, 32, meta(320), meta(320), temb=meta(batch, 320))
        tokens = meta(batch, size * size, 640)
        modulation = meta(batch, 6 * 640).chunk(6, 1)
        adaln_modulate.run(tokens, modulation[0], modulation[1])
        adaln_modulate_dual.run(tokens, *modulation[:4])
        gate_residual.run(tokens, modulation[2], tokens)
        gate_residual_adaln.run(tokens, modulation[2], tokens, modulation[3], modulation[4])
        q = tokens.unflatten(-1, (8, 80))
        attention.run(q, q, q)
        attention.run(q, q[:, :77], q[:, :77])
        table = meta(size * size, 80, dtype=torch.float32)
        qk_norm_rope.run(q, q, meta(80), meta(80), None, None, table, table)
        geglu.run(tokens)
        swiglu.run(*tokens.chunk(2, -1))
        gelu_tanh.run(tokens)
        scheduler_step.run(x, x, [x], None, [1.0] * 5, [1.0, 1.0])
        cfg_combine.run(x, x, 7.5)
        cfg_combine.run(x, x, 7.5, 0.7)

    with recorded(90) as launches:
        call(2, 64)
        known = len(launches)
        for batch, size in ((1, 96), (3, 64), (2, 128), (4, 104)):
            call(batch, size)
    assert len(launches) == known

"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

Calls are made on meta tensors of real models' sizes; each launch is recorded with exactly the types, constants and
configuration that it would have on that GPU, and then compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: compute capability, or AMD's name -> (bytes of shared memory that a block can have, multiprocessors)
GPUS: dict[int | str, tuple[int, int]] = {
    80: (163 << 10, 108),
    89: (99 << 10, 128),
    90: (227 << 10, 132),
    100: (227 << 10, 148),
    "gfx942": (64 << 10, 304),
}

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1"}

_AMD = "vgpr_count", "private_segment_fixed_size"


@dataclass(frozen=True)
class Variant:
    """One launch's compile-time side."""

    kernel: Any
    dtypes: tuple[torch.dtype | None, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    grid: int = field(compare=False, default=0)

    def __str__(self) -> str:
        types = " ".join("-" if d is None else _NAMES[d] for d in self.dtypes)
        named = ", ".join(f"{k}={v}" for k, v in zip(self.kernel.constants, self.constants, strict=True))
        module = self.kernel.__module__.rpartition(".")[2]
        return f"{module}.{self.kernel.__name__}[{types}; {named}; {self.warps} warps]"


@dataclass(frozen=True)
class Binary:
    """A compiled variant: registers and spilled bytes per thread, shared bytes per block, and its assembly."""

    registers: int
    stack: int
    shared: int
    text: str


@contextmanager
def recorded(gpu: int | str) -> Iterator[list[Variant]]:
    """Within the block launches are recorded as for that GPU, not made."""
    from fastdiff.backends.triton import _config, _launch, _rows, attention, group_norm_silu

    launches: list[Variant] = []

    def launch(
        self: Any, grid: int, tensors: Any, scalars: Any, constants: Any, *, warps: int = 4, stages: int = 1
    ) -> None:
        assert 0 < grid < 2**31
        assert len(tensors) == len(self.tensors) and len(scalars) == len(self.scalars), self.__name__
        assert len(constants) == len(self.constants), self.__name__
        variant = Variant(self, tuple(None if t is None else t.dtype for t in tensors), constants, warps, stages, grid)
        if variant not in launches:
            launches.append(variant)

    def processors(_: torch.device) -> int:
        return GPUS[gpu][1]

    _config.forget()
    with (
        mock.patch.object(_launch.Kernel, "launch", launch),
        mock.patch.object(_config, "architecture", return_value=(0, 1) if isinstance(gpu, str) else divmod(gpu, 10)),
        mock.patch.object(_config, "cache_file", return_value=Path("/nonexistent")),
        mock.patch.object(_rows, "processors", processors),
        mock.patch.object(group_norm_silu, "processors", processors),
        mock.patch.object(attention, "processors", processors),
        mock.patch.object(attention, "on_chip", return_value=GPUS[gpu][0]),
    ):
        yield launches
    _config.forget()


def compile_for(variant: Variant, gpu: int | str) -> Binary:
    """Compile a variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastdiff.backends.triton._launch import OPTIONS

    kernel = variant.kernel
    names = [*kernel.tensors, *kernel.scalars, *kernel.constants]
    signature = dict.fromkeys(kernel.constants, "constexpr") | kernel.scalars
    constexprs: dict[str, Any] = dict(zip(kernel.constants, variant.constants, strict=True))
    wide = variant.constants[0] > 1
    attributes = {}
    for index, (name, dtype) in enumerate(zip(kernel.tensors, variant.dtypes, strict=True)):
        if dtype is None:
            signature[name], constexprs[name] = "constexpr", None
        else:
            signature[name] = "*" + _NAMES[dtype]
            if wide:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel.aligned if wide else kernel.loose, {n: signature[n] for n in names}, constexprs, attributes
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, **OPTIONS}
    if isinstance(gpu, str):
        compiled = triton.compile(source, target=GPUTarget("hip", gpu, 64), options=options)
        text = compiled.asm["amdgcn"]
        registers, stack = (int(re.findall(rf"\.{n}:\s+(\d+)", text)[-1]) for n in _AMD)
    else:
        compiled = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)
        text = compiled.asm["ptx"]
        registers, stack = _resources(compiled.asm["cubin"])
        # Beyond its columns the compiler leaves a kernel that does nothing, and the launch fails.
        tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
        assert tensor_memory <= 512, f"{variant} wants {tensor_memory} columns of tensor memory"
    return Binary(registers, stack, compiled.metadata.shared, text)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread; what does not fit into registers is spilled to the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)  # a cubin may have a second, tiny function
    assert found, text
    registers, stack = zip(*found, strict=True)
    return max(map(int, registers)), max(map(int, stack))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls of every op that together need every kind of launch, at sizes of SD1.5, SDXL, DiT, SD3, Flux and VAEs."""
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

    def t(*shape: int) -> Tensor:
        return meta(*shape, dtype=dtype)

    def last(*shape: int) -> Tensor:
        return t(*shape).to(memory_format=torch.channels_last)

    def heads(b: int, s: int, h: int, d: int) -> Tensor:
        return t(b, s, h * d).unflatten(-1, (h, d))

    found: dict[str, Callable[[], Any]] = {}
    for c, size in ((320, 64), (1280, 8), (128, 512)):
        w = t(c)
        for layout in (t, last):
            x = layout(2, c, size, size)
            key = f"group_norm_silu {'NCHW' if layout is t else 'NHWC'} {c} {size}"
            found[key] = lambda x=x, w=w: group_norm_silu.run(x, 32, w, w)
            found[key + " all"] = lambda x=x, w=w, c=c: group_norm_silu.run(
                x, 32, w, w, temb=t(2, c), scale=t(2, c), shift=t(2, c)
            )
            found[key + " tokens"] = lambda x=x, w=w: group_norm_silu.run(x, 32, w, w, silu=False, tokens=True)
    found["group_norm_silu one group"] = lambda: group_norm_silu.run(t(2, 768, 60, 60), 1, t(768), t(768))
    found["group_norm_silu odd"] = lambda: group_norm_silu.run(t(2, 320, 45, 45), 32, t(320), t(320))
    for d in (64, 320, 640, 1152, 1536, 3072, 8192, 9000):
        x, per_sample, per_token = t(2, 1024, d), t(2, 6 * d).chunk(6, 1), t(2, 1024, 4 * d).chunk(4, 2)
        found[f"adaln_modulate {d}"] = lambda x=x, m=per_sample: adaln_modulate.run(x, m[0], m[1])
        found[f"adaln_modulate {d} per token"] = lambda x=x, m=per_token: adaln_modulate.run(x, *m[:2])
        found[f"adaln_modulate {d} rms"] = lambda x=x, d=d: adaln_modulate.run(x, weight=t(d), rms=True)
        found[f"adaln_modulate_dual {d}"] = lambda x=x, m=per_sample: adaln_modulate_dual.run(x, *m[:4])
        found[f"adaln_modulate_dual {d} per token"] = lambda x=x, m=per_token: adaln_modulate_dual.run(x, *m)
        found[f"gate_residual {d}"] = lambda x=x, m=per_sample: gate_residual.run(x, m[2], x)
        found[f"gate_residual_adaln {d}"] = lambda x=x, m=per_sample: gate_residual_adaln.run(x, m[2], x, m[3], m[4])
        found[f"residual_adaln {d}"] = lambda x=x, m=per_sample: gate_residual_adaln.run(x, None, x, *m[:2])
    found["adaln_modulate odd"] = lambda: adaln_modulate.run(t(2, 7, 77), t(2, 77), t(2, 77))
    found["geglu"] = lambda: geglu.run(t(2, 4096, 2560))
    found["swiglu"] = lambda: swiglu.run(*t(2, 4096, 2 * 10240).chunk(2, -1))
    for name, options in (
        ("flux", {"text": True}),
        ("half", {"interleaved": False}),
        ("across heads", {"across_heads": True, "interleaved": False}),
    ):
        q, table = heads(2, 4096, 24, 128), meta(4608 if name == "flux" else 4096, 128, dtype=torch.float32)
        text = heads(2, 512, 24, 128) if options.pop("text", False) else None
        w = t(128 * (24 if "across" in name else 1))
        found[f"qk_norm_rope {name}"] = lambda q=q, w=w, c=table, text=text, o=options: qk_norm_rope.run(
            q, q, w, w, None, None, c, c, text, text, w if text is not None else None, None, **o
        )
    found["gelu_tanh"] = lambda: gelu_tanh.run(t(2, 1024, 4608))
    latent = t(2, 4, 128, 128)
    found["scheduler_step"] = lambda: scheduler_step.run(
        latent, latent, [latent] * 2, latent, [1.0] * 6, [1.0, 1.0], 1.0, None, torch.float32, [1.0] * 6
    )
    found["cfg_combine"] = lambda: cfg_combine.run(latent, latent, 7.5)
    found["cfg_combine rescaled"] = lambda: cfg_combine.run(latent, latent, 7.5, 0.7)
    for d in (40, 64, 72, 80, 88, 96, 112, 128, 160, 256, 512):
        q = heads(2, 4096, 8 if d < 512 else 1, d)
        found[f"attention {d}"] = lambda q=q: attention.run(q, q, q)
    for keys in (1, 77, 154, 300, 512):
        for d in (40, 64, 72, 128, 160):
            q, k = heads(2, 4096, 8, d), heads(2, keys, 8, d)
            found[f"attention {d}, {keys} keys"] = lambda q=q, k=k: attention.run(q, k, k)
    q = heads(2, 1000, 8, 64)
    for name, mask in (("bool", torch.bool), ("additive", dtype)):
        m = meta(2, 1, 1000, 1000, dtype=mask)
        found[f"attention {name}"] = lambda m=m, q=q: attention.run(q, q, q, m, return_lse=True)
        found[f"attention {name}, 77 keys"] = lambda m=m, q=q: attention.run(q, q[:, :77], q[:, :77], m[..., :77])
    found["attention causal"] = lambda: attention.run(q, q, q, is_causal=True)
    return found

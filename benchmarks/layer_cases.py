"""The kernels' cases: every op, on the layer shapes of real models, as Diffusers computes it and as we do.

Shapes are those of a forward at the sizes of :mod:`model_cases`: SD1.5 at 512 and SDXL at 1024 with batch 2, the VAE's
decoder, DiT-XL/2 at 256 and 512, SD3.5 medium and large and Flux dev at 1024, Wan 1.3B at 480p with 81 frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _targets import Target
from torch import Tensor

from fastdiff import ops

#: A case with more work than this takes a CPU minutes; it runs there only where --filter names it.
CPU_FLOPS, CPU_VALUES = 6e10, 1 << 26
#: Speed over torch's own attention on a GPU, by head dimension; at others that is chosen where it wins.
GPU_ATTENTION = {40: 1.15, 72: 1.15, 80: 1.15, 88: 1.0, 160: 1.0, 512: 2.0}
GPU_77_KEYS = 1.5
#: Share of the copy bandwidth, of what is bound by memory and has tensors of this size.
GPU_BANDWIDTH = {"cuda": 0.85, "triton": 0.8}
LARGE = 8 << 20


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        op: its name in :mod:`fastdiff.ops`.
        of: the models that have such a layer.
        make: dtype -> the arguments of ``eager`` and ``ours``, on torch's default device.
        eager: what Diffusers computes; also the reference, in fp64.
        targets: dtype name -> the eager/ours ratio this project set itself; ``"fp32 tuned"`` and the like where it is
            another one with the allocator's thresholds raised on both sides.
        flops: 0 for what is bound by memory.
        values: elements of the largest tensor.
        kwargs: options that :mod:`other_libraries` and targets need to know of.
    """

    op: str
    name: str
    of: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    targets: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    values: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def fits_cpu(self) -> bool:
        """Whether a CPU gets through it in seconds."""
        return self.flops <= CPU_FLOPS and self.values <= CPU_VALUES


def _targets(fp32: float, bf16: float) -> dict[str, float]:
    return {name: target for name, target in (("fp32", fp32), ("bf16", bf16)) if target}


def _randn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def group_norm(of: str, shape: tuple[int, ...], nhwc: bool = False, temb: bool = False, **targets: float) -> Case:
    """[time embedding +] GroupNorm + SiLU."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        x, c = _randn(dtype, *shape), shape[1]
        affine = (torch.randn(c) * 0.1 + 1).to(dtype), _randn(dtype, c)
        t = _randn(dtype, shape[0], c) if temb else None
        return (x.contiguous(memory_format=torch.channels_last) if nhwc else x), *affine, t

    def eager(x: Tensor, w: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
        if t is not None:
            x = x + t[:, :, None, None]
        return F.silu(F.group_norm(x, 32, w, b, 1e-5))

    def ours(x: Tensor, w: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
        return ops.group_norm_silu(x, 32, w, b, 1e-5, temb=t)

    targets = {name.replace("_", " "): target for name, target in targets.items()}
    name = f"{'temb + ' if temb else ''}GroupNorm + SiLU {list(shape)} {'NHWC' if nhwc else 'NCHW'}"
    kwargs = {"temb": temb, "nhwc": nhwc}
    return Case("group_norm_silu", name, of, make, eager, ours, targets, values=torch.Size(shape).numel(),
                kwargs=kwargs)  # fmt: skip


def rms_norm(of: str, shape: tuple[int, ...]) -> Case:
    """RMSNorm over channels + SiLU, as in video VAEs."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return _randn(dtype, *shape), (torch.randn(shape[1]) * 0.1 + 1).to(dtype)

    def eager(x: Tensor, gamma: Tensor) -> Tensor:
        normalized = F.normalize(x.float() if x.dtype != torch.float64 else x, dim=1).to(x.dtype)
        return F.silu(normalized * shape[1] ** 0.5 * gamma.view(-1, 1, 1, 1))

    def ours(x: Tensor, gamma: Tensor) -> Tensor:
        return ops.rms_norm_silu(x, gamma, None, 1e-12, clamp=True)

    name = f"RMSNorm over channels + SiLU {list(shape)}"
    return Case("rms_norm_silu", name, of, make, eager, ours, values=torch.Size(shape).numel())


def modulate(of: str, shape: tuple[int, int, int], count: int = 1, **targets: float) -> Case:
    """LayerNorm and one modulation or two, the modulations being slices of one projection."""
    batch, _, width = shape

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return _randn(dtype, *shape), *_randn(dtype, batch, 2 * count * width).chunk(2 * count, dim=1)

    def eager(x: Tensor, *modulations: Tensor) -> Any:
        y = F.layer_norm(x, (width,), eps=1e-6)
        pairs = zip(modulations[::2], modulations[1::2], strict=True)
        results = tuple(y * (1 + scale[:, None]) + shift[:, None] for scale, shift in pairs)
        return results if count > 1 else results[0]

    op = "adaln_modulate_dual" if count > 1 else "adaln_modulate"
    name = f"LayerNorm + {'two modulations' if count > 1 else 'modulate'} {list(shape)}"
    return Case(op, name, of, make, eager, partial(getattr(ops, op), eps=1e-6), targets,
                values=torch.Size(shape).numel())  # fmt: skip


def gate(of: str, shape: tuple[int, int, int], norm: bool, **targets: float) -> Case:
    """A gated residual, with or without the norm that follows it."""
    batch, _, width = shape

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        modulation = _randn(dtype, batch, 6, width)
        found = _randn(dtype, *shape), modulation[:, 2], _randn(dtype, *shape)
        return (*found, modulation[:, 4], modulation[:, 3]) if norm else found

    def eager(x: Tensor, g: Tensor, r: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Any:
        y = r + g[:, None] * x
        if scale is None or shift is None:
            return y
        return y, F.layer_norm(y, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    name = f"gate * x + residual{', LayerNorm + modulate' if norm else ''} [{','.join(map(str, shape))}]"
    op = "gate_residual_adaln" if norm else "gate_residual"
    return Case(op, name, of, make, eager, getattr(ops, op), targets, values=torch.Size(shape).numel())


def layer_norm(of: str, shape: tuple[int, int, int], residual: bool = True) -> Case:
    """An affine LayerNorm, with or without the residual before it."""
    width = shape[2]

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return (*_randn(dtype, 1 + residual, *shape).unbind(), *_randn(dtype, 2, width).unbind())

    def eager(x: Tensor, *others: Tensor) -> Any:
        weight, bias = others[-2:]
        if not residual:
            return F.layer_norm(x, (width,), weight, bias)
        y = x + others[0]
        return y, F.layer_norm(y, (width,), weight, bias)

    def ours(x: Tensor, *others: Tensor) -> Any:
        weight, bias = others[-2:]
        if not residual:
            return ops.adaln_modulate(x, None, None, weight, bias, 1e-5)
        return ops.gate_residual_adaln(x, None, others[0], None, None, weight, bias, 1e-5)

    name, op = ("residual + LayerNorm", "gate_residual_adaln") if residual else ("LayerNorm", "adaln_modulate")
    return Case(op, f"{name} {list(shape)}", of, make, eager, ours, values=torch.Size(shape).numel())


def activation(of: str, op: str, shape: tuple[int, int, int], **targets: float) -> Case:
    """The feed-forward's activation. ``shape`` is the projection's output, with both halves for GEGLU and SwiGLU."""

    def geglu(x: Tensor) -> Tensor:
        hidden, gates = x.chunk(2, dim=-1)
        return hidden * F.gelu(gates)

    def swiglu(x: Tensor) -> Tensor:
        gates, hidden = x.chunk(2, dim=-1)
        return F.silu(gates) * hidden

    title, eager, ours = {
        "geglu": ("GEGLU", geglu, ops.geglu),
        "swiglu": ("SwiGLU", swiglu, lambda x: ops.swiglu(*x.chunk(2, dim=-1))),
        "gelu_tanh": ("GELU-tanh", partial(F.gelu, approximate="tanh"), ops.gelu_tanh),
    }[op]
    name = f"{title} [{','.join(map(str, shape))}]"
    return Case(op, name, of, lambda dtype: (_randn(dtype, *shape),), eager, ours, targets,
                values=torch.Size(shape).numel())  # fmt: skip


def attention(of: str, b: int, h: int, sq: int, d: int, sk: int, **targets: float) -> Case:
    """Softmax attention; eager is ``scaled_dot_product_attention``, whatever of its kernels torch chooses."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(_randn(dtype, b, s, h * d).view(b, s, h, d) for s in (sq, sk, sk))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return o.transpose(1, 2).contiguous()

    return Case("attention", f"attention [{b},{h},{sq},{d}] x {sk} keys", of, make, eager, ops.attention, targets,
                flops=4 * b * h * sq * sk * d, values=b * h * sq * d,
                kwargs={"depth": d, "keys": sk})  # fmt: skip


def qk_norm_rope(of: str, b: int, s: int, h: int, d: int, text: int = 0, rope: bool = True, wan: bool = False) -> Case:
    """Norm of queries and keys, rotary embedding, joint sequence. ``wan``: one norm over all heads."""

    def make(dtype: torch.dtype) -> tuple[Any, ...]:
        width = h * d if wan else d
        stream = lambda n: tuple(_randn(dtype, b, n, h * d).view(b, n, h, d) for _ in range(2))  # noqa: E731
        weights = [torch.rand(width).to(dtype) + 0.5 for _ in range(4)]
        angles = torch.rand(s + text, d // 2).repeat_interleave(2, dim=1) * 6.28
        tables = (angles.cos(), angles.sin()) if rope else (None, None)
        joined = (*stream(text), *weights[2:]) if text else (None, None, None, None)
        return (*stream(s), *weights[:2], *tables, *joined)

    options = {"across_heads": wan, "text_first": rope}

    def call(op: Callable[..., Any], *args: Any) -> Any:
        q, k, q_weight, k_weight, cos, sin, *joined = args
        return op(q, k, q_weight, k_weight, None, None, cos, sin, *joined, **options)

    what = f"QK norm{' over heads' if wan else ''}{' + RoPE' if rope else ''}"
    name = f"{what} [{b},{s},{h},{d}]{f' with {text} text tokens' if text else ''}"
    op = ops.qk_norm_rope
    return Case("qk_norm_rope", name, of, make, partial(call, op.eager), partial(call, op),
                values=b * (s + text) * h * d, kwargs={"rope": rope, "text": text, "wan": wan})  # fmt: skip


def sampler_step(of: str, shape: tuple[int, ...]) -> Case:
    """DPM-Solver++ 2M's second step: one history entry, one new."""
    prev, entry = (0.8, 0.0, 0.3, 0.0, -0.1), (1.2, -0.7)
    call = lambda op, x, out, old: op(x, out, [old], None, prev, entry)[:2]  # noqa: E731
    op = ops.scheduler_step
    return Case("scheduler_step", f"sampler step, 2M {list(shape)}", of,
                lambda dtype: tuple(_randn(dtype, *shape) for _ in range(3)), partial(call, op.eager),
                partial(call, op), values=torch.Size(shape).numel())  # fmt: skip


def guidance(of: str, shape: tuple[int, ...], rescale: float = 0.0) -> Case:
    """Classifier-free guidance."""
    op, name = ops.cfg_combine, f"guidance{' with rescale' if rescale else ''} {list(shape)}"
    call = lambda op, u, c: op(u, c, 7.5, rescale)  # noqa: E731
    return Case("cfg_combine", name, of, lambda dtype: tuple(_randn(dtype, *shape) for _ in range(2)),
                partial(call, op.eager), partial(call, op), values=torch.Size(shape).numel())  # fmt: skip


def cases() -> Iterator[Case]:
    """The layers of the models, op by op."""
    sd, xl, vae, dit, sd3, flux, wan = "SD1.5", "SDXL", "SD VAE", "DiT-XL/2", "SD3.5 medium", "Flux", "Wan 1.3B"
    for nhwc in (False, True):
        yield group_norm(sd, (2, 320, 64, 64), nhwc, fp32=1.8, bf16=2.0)
        yield group_norm(f"{vae} 512", (1, 128, 512, 512), nhwc, fp32=2.0, bf16=2.0, fp32_tuned=2.5,
                         bf16_tuned=2.5)
        yield group_norm(sd, (2, 1280, 16, 16), nhwc)
        yield group_norm(xl, (2, 320, 128, 128), nhwc)
        yield group_norm(f"{vae} 512 and 1024", (1, 512, 128, 128), nhwc)
        yield group_norm(f"{vae} 1024", (1, 256, 512, 512), nhwc)
        yield group_norm(f"{vae} 1024", (1, 128, 1024, 1024), nhwc)
    yield group_norm(f"{sd}, up", (2, 1920, 32, 32))
    yield group_norm(sd, (2, 640, 32, 32), temb=True, fp32=2.0, bf16=2.5)
    yield group_norm(xl, (2, 640, 64, 64), temb=True)
    yield group_norm(xl, (2, 1280, 32, 32), temb=True)

    yield rms_norm("Wan VAE", (1, 96, 4, 240, 416))
    yield rms_norm("Wan VAE", (1, 384, 2, 120, 208))

    yield modulate(f"{dit} 512", (2, 1024, 1152), fp32=4.0, bf16=3.0)
    yield modulate(sd3, (1, 4096, 1536), fp32=4.0, bf16=3.0)
    yield modulate(f"{dit} 256", (2, 256, 1152))
    yield modulate(sd3, (2, 4096, 1536))
    yield modulate(f"{sd3} 512, dual attention", (2, 1024, 1536), count=2)
    yield modulate(f"{sd3}, dual attention", (2, 4096, 1536), count=2)
    yield modulate("SD3.5 large", (2, 4096, 2432))
    yield modulate(f"{flux}, single blocks", (1, 4608, 3072))
    yield modulate(wan, (1, 32760, 1536))

    yield gate(f"{dit} 512", (2, 1024, 1152), norm=False, fp32=2.0, bf16=2.5)
    yield gate(f"{flux}, single blocks", (1, 4608, 3072), norm=False)
    yield gate(f"{dit} 512", (2, 1024, 1152), norm=True)
    yield gate(sd3, (2, 4096, 1536), norm=True)
    yield gate(flux, (1, 4096, 3072), norm=True)
    yield gate(wan, (1, 32760, 1536), norm=True)

    yield layer_norm(sd, (2, 4096, 320), residual=False)
    yield layer_norm(sd, (2, 4096, 320))
    yield layer_norm(xl, (2, 4096, 640))
    yield layer_norm(f"{sd} and {xl}", (2, 1024, 1280))

    yield activation(sd, "geglu", (2, 4096, 2560), fp32=4.0, bf16=2.5)
    yield activation(f"{sd} and {xl}", "geglu", (2, 4096, 5120))
    yield activation(xl, "geglu", (2, 1024, 10240))
    yield activation(f"{dit} 512", "gelu_tanh", (2, 1024, 4608), fp32=3.0, bf16=4.0)
    yield activation(sd3, "gelu_tanh", (2, 4096, 6144))
    yield activation(flux, "gelu_tanh", (1, 4096, 12288))
    yield activation(wan, "gelu_tanh", (1, 32760, 8960))
    yield activation("Z-Image", "swiglu", (1, 4096, 20480))

    yield qk_norm_rope(sd3, 2, 4096, 24, 64, text=333, rope=False)
    yield qk_norm_rope(f"{flux}, double blocks", 1, 4096, 24, 128, text=512)
    yield qk_norm_rope(f"{flux}, single blocks", 1, 4608, 24, 128)
    yield qk_norm_rope(wan, 1, 32760, 12, 128, wan=True)

    yield attention(sd, 2, 8, 4096, 40, 77, fp32=1.5, bf16=3.0)
    yield attention(f"{dit} 512", 2, 16, 1024, 72, 1024, fp32=1.1, bf16=1.8)
    yield attention(sd, 2, 8, 1024, 80, 1024, fp32=1.1, bf16=1.8)
    yield attention(sd, 2, 8, 4096, 40, 4096)
    yield attention(sd, 2, 8, 256, 160, 256)
    yield attention(f"{dit} 256", 2, 16, 256, 72, 256)
    yield attention(f"{xl} 512", 2, 10, 1024, 64, 77)
    yield attention(f"{xl} 512", 2, 10, 1024, 64, 1024)
    yield attention(xl, 2, 10, 4096, 64, 77)
    yield attention(xl, 2, 10, 4096, 64, 4096)
    yield attention(xl, 2, 20, 1024, 64, 1024)
    yield attention(f"{vae} 256", 1, 1, 1024, 512, 1024)
    yield attention(f"{vae} 512", 1, 1, 4096, 512, 4096)
    yield attention(f"{vae} 1024", 1, 1, 16384, 512, 16384)
    yield attention(sd3, 2, 24, 4429, 64, 4429)
    yield attention(flux, 1, 24, 4608, 128, 4608)
    yield attention(f"{wan}, text", 1, 12, 32760, 128, 512)
    yield attention(wan, 1, 12, 32760, 128, 32760)

    yield sampler_step(sd, (2, 4, 64, 64))
    yield sampler_step(wan, (1, 16, 21, 60, 104))
    yield guidance(xl, (1, 4, 128, 128))
    yield guidance(xl, (1, 4, 128, 128), rescale=0.7)
    yield guidance(wan, (1, 16, 21, 60, 104))


def gpu_cases() -> Iterator[Case]:
    """The layers of the models, with a GPU's targets, and attention where others pad head dimensions or few keys."""
    for case in cases():
        yield replace(case, targets=_gpu_attention(case))
    for depth in (40, 64, 72, 80, 88, 96, 128, 160):
        case = attention("a sweep of head dimensions", 2, 16, 4096, depth, 4096)
        yield replace(case, targets=_gpu_attention(case))
    for depth, keys in ((64, 77), (40, 154), (64, 154), (40, 300), (64, 300), (40, 512), (64, 512)):
        case = attention("a sweep of few keys", 2, 8, 4096, depth, keys)
        yield replace(case, targets=_gpu_attention(case))


def _gpu_attention(case: Case) -> dict[str, float]:
    if case.op != "attention":
        return {}
    target = GPU_77_KEYS if case.kwargs["keys"] == 77 else GPU_ATTENTION.get(case.kwargs["depth"])
    return dict.fromkeys(("bf16", "fp16"), target) if target else {}


def memory_targets(case: Case, itemsize: int, backends: Iterable[str]) -> list[Target]:
    """What the kernels of these backends are to reach on a GPU where memory is the limit, beside their speed-up."""
    if case.flops:
        return []
    of = {backend: f"fastdiff {backend}" for backend in backends if backend in GPU_BANDWIDTH}
    found = [Target("speed", 1.0, about="torch.compile", of=name) for name in of.values()]
    if len(of) > 1:
        found.append(Target("speed", 1.0, about=of["triton"], of=of["cuda"]))
    if case.values * itemsize >= LARGE:
        found += [Target("bandwidth", GPU_BANDWIDTH[backend], of=name) for backend, name in of.items()]
    return found

"""The CPU backend: the C++ kernels of ``csrc/cpu``, and what each accepts.

Every kernel takes float32, bfloat16 and float16, computes in fp32 and rounds once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import _extension
from fastdiff.backends import GRADIENT, Kernel, Refuse, _cpu_step, register, tensor_reason, unavailable

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd


def run_overload(op: str) -> Callable[..., Any]:
    """A call of ``torch.ops.fastdiff.<op>``, which dispatches to the kernel of the tensors' device."""
    overload = getattr(torch.ops.fastdiff, op).default
    builtin = overload._op  # what a call of the overload calls, 0.6 us later

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args, **kwargs)
        # refuse() has excluded gradients, so the Python kernel at the Autograd key (2 us) is skipped.
        with _AutoDispatchBelowAutograd():
            return builtin(*args, **kwargs)

    return run


def _reason(*tensors: Tensor | None) -> str | None:
    return tensor_reason("cpu", DTYPES, *tensors)


def _rows_reason(x: Tensor, *tensors: Tensor | None) -> str | None:
    if x.dim() > 5:
        return f"x has {x.dim()} axes, more than 5"
    for t in (x, *tensors):
        if t is not None and t.stride()[-1] != 1 and t.shape[-1] != 1:
            return "a tensor's last axis is not contiguous"
    return _reason(x, *tensors)


def _adaln_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    if out_dtype is not None and out_dtype not in DTYPES:
        return f"out_dtype is {str(out_dtype)[6:]}"
    return _rows_reason(x, scale, shift, weight, bias)


def _adaln_modulate_dual(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _rows_reason(x, scale2, shift2) or _adaln_modulate(x, scale, shift, weight, bias, out_dtype=out_dtype)


def _gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> str | None:
    if x.dtype != residual.dtype:
        return f"x is {str(x.dtype)[6:]} and residual {str(residual.dtype)[6:]}"
    return _rows_reason(x, gate, residual)


def _gate_residual_adaln(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
) -> str | None:
    if x.dtype != residual.dtype:
        return f"x is {str(x.dtype)[6:]} and residual {str(residual.dtype)[6:]}"
    return _rows_reason(x, gate, residual, scale, shift, weight, bias)


def _contiguous_only(x: Tensor) -> str | None:
    return _reason(x) or (None if x.is_contiguous() else "x is not contiguous")


def _group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                     eps: float = 1e-5, *, temb: Tensor | None = None, scale: Tensor | None = None,
                     shift: Tensor | None = None, silu: bool = True, tokens: bool = False) -> str | None:
    return _reason(x, weight, bias, temb, scale, shift)


def _rms_norm_silu(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *,
                   scale: Tensor | None = None, shift: Tensor | None = None, clamp: bool = False,
                   silu: bool = True) -> str | None:
    return _reason(x, weight, bias, scale, shift)


def _strided(t: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of a tensor's axes, merged where that is possible, without those of size 1."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            size *= axes.pop()[0]
        axes.append((size, stride))
    return axes


def _swiglu(gate: Tensor, x: Tensor) -> str | None:
    if not (gate.is_contiguous() and x.is_contiguous()) and gate.numel():
        layouts = [_strided(t) for t in (gate, x)]
        widths = {axes[-1][0] for axes in layouts if len(axes) > 1}
        if any(len(axes) > 2 or axes[-1][1] != 1 for axes in layouts if axes) or len(widths) > 1:
            return "gate and x are not evenly strided rows of one length"
    return _reason(gate, x)


def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    text_q: Tensor | None = None,
    text_k: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    rms: bool = True,
    across_heads: bool = False,
    interleaved: bool = True,
    text_first: bool = True,
    rope_start: int = 0,
) -> str | None:
    affine = q_weight, k_weight, q_bias, k_bias, text_q_weight, text_k_weight
    for t in (q, k, text_q, text_k, *affine):
        if t is not None and t.stride()[-1] != 1 and t.shape[-1] > 1:
            return "a tensor's last axis is not contiguous"
    for t in (cos, sin):
        if t is not None and t.dtype != torch.float32:
            return f"a rotary table is {str(t.dtype)[6:]}"
    if cos is not None:
        if cos.stride(-1) != 1 or (sin is None and cos.stride(-2) != 2):
            return "a rotary table's last axis is not contiguous"
        if sin is not None and sin.stride() != cos.stride():
            return "cos and sin are laid out differently"
    return _reason(q, k, text_q, text_k, *affine, cos, sin)


def _scheduler_step(
    sample: Tensor, model_output: Tensor, history: Sequence[Tensor], noise: Tensor | None, *args: Any, **kwargs: Any
) -> str | None:
    if len(history) > 8:
        return f"there are {len(history)} history tensors, more than 8"
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype) and value not in DTYPES:
            return f"a result's dtype is {str(value)[6:]}"
    tensors = sample, model_output, noise, *history
    if not sample.is_contiguous():
        # The kernel runs over memory in order, and copies what is laid out otherwise only to contiguous.
        if not (sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last)):
            return "sample is neither contiguous nor channels_last"
        if any(t is not None and t.stride() != sample.stride() for t in tensors):
            return "a tensor is not laid out like sample"
    return _reason(*tensors)


def _cfg_combine(
    uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> str | None:
    if not (uncond.is_contiguous() and cond.is_contiguous()):
        return "a tensor is not contiguous"
    return _reason(uncond, cond)


_MASK_DTYPES = DTYPES | {torch.bool}


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> str | None:
    depth, keys = q.shape[3], k.shape[1]
    if not (depth and keys):
        return "there are no keys" if depth else "the head dimension is 0"
    if v.shape[3] != depth:
        return f"v's head dimension is {v.shape[3]} and q's {depth}"
    if depth > 256:  # where, besides, fp32 sums of products in their order lose: 1.9 times eager's error at 512
        return f"torch's attention is as fast at head dimension {depth}, where the matrix products are nearly all"
    if depth > 1 and (q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1):
        return "the last axis of q, k or v is not contiguous"
    if scale is not None and not scale > 0:
        return f"scale is {scale}, not positive"
    if attn_mask is None:
        return _reason(q, k, v)
    if attn_mask.shape[-1] != keys or (attn_mask.stride(-1) != 1 and keys > 1):
        return "attn_mask is broadcast along the keys or not contiguous along them"
    return _reason(q, k, v) or tensor_reason("cpu", _MASK_DTYPES, attn_mask)


def _adaln_modulate_backward(
    grad: Tensor, x: Tensor, factor: Tensor | None, eps: float, rms: bool, grad_x: Tensor | None
) -> str | None:
    return _reason(grad, x, factor, grad_x)


def _group_norm_silu_backward(
    grad: Tensor, x: Tensor, num_groups: int, factor: Tensor | None, offset: Tensor | None, temb: Tensor | None,
    eps: float, silu: bool, channels_last: bool,
) -> str | None:  # fmt: skip
    return _reason(grad, x, factor, offset, temb)


REFUSE: dict[str, Refuse] = {
    "adaln_modulate": _adaln_modulate,
    "adaln_modulate_backward": _adaln_modulate_backward,
    "adaln_modulate_dual": _adaln_modulate_dual,
    "attention": _attention,
    "cfg_combine": _cfg_combine,
    "gate_residual": _gate_residual,
    "gate_residual_adaln": _gate_residual_adaln,
    "gate_residual_backward": _reason,
    "geglu": _contiguous_only,
    "gelu_tanh": _contiguous_only,
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_backward": _group_norm_silu_backward,
    "qk_norm_rope": _qk_norm_rope,
    "rms_norm_silu": _rms_norm_silu,
    "scheduler_step": _scheduler_step,
    "swiglu": _swiglu,
}


#: Below this many values eager's backward is as fast: a call of ours costs about 100 us more.
SMALL = 1 << 18


def _differentiable(x: Tensor, *modulations: Tensor | None) -> str | None:
    if x.numel() < SMALL:
        return f"{GRADIENT}, and for this size eager's backward is as fast"
    for t in modulations:
        if t is not None and t.shape[1:-1].numel() != 1:
            return f"{GRADIENT}, and the modulation is per token"
    return None


def _differentiable_adaln(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *args: Any,
    out_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> str | None:
    if out_dtype not in (None, x.dtype):
        return f"{GRADIENT}, and out_dtype is not x's"
    return _differentiable(x, scale, shift)


def _differentiable_dual(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    *args: Any,
    out_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> str | None:
    return _differentiable_adaln(x, scale, shift, out_dtype=out_dtype) or _differentiable(x, scale2, shift2)


def _differentiable_gate_adaln(
    x: Tensor,
    gate: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    return _differentiable(x, gate, scale, shift)


#: For the ops with a backward: why the CPU's does not serve a call, or ``None``.
DIFFERENTIABLE: dict[str, Refuse] = {
    "adaln_modulate": _differentiable_adaln,
    "adaln_modulate_dual": _differentiable_dual,
    "gate_residual": lambda x, gate, residual: _differentiable(x, gate),
    "gate_residual_adaln": _differentiable_gate_adaln,
    "group_norm_silu": lambda x, *args, **kwargs: _differentiable(x),
}
_BACKWARD = ("adaln_modulate_backward", "gate_residual_backward", "group_norm_silu_backward")


def register_kernels() -> None:
    """Register what the loaded extension can run on this CPU, or note why it cannot."""
    reason = _extension.why_not_cpu()
    if reason is not None:
        unavailable["cpu"] = reason
        return
    for op, refuse in REFUSE.items():
        # An extension from before an op was added runs the others.
        if _built(op):
            differentiable = DIFFERENTIABLE.get(op)
            if differentiable is not None and not all(map(_built, _BACKWARD)):
                differentiable = None
            run = run_overload(op)
            prepare = None
            if op == "scheduler_step":
                prepare, run = functools.partial(_cpu_step.prepare, run), _cpu_step.directly(run)
            register(Kernel(op, "cpu", run, refuse, differentiable, prepare=prepare))


def _built(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{op}", "CPU")

"""What the GPU backends share: what their kernels refuse, and the folding of axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.backends import Refuse, tensor_reason

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
MASK_DTYPES = DTYPES | {torch.bool}

Layout = tuple[torch.Size, tuple[int, ...]]

#: The largest head dimension of the attention kernels.
DEEPEST = 512
#: Up to here keys are few: keys and values may stay on the chip.
FEW_KEYS = 512
#: By compute capability: head dimensions at which torch's attention, in half precision and with many keys, is faster.
#: cuDNN's against the Triton tutorial's at 4096 keys, H100, TFLOP/s: 408 to 348 at 64, 609 to 458 at 128
#: (github.com/pytorch/benchmark, pull requests 2370 and 2391); kernels with mma.sync are slower than that tutorial's.
TORCH_ATTENTION = {(9, 0): (64, 128), (10, 0): (64, 128)}
TORCH_ATTENTION_SOURCE = "published figures of an H100"


def why_torch_attends(q: Tensor, k: Tensor, depths: tuple[int, ...], source: str) -> str | None:
    """Why torch's attention is the faster one for a call; ``depths``: where it is, with as many keys."""
    if q.dtype == torch.float32 or q.shape[3] not in depths:
        return None
    keys = f"{'at most' if k.shape[1] <= FEW_KEYS else 'more than'} {FEW_KEYS} keys"
    return f"torch's attention is the faster one at head dimension {q.shape[3]} and {keys} ({source})"


@functools.lru_cache(maxsize=4096)
def fold(
    shape: torch.Size, layouts: tuple[Layout | None, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The axes of ``shape`` but the last, merged where all tensors allow it.

    Args:
        shape: (..., D).
        layouts: (shape, stride) of each tensor, which broadcasts to ``shape`` as modulations do
            (:func:`fastdiff.ops.adaln_modulate.align_modulation`); ``None`` for an absent one.

    Returns:
        The merged sizes, at least one, and for each tensor its strides along them, 0 where it is broadcast.
    """
    outer = shape[:-1]
    strides = [_broadcast(outer, layout) for layout in layouts]
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in layouts]
    for axis, size in enumerate(outer):
        if size == 1:
            continue
        if sizes and all(m[-1] == s[axis] * size for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[axis]
        else:
            sizes.append(size)
            for m, s in zip(merged, strides, strict=True):
                m.append(s[axis])
    if not sizes:
        return (1,), tuple((0,) for _ in layouts)
    return tuple(sizes), tuple(tuple(m) for m in merged)


def _broadcast(outer: torch.Size, layout: Layout | None) -> list[int]:
    if layout is None or len(layout[0]) == 1:
        return [0] * len(outer)
    size, stride = layout
    if len(size) < len(outer) + 1:  # (B, D) or (B, 1, D), per sample
        size, stride = torch.Size((size[0], *(1,) * (len(outer) - 1))), (stride[0], *(0,) * (len(outer) - 1))
    return [0 if n == 1 else s for n, s in zip(size[: len(outer)], stride, strict=False)]


def refusals(device: str, table_dtypes: frozenset[torch.dtype] = DTYPES) -> dict[str, Refuse]:
    """What no GPU kernel takes, by op: functions of the op's arguments, as :class:`fastdiff.backends.Kernel` wants.

    Args:
        device: the device type the tensors must be on.
        table_dtypes: what rotary tables may be of.
    """

    def apart(x: Tensor, *others: Tensor | None) -> str | None:
        index = x.get_device()
        for t in others:
            if t is not None and t.get_device() != index:
                return f"tensors are on {x.device} and {t.device}"
        return None

    def reason(x: Tensor, *others: Tensor | None) -> str | None:
        return tensor_reason(device, DTYPES, x, *others) or apart(x, *others)

    def rows(x: Tensor, *tensors: Tensor | None) -> str | None:
        for t in (x, *tensors):
            if t is not None and t.stride()[-1] != 1 and t.shape[-1] != 1:
                return "a tensor's last axis is not contiguous"
        layouts = tuple(None if t is None else (t.shape, t.stride()) for t in (x, *tensors))
        if len(x.shape) > 4 and len(fold(x.shape, layouts)[0]) > 3:
            return "the axes before the last do not merge into three"
        return reason(x, *tensors)

    def adaln_modulate(
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
        return _affine(weight, bias) or rows(x, scale, shift) or reason(x, weight, bias)

    def adaln_modulate_dual(
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
        return rows(x, scale, shift, scale2, shift2) or adaln_modulate(x, None, None, weight, bias, out_dtype=out_dtype)

    def gate_residual(x: Tensor, gate: Tensor, residual: Tensor) -> str | None:
        return _two_dtypes(x, residual) or rows(x, gate, residual)

    def gate_residual_adaln(
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
        return (
            _two_dtypes(x, residual)
            or _affine(weight, bias)
            or rows(x, gate, residual, scale, shift)
            or reason(x, weight, bias)
        )

    def contiguous_only(x: Tensor) -> str | None:
        return reason(x) or (None if x.is_contiguous() else "x is not contiguous")

    def group_norm_silu(
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *,
        temb: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = True,
        tokens: bool = False,
    ) -> str | None:
        return _affine(weight, bias) or reason(x, weight, bias, temb, scale, shift)

    def rms_norm_silu(
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        clamp: bool = False,
        silu: bool = True,
    ) -> str | None:
        return _affine(weight, bias) or reason(x, weight, bias, scale, shift)

    def scheduler_step(
        sample: Tensor,
        model_output: Tensor,
        history: Sequence[Tensor],
        noise: Tensor | None,
        prev: Sequence[float],
        entry: Sequence[float],
        clip: float | None = None,
        prev_dtype: torch.dtype | None = None,
        entry_dtype: torch.dtype | None = None,
        kept: Sequence[float] = (),
        kept_dtype: torch.dtype | None = None,
    ) -> str | None:
        if len(history) > 8:
            return f"there are {len(history)} history tensors, more than 8"
        for dtype in (prev_dtype, entry_dtype, kept_dtype):
            if dtype is not None and dtype not in DTYPES:
                return f"a result's dtype is {str(dtype)[6:]}"
        if not sample.is_contiguous():
            # A kernel runs over memory in order, and copies what is laid out otherwise only to contiguous.
            if not (sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last)):
                return "sample is neither contiguous nor channels_last"
            for t in (model_output, noise, *history):
                if t is not None and t.stride() != sample.stride():
                    return "a tensor is not laid out like sample"
        return reason(sample, model_output, noise, *history)

    def cfg_combine(
        uncond: Tensor, cond: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
    ) -> str | None:
        if not (uncond.is_contiguous() and cond.is_contiguous()):
            return "a tensor is not contiguous"
        return reason(uncond, cond)

    def attention(
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
        if depth > DEEPEST:
            return f"the head dimension is {depth}, more than {DEEPEST}"
        if depth > 1 and (q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1):
            return "the last axis of q, k or v is not contiguous"
        if scale is not None and not scale > 0:
            return f"scale is {scale}, not positive"
        return reason(q, k, v) or tensor_reason(device, MASK_DTYPES, attn_mask) or apart(q, attn_mask)

    def swiglu(gate: Tensor, x: Tensor) -> str | None:
        for t in (gate, x):
            if t.dim() and t.stride(-1) != 1 and t.shape[-1] != 1:
                return "a tensor's last axis is not contiguous"
        if gate.dim() and len(fold(gate.shape, ((gate.shape, gate.stride()), (x.shape, x.stride())))[0]) > 2:
            return "the axes before the last do not merge into two"
        return reason(gate, x)

    def qk_norm_rope(
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
            if t is not None and t.stride(-1) != 1 and t.shape[-1] > 1:
                return "a tensor's last axis is not contiguous"
        normed = q.shape[3] * (max(q.shape[2], k.shape[2]) if across_heads else 1)
        if normed > 16384:
            return f"the norm is over {normed} elements, more than 16384"
        if cos is not None:
            if cos.stride(-1) != 1 or (sin is None and cos.stride(-2) != 2):
                return "a rotary table's last axis is not contiguous"
            if sin is not None and sin.stride() != cos.stride():
                return "cos and sin are laid out differently"
        found = reason(q, k, text_q, text_k, *affine)
        return found or tensor_reason(device, table_dtypes, cos, sin) or apart(q, cos, sin)

    return {
        "adaln_modulate": adaln_modulate,
        "adaln_modulate_dual": adaln_modulate_dual,
        "attention": attention,
        "cfg_combine": cfg_combine,
        "gate_residual": gate_residual,
        "gate_residual_adaln": gate_residual_adaln,
        "geglu": contiguous_only,
        "gelu_tanh": contiguous_only,
        "group_norm_silu": group_norm_silu,
        "qk_norm_rope": qk_norm_rope,
        "rms_norm_silu": rms_norm_silu,
        "scheduler_step": scheduler_step,
        "swiglu": swiglu,
    }


def _two_dtypes(x: Tensor, residual: Tensor) -> str | None:
    if x.dtype != residual.dtype:
        return f"x is {str(x.dtype)[6:]} and residual {str(residual.dtype)[6:]}"
    return None


def _affine(weight: Tensor | None, bias: Tensor | None) -> str | None:
    for t in (weight, bias):
        if t is not None and not t.is_contiguous():
            return "weight or bias is not contiguous"
    return None

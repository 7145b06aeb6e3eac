"""The CUDA backend: the C++ kernels of ``csrc/cuda``, and what each accepts.

Every kernel takes float32, bfloat16 and float16, computes in fp32 and rounds once.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastdiff import _extension
from fastdiff.backends import Kernel, Refuse, register, unavailable
from fastdiff.backends._facts import fact
from fastdiff.backends._gpu import (
    DTYPES,
    FEW_KEYS,
    TORCH_ATTENTION,
    TORCH_ATTENTION_SOURCE,
    refusals,
    why_torch_attends,
)
from fastdiff.backends.cpu import run_overload
from fastdiff.backends.losses import first_tensor, is_measured

#: As in csrc/cuda: elements of a channel of group_norm_silu, channels of its groups, and those of rms_norm_silu;
#: queries or keys of attention, and elements from one to the next in its mask.
MAX_PIXELS, MAX_GROUP_CHANNELS, MAX_RMS_CHANNELS = 2**31, 32768, 4096
MAX_TOKENS, MAX_MASK_STRIDE = 2**30, 2**23
#: Of rows, as in csrc/cpu/adaln.h.
MAX_AXES = 5
#: Rotary tables are rounded to fp32 where they are finer.
TABLE_DTYPES = DTYPES | {torch.float64}


def why_not() -> str | None:
    """Why no CUDA kernel can run with this installation, or ``None``. GPUs are looked at when tensors come."""
    if _extension.module is None:
        return _extension.error
    build = _extension.build_info().get("cuda", {})
    if not build.get("built"):
        return f"the extension was built without CUDA: {build.get('reason', 'it predates the CUDA kernels')}"
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA and sees no GPU"
    return None


def architecture_reason(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Why none of the architectures an extension was built for serves a GPU, or ``None``.

    Machine code (``sm_*``) serves its own major capability, from its minor one on, and with the suffix "a" exactly
    its own; PTX (``compute_*``) serves the same and every later one.
    """
    for name in architectures:
        kind, major, minor, suffix = re.fullmatch(r"(sm|compute)_(\d+)(\d)(\D?)", name).groups()  # type: ignore[union-attr]
        built = int(major), int(minor)
        if capability == built or (
            not suffix and capability >= built and (kind == "compute" or capability[0] == built[0])
        ):
            return None
    built_for = ", ".join(architectures)
    return f"the kernels were built for {built_for}, and this GPU is sm_{capability[0]}{capability[1]}"


@fact
def device_reason(index: int) -> str | None:
    """Why a GPU of this process cannot run the kernels, or ``None``."""
    return architecture_reason(
        torch.cuda.get_device_capability(index), _extension.build_info()["cuda"]["architectures"]
    )


@fact
def _torch_depths(device: torch.device) -> tuple[int, ...]:
    return () if is_measured(device, "attention") else TORCH_ATTENTION.get(torch.cuda.get_device_capability(device), ())


def torch_is_faster(q: Tensor, k: Tensor, *_: Any, **__: Any) -> str | None:
    """Why a call of ``attention`` is better left to torch, or ``None``."""
    if k.shape[1] <= FEW_KEYS:
        return None
    return why_torch_attends(q, k, _torch_depths(q.device), TORCH_ATTENTION_SOURCE)


def _too_many_axes(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return f"x has {x.dim()} axes, more than {MAX_AXES}" if x.dim() > MAX_AXES else None


def _group_too_large(x: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> str | None:
    if (channels := x.shape[1] // num_groups) > MAX_GROUP_CHANNELS:
        return f"a group has {channels} channels, more than {MAX_GROUP_CHANNELS}"
    return "a channel has 2^31 elements or more" if x.shape[2:].numel() >= MAX_PIXELS else None


def _too_many_channels(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return f"there are {x.shape[1]} channels, more than {MAX_RMS_CHANNELS}" if x.shape[1] > MAX_RMS_CHANNELS else None


def _beyond_32_bits(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> str | None:
    if max(q.shape[1], k.shape[1]) > MAX_TOKENS:
        return f"there are {max(q.shape[1], k.shape[1])} queries or keys, more than 2^30"
    if attn_mask is not None:
        for size, stride in zip(attn_mask.shape[-2:], attn_mask.stride()[-2:], strict=True):
            if size > 1 and stride > MAX_MASK_STRIDE:
                return f"attn_mask's queries or keys lie {stride} elements apart, more than 2^23"
    return None


#: What these kernels refuse beyond what all GPU kernels do: sizes that no model has.
_LIMITS: dict[str, Refuse] = {
    "adaln_modulate": _too_many_axes,
    "adaln_modulate_dual": _too_many_axes,
    "attention": _beyond_32_bits,
    "gate_residual": _too_many_axes,
    "gate_residual_adaln": _too_many_axes,
    "group_norm_silu": _group_too_large,
    "rms_norm_silu": _too_many_channels,
}
#: The ops that have a CUDA kernel.
OPS = (
    "adaln_modulate",
    "adaln_modulate_dual",
    "attention",
    "cfg_combine",
    "gate_residual",
    "gate_residual_adaln",
    "geglu",
    "gelu_tanh",
    "group_norm_silu",
    "qk_norm_rope",
    "rms_norm_silu",
    "scheduler_step",
    "swiglu",
)


def refuse_table(device: str) -> dict[str, Refuse]:
    """What the kernels refuse, by op, of tensors on ``device`` (the emulation of the kernels takes them on the CPU)."""
    shared = refusals(device, TABLE_DTYPES)

    def refuse(op: str) -> Refuse:
        general, limit = shared[op], _LIMITS.get(op)

        def of_call(*args: Any, **kwargs: Any) -> str | None:
            reason = general(*args, **kwargs) or (limit(*args, **kwargs) if limit else None)
            if reason is not None or device != "cuda":
                return reason
            first = first_tensor(args, kwargs)
            return device_reason(first.get_device())

        return of_call

    return {op: refuse(op) for op in OPS}


def register_kernels() -> None:
    """Register what the loaded extension can run on a GPU, or note why it cannot."""
    reason = why_not()
    if reason is not None:
        unavailable["cuda"] = reason
        return
    for op, refuse in refuse_table("cuda").items():
        # An extension from before an op was added runs the others.
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdiff::{op}", "CUDA"):
            yields = torch_is_faster if op == "attention" else None
            register(Kernel(op, "cuda", run_overload(op), refuse, yields=yields, on_request=True))

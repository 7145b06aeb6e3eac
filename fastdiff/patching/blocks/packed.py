"""Convolutions and linear layers with their weights packed once, in the blocked layout that oneDNN computes in.

Eager CPU layers in bf16 and fp16 reorder their weight into that layout at every call. In the deep levels of a
U-Net, whose weights are many times larger than their activations, this takes longer than the convolution.
``torch.compile`` with freezing packs ahead as well; here a change of the weight is seen, and it is packed again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.backends import Choice, overridden, tensor_reason
from fastdiff.patching._patch import Patch

#: A weight is compared by this many runs of this many neighbouring elements, evenly spread.
_RUNS, _RUN = 32, 16
#: Linear layers with fewer weights are as fast as they are.
_SMALL_LINEAR = 1 << 16


class _Packed(NamedTuple):
    """A packed weight and what it was made from."""

    weight: weakref.ref[Tensor]
    data_ptr: int
    version: int
    geometry: Any
    sample: Tensor
    packed: Tensor


class PackedWeight:
    """The packed copy of one layer's weight: made at first use, and again whenever the weight changes.

    A change is seen by the parameter's identity, address, dtype and version counter, and by a sample of 512
    elements, because PEFT (fusing a LoRA) and others write through ``.data``, which counts no version. In-place
    operations on the parameter itself, loading a state dict, casting, moving and replacing it are always seen. A
    write that bypasses the version counter is missed if it leaves all 512 sampled elements as they were: so
    dense updates, as every fused LoRA is, are seen, and an edit of a few elements through ``.data`` may not be.

    The copy is never part of a state dict, a pickle or a deep copy.
    """

    def __init__(self) -> None:
        self._current: _Packed | None = None

    def get(self, weight: Tensor, geometry: Any, pack: Callable[..., Tensor], hint: Any) -> Tensor:
        """The packed weight.

        Args:
            weight: dense, contiguous or channels_last.
            geometry: what else the packing depends on.
            pack: (contiguous weight, geometry, hint) -> the packed weight.
            hint: about the input. A pack fits all inputs, so it is not made again for another hint.
        """
        current = self._current
        version = -1 if weight.is_inference() else weight._version
        sample = _sample(weight)
        if (
            current is not None
            and current.weight() is weight
            and current.data_ptr == weight.data_ptr()
            and current.version == version
            and current.geometry == geometry
            and current.sample.dtype == sample.dtype
            and current.sample.shape == sample.shape
            and torch.equal(current.sample, sample)
        ):
            return current.packed
        packed = pack(weight.detach().contiguous(), geometry, hint)
        # One assignment, so that another thread sees the old pack or the new one, whole.
        self._current = _Packed(weakref.ref(weight), weight.data_ptr(), version, geometry, sample.clone(), packed)
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes held by the copy."""
        return 0 if self._current is None else torch.ops.mkldnn._nbytes(self._current.packed)

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()


def _sample(weight: Tensor) -> Tensor:
    """A view of elements spread over all of a dense tensor."""
    count = weight.numel()
    if count <= _RUNS * _RUN:
        return weight.as_strided((count,), (1,))
    return weight.as_strided((_RUNS, _RUN), ((count - _RUN) // (_RUNS - 1), 1))


def packed_conv(self: Any, input: Tensor) -> Tensor:
    """Replaces ``nn.Conv2d.forward``."""
    site, weight, bias = self._fastdiff_site, self.weight, self.bias
    reason = _why_stock(input, weight, bias) or _why_stock_conv(self, input, weight)
    if reason is not None:
        return site.stock(reason, self, input)
    geometry = (self.padding, self.stride, self.dilation, self.groups)
    packed = site.state.get(weight, geometry, _pack_conv, input.shape)
    site.note("conv", _CONV)
    output = _ops().conv(input, packed, bias, *geometry, "none", [], "")
    # With a packed weight the output is always channels_last; eager's is if the input or the weight is.
    return output.contiguous() if input.is_contiguous() and weight.is_contiguous() else output


def packed_linear(self: Any, input: Tensor) -> Tensor:
    """Replaces ``nn.Linear.forward``."""
    site, weight, bias = self._fastdiff_site, self.weight, self.bias
    reason = _why_stock(input, weight, bias) or _why_stock_linear(input, weight)
    if reason is not None:
        return site.stock(reason, self, input)
    packed = site.state.get(weight, None, _pack_linear, input)
    site.note("linear", _LINEAR)
    return _ops().linear(input, packed, bias, "none", [], "")


def _pack_conv(weight: Tensor, geometry: Any, shape: torch.Size) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight.to_mkldnn(), *geometry, shape)


def _pack_linear(weight: Tensor, geometry: None, input: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, input.numel() // input.shape[-1])


class _Ops(NamedTuple):
    conv: Any
    linear: Any


@functools.cache
def _ops() -> _Ops:
    mkldnn = torch.ops.mkldnn  # empty where torch is built without oneDNN
    return _Ops(mkldnn._convolution_pointwise.default, mkldnn._linear_pointwise.default)


_CONV, _LINEAR = Choice("onednn", packed_conv), Choice("onednn", packed_linear)


def _why_stock(x: Tensor, weight: Any, bias: Any) -> str | None:
    """Why this call needs the stock layer, as far as convolutions and linear layers have it in common."""
    if torch.compiler.is_compiling():
        return "torch.compile packs weights by itself"
    reason = why_not_now(x.dtype) or tensor_reason("cpu", _half_dtypes(), x, weight, bias)
    if reason is None and (weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype)):
        return "input and parameters differ in dtype"
    return reason


def _why_stock_conv(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> str | None:
    # Code for seamless textures replaces _conv_forward or sets the padding mode of instances.
    if "_conv_forward" in conv.__dict__ or conv.padding_mode != "zeros" or type(conv.padding) is str:
        return "its padding is not plain zeros"
    if x.dim() != 4 or x.numel() == 0 or x.shape[1] != weight.shape[1] * conv.groups:
        return "the input is not a batch of feature maps"
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return "the weight is strided"
    return None


def _why_stock_linear(x: Tensor, weight: Tensor) -> str | None:
    if x.dim() < 2 or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return "the input is not a batch of rows"
    return None if weight.is_contiguous() else "the weight is strided"


def why_not_now(dtype: torch.dtype) -> str | None:
    """Why layers that compute in ``dtype`` must not use oneDNN's kernels for NHWC and packed weights, or ``None``.

    In fp32 these add up all of a convolution's products in one sum: their error is 3 to 7 times that of the NCHW
    kernels eager uses (relative RMS 1.7e-6 against 2.6e-7 for 1280 channels). In half precision the errors agree.
    """
    if dtype is torch.float32:
        return "in float32 oneDNN's kernels for NHWC and packed weights are less accurate than eager's"
    if dtype not in _half_dtypes():
        return f"this CPU does not compute in {str(dtype)[6:]}"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    wanted, _ = overridden()
    return None if wanted in (None, "cpu") else f"use_backend({wanted!r}) is in effect"


@functools.cache
def _half_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, ask in supported.items() if ask())


def prepack(patch: Patch, model: nn.Module) -> None:
    """Pack the weights of convolutions and linear layers, where ``Options.prepack_weights`` asks for it."""
    if not patch.options.prepack_weights:
        return
    reason = why_not_here(patch)
    for path, module in model.named_modules():
        kind: Any = type(module)
        if kind is nn.Conv2d:
            what, function = "convolution, packed weight", packed_conv
        elif kind is nn.Linear and module.weight.numel() >= _SMALL_LINEAR:
            what, function = "linear layer, packed weight", packed_linear
        else:
            continue
        if reason is not None:
            patch.leave(path, module, what, reason, kernel=False)
        else:
            patch.install(path, module, what, (module, "forward", function), state=PackedWeight(), kernel=False)


def why_not_here(patch: Patch) -> str | None:
    """Why nothing that relies on oneDNN can be installed."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if patch.options.backend not in (None, "cpu"):
        return f"backend={patch.options.backend!r} was asked for"
    return None

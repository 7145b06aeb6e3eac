"""channels_last inside: a model computes in NHWC, and gives back its output in the layout that it has stock.

oneDNN's half precision convolutions are up to five times as fast in NHWC where activations are large (a VAE's
decoder three times as a whole), the fused GroupNorm is as fast in either layout, and going from feature maps to
tokens and back costs nothing. Where a weight is much larger than its input, as in the deep levels of a U-Net,
eager's NHWC convolution loses to its own NCHW one, since it reorders the weight twice: there the (small) input
and output are converted instead, unless the weights are packed ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends import Choice
from fastdiff.patching._fingerprint import resolve, why_not_source
from fastdiff.patching._patch import Patch
from fastdiff.patching.blocks.packed import why_not_now

#: Only convolutions with at least this many weights are ever converted around.
_LARGE_WEIGHT = 1 << 20
#: Below this many elements of input per weight eager's convolution is faster in NCHW than in NHWC (measured:
#: 0.09 equal, 0.04 a third faster).
_HEAVY = 0.1


def channels_last_inside(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a model whose first argument is ``sample``, a feature map (B, C, H, W)."""
    sample: Any = args[0] if args else kwargs.get("sample")
    reason = _why_stock(self, sample)
    choice = _CHANNELS_LAST if reason is None else Choice("stock", channels_last_inside, reason)
    self._fastdiff_site.note("layout", choice)
    if reason is not None:
        return type(self).forward(self, *args, **kwargs)
    inside = sample.contiguous(memory_format=torch.channels_last)
    if args:
        output = type(self).forward(self, inside, *args[1:], **kwargs)
    else:
        output = type(self).forward(self, **(kwargs | {"sample": inside}))
    if _stock_output_is_nhwc(self, sample):
        return output
    if isinstance(output, Tensor):
        return output.contiguous()
    if isinstance(output, tuple):
        return (output[0].contiguous(), *output[1:])
    output.sample = output.sample.contiguous()
    return output


def large_weight_conv(self: nn.Conv2d, input: Tensor) -> Tensor:
    """Replaces the forward of a convolution inside: NHWC in and out, computed in NCHW if its weight is heavy."""
    if (
        torch.compiler.is_compiling()
        or input.numel() >= _HEAVY * self.weight.numel()
        or input.is_contiguous()
        or not self.weight.is_contiguous()
        or why_not_now(input.dtype) is not None
    ):
        return nn.Conv2d.forward(self, input)
    return nn.Conv2d.forward(self, input.contiguous()).contiguous(memory_format=torch.channels_last)


_CHANNELS_LAST = Choice("channels_last", channels_last_inside)


def _why_stock(model: Any, x: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile chooses layouts by itself"
    backend = model._fastdiff_site.backend
    if backend not in (None, "cpu"):
        return f"backend={backend!r} was asked for"
    if type(x) is not Tensor or x.dim() != 4:
        return "the input is not a batch of feature maps"
    if x.device.type != "cpu":
        return f"the input is on {x.device.type}"
    weight = model.conv_in.weight
    reason = why_not_now(x.dtype)
    if reason is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "a gradient is needed"
    return reason


def _stock_output_is_nhwc(model: Any, x: Tensor) -> bool:
    """Whether the stock model gives channels_last.

    It does if the weights are, or the input, unless a transformer's exit makes its output contiguous. The attention
    in the middle of a VAE leaves its output channels_last too, except for single pictures, whose strides PyTorch
    takes for contiguous.
    """
    if not model.conv_in.weight.is_contiguous():
        return True
    kind = type(model).__name__
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return kind != "UNet2DConditionModel"
    has_attention = kind in ("Encoder", "Decoder") and any(a is not None for a in model.mid_block.attentions)
    return has_attention and x.shape[0] > 1


def channels_last(*names: str) -> Callable[[Patch, nn.Module], None]:
    """A family's switch: the models or submodels named ``module:class`` compute in channels_last inside."""

    def install(patch: Patch, root: nn.Module) -> None:
        for path, module in root.named_modules():
            name = next((n for n in names if isinstance(module, resolve(n))), None)
            if name is None:
                continue
            what = "channels_last inside"
            reason = why_not_source([f"{name}.forward"])
            if reason is not None:
                patch.leave(path, module, what, reason, kernel=False)
            elif patch.install(path, module, what, (module, "forward", channels_last_inside), layout=True):
                for conv in module.modules() if not patch.options.prepack_weights else ():
                    if type(conv) is nn.Conv2d and conv.weight.numel() >= _LARGE_WEIGHT:
                        # Where that is impossible the convolution is slower than it could be, nothing else.
                        patch.replace(conv, "forward", large_weight_conv)

    return install

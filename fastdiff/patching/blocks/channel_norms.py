"""The norms of VAEs, over feature maps (B, C, *spatial): what each class computes as a fused op, with SiLU or without.

A class of norms is a row of :data:`NORMS`. :func:`norm_row` makes a block of it, and
:func:`fastdiff.patching.blocks.norm_out.then_silu` one with the activation that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ops import group_norm_silu, rms_norm_silu
from fastdiff.patching._site import Site
from fastdiff.patching.blocks import Block, once, why_stock

_AUTOENCODERS = "diffusers.models.autoencoders"


@dataclass(frozen=True)
class ChannelNorm:
    """A class of norms.

    Attributes:
        what: it computes, for the report.
        serve: (site, norm, arguments of the forward, silu) -> what the forward returns, activated with ``silu``.
        why_not: (norm, arguments of the forward) -> why this call must run stock, or ``None``.
        inner: the attribute that is a ``GroupNorm``, where the norm is not one itself.
    """

    what: str
    serve: Callable[..., Any]
    why_not: Callable[..., str | None]
    inner: str = ""


def group_norm(site: Site, norm: Any, x: Tensor, *, silu: bool, slot: str = "norm") -> Tensor:
    """The GroupNorm ``norm`` of x (B, C, *spatial)."""
    return site.serve(slot, group_norm_silu, x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def group_norm_by_frames(site: Site, norm: Any, x: Tensor, *, silu: bool, slot: str = "norm") -> Tensor:
    """The GroupNorm ``norm`` of each frame of x (B, C, T, H, W)."""
    h = group_norm(site, norm, x.transpose(1, 2).flatten(0, 1), silu=silu, slot=slot)
    return h.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _normalize(site: Site, norm: Any, x: Tensor, *, silu: bool) -> Tensor:
    """``F.normalize`` over the channels, whose epsilon is the least norm."""
    bias = norm.bias.flatten() if isinstance(norm.bias, Tensor) else None
    return site.serve("norm", rms_norm_silu, x, norm.gamma.flatten(), bias, 1e-12, clamp=True, silu=silu)


def _why_not_normalize(norm: Any, x: Tensor) -> str | None:
    return why_stock(x) or why_not_weight(norm.gamma, x)


def _rms_norm(site: Site, norm: Any, x: Tensor, *, silu: bool) -> Tensor:
    """Called with the channels as the last axis."""
    y = site.serve("norm", rms_norm_silu, x.movedim(-1, 1), norm.weight, norm.bias, norm.eps, silu=silu)
    return y.movedim(1, -1)


def _why_not_rms_norm(norm: Any, x: Tensor) -> str | None:
    return why_stock(x) or (None if norm.weight is None else why_not_weight(norm.weight, x))


def _per_channel(site: Site, norm: Any, x: Tensor, channel_dim: int | None = None, *, silu: bool) -> Tensor:
    return site.serve("norm", rms_norm_silu, x, None, None, norm.eps, silu=silu)


def _why_not_per_channel(norm: Any, x: Tensor, channel_dim: int | None = None) -> str | None:
    return why_stock(x) or (None if norm.channel_dim == 1 else "its channels are another axis")


def why_not_weight(weight: Tensor, x: Tensor) -> str | None:
    """Why the kernels cannot take a norm's weight beside x, or ``None``."""
    if weight.device != x.device:
        return f"a norm's weight is on {weight.device.type}"
    if weight.dtype != x.dtype:  # stock code computes on in the wider type
        return f"a norm's weight is {str(weight.dtype)[6:]}, its input {str(x.dtype)[6:]}"
    return None


def _by_frames(site: Site, norm: Any, x: Tensor, *, silu: bool) -> Tensor:
    return group_norm_by_frames(site, norm.norm_layer, x, silu=silu)


def _spatial(
    site: Site, norm: Any, f: Tensor, zq: Tensor, conv_cache: dict[str, Any] | None = None, *, silu: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Of CogVideoX: scale and shift are convolutions of the latents, enlarged once for all norms of that size."""
    caches, kept = conv_cache or {}, {}
    zq = once(zq, ("nearest frames", f.shape[-3:]), lambda zq: _enlarged(zq, f.shape[-3:]))
    scale, kept["conv_y"] = norm.conv_y(zq, conv_cache=caches.get("conv_y"))
    shift, kept["conv_b"] = norm.conv_b(zq, conv_cache=caches.get("conv_b"))
    h = torch.addcmul(shift, group_norm(site, norm.norm_layer, f, silu=False), scale)
    return (F.silu(h, inplace=not torch.is_grad_enabled()) if silu else h), kept


def _enlarged(zq: Tensor, size: torch.Size) -> Tensor:
    """Latents (B, C, t, h, w) as (B, C, T, H, W); of an odd number of frames the first stays by itself."""
    frames, *picture = size
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(zq, size=size)
    first = F.interpolate(zq[:, :, :1], size=(1, *picture))
    return torch.cat([first, F.interpolate(zq[:, :, 1:], size=(frames - 1, *picture))], dim=2)


def _why_not_spatial(norm: Any, f: Tensor, zq: Tensor, conv_cache: Any = None) -> str | None:
    return why_stock(f, norm.norm_layer) or (None if f.dtype == zq.dtype else "input and latents differ in dtype")


GROUP_NORM = "torch.nn.modules.normalization:GroupNorm"
RMS_NORM = "diffusers.models.normalization:RMSNorm"
_NORMALIZE = ChannelNorm("RMSNorm", _normalize, _why_not_normalize)
#: The classes whose source the guard must know, as ``module:name``.
_OWN: dict[str, ChannelNorm] = {
    **{
        f"{_AUTOENCODERS}.autoencoder_kl_{file}RMS_norm": _NORMALIZE
        for file in (
            "wan:Wan",
            "qwenimage:QwenImage",
            "qwenimage21:QwenImage21",
            "hunyuanvideo15:HunyuanVideo15",
            "hunyuanimage_refiner:HunyuanImageRefiner",
        )
    },
    RMS_NORM: ChannelNorm("RMSNorm", _rms_norm, _why_not_rms_norm),
    f"{_AUTOENCODERS}.autoencoder_kl_ltx2:PerChannelRMSNorm": ChannelNorm(
        "RMSNorm", _per_channel, _why_not_per_channel
    ),
    f"{_AUTOENCODERS}.autoencoder_kl_mochi:MochiChunkedGroupNorm3D": ChannelNorm(
        "GroupNorm by frames", _by_frames, lambda norm, x: why_stock(x, norm.norm_layer), inner="norm_layer"
    ),
    f"{_AUTOENCODERS}.autoencoder_kl_cogvideox:CogVideoXSpatialNorm3D": ChannelNorm(
        "GroupNorm; product and sum", _spatial, _why_not_spatial, inner="norm_layer"
    ),
}
#: Class of norms -> what fastdiff knows of it.
NORMS: dict[str, ChannelNorm] = {
    GROUP_NORM: ChannelNorm("GroupNorm", group_norm, lambda norm, x: why_stock(x)),
    **_OWN,
}


def name_of_class(norm: Any) -> str:
    """``module:name`` of a norm's class, which may be a key of :data:`NORMS`."""
    return f"{type(norm).__module__}:{type(norm).__qualname__}"


def sources_of(norm: str) -> tuple[str, ...]:
    """What the guard compares for norms of the class ``norm``."""
    return (f"{norm}.forward",) if norm in _OWN else ()


def refuse(norm: Any) -> str | None:
    """Why the norm is not covered, or ``None``; asked once, when patching."""
    found = NORMS.get(name_of_class(norm))
    if found is None:
        return f"a norm is a {type(norm).__name__}"
    if found.inner and type(getattr(norm, found.inner)) is not nn.GroupNorm:
        return f"a norm's {found.inner} is a {type(getattr(norm, found.inner)).__name__}"
    return None if getattr(norm, "channel_first", True) else "a norm is over the last axis"


def norm_alone(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a norm that no activation follows. The site's state is the norm's class."""
    site = self._fastdiff_site
    norm = NORMS[site.state]
    reason = norm.why_not(self, *args, **kwargs)
    if reason is not None:
        return site.stock(reason, self, *args, **kwargs)
    return norm.serve(site, self, *args, **kwargs, silu=False)


def norm_row(parent: str, name: str, norm: str = GROUP_NORM) -> Block:
    """The norm of class ``norm`` that modules of class ``parent`` have under ``name``, by itself."""
    return Block(
        cls=parent,
        what=NORMS[norm].what,
        sources=("forward", *sources_of(norm)),
        methods=lambda module: [(getattr(module, name), "forward", norm_alone)],
        refuse=lambda module: refuse(getattr(module, name)),
        owner=lambda module: getattr(module, name),
        state=lambda module: norm,
        covers=(name,),
        applies=lambda module: name_of_class(getattr(module, name, None)) == norm,
    )


def _anywhere(norm: str) -> Block:
    """A norm of a class that nothing else has, wherever it is called from."""
    return Block(
        cls=norm,
        what=NORMS[norm].what,
        sources=("forward",),
        methods=lambda module: [(module, "forward", norm_alone)],
        refuse=refuse,
        state=lambda module: norm,
        covers=tuple(filter(None, (NORMS[norm].inner,))),
    )


#: Norms by themselves; after the rows of the blocks that activate them.
ANYWHERE = tuple(_anywhere(norm) for norm in _OWN if norm != RMS_NORM)

"""Classifier-free guidance of modular pipelines as one kernel, with its rescale.

Pipelines that are no modular ones compute their guidance inline, where no object can be patched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.ops import cfg_combine
from fastdiff.patching._fingerprint import base, resolve, why_not_source, why_not_version
from fastdiff.patching._patch import Patch
from fastdiff.patching._site import SITE, Site

GUIDER = "diffusers.guiders.classifier_free_guidance:ClassifierFreeGuidance"
#: What :func:`forward` computes in place of.
SOURCES = (f"{GUIDER}.forward", "diffusers.guiders.guider_utils:rescale_noise_cfg")


def is_guider(x: Any) -> bool:
    """Whether ``x`` is a guider that :func:`install` is for, or of a class derived from one."""
    return base(type(x), GUIDER) is not None


def install(patch: Patch) -> None:
    """Replace the guidance of the guider that ``patch`` is of, or note why not."""
    guider = patch.root
    cls = type(guider)
    reason = why_not_version() or why_not_source(SOURCES)
    if reason is None and cls.forward is not resolve(GUIDER).forward:
        reason = f"{cls.__name__}.forward is not the one of Diffusers"
    if reason is None:
        patch.install("", guider, "guidance", (guider, "forward", forward))
    else:
        patch.leave("", guider, "guidance", reason)


def forward(guider: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
    """In place of ``forward`` of a patched guider."""
    from diffusers.guiders.guider_utils import GuiderOutput

    site: Site = vars(guider)[SITE]
    reason = _why_stock(guider, pred_cond, pred_uncond)
    if reason is not None:
        return site.stock(reason, guider, pred_cond=pred_cond, pred_uncond=pred_uncond)
    scale = guider.guidance_scale + bool(guider.use_original_formulation)  # cond + s (cond - uncond)
    pred = site.serve("guidance", cfg_combine, pred_uncond, pred_cond, float(scale), float(guider.guidance_rescale))
    return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def _why_stock(guider: Any, pred_cond: Tensor, pred_uncond: Tensor | None) -> str | None:
    if not guider._is_cfg_enabled() or pred_uncond is None:
        return "guidance is off at this step"
    if not all(isinstance(s, (int, float)) for s in (guider.guidance_scale, guider.guidance_rescale)):
        return "guidance_scale or guidance_rescale is not a number"
    if pred_cond.shape != pred_uncond.shape or pred_cond.dtype != pred_uncond.dtype:
        return "the predictions differ in shape or dtype"
    if not (pred_cond.is_contiguous() and pred_uncond.is_contiguous()):
        return "a prediction is not contiguous"
    if pred_cond.dim() < 2 or not pred_cond.is_floating_point():
        return "the predictions are not floating point, or have one axis"
    return None

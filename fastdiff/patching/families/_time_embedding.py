"""What the ResNet blocks of a U-Net save together, see :func:`fastdiff.patching.blocks.resnet.silu_once`."""

from __future__ import annotations

from typing import Any

from fastdiff.patching._patch import Patch


def note_silu_once(patch: Patch, model: Any) -> None:
    """Note how many blocks share the SiLU of the time embedding."""
    owners = [site.owner for site in patch.sites if getattr(site.owner, "time_emb_proj", None) is not None]
    if len(owners) > 1 and not any(owner.skip_time_act for owner in owners):
        patch.savings.append(f"SiLU of the time embedding once instead of {len(owners)} times")

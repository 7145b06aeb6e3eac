"""Kernels of other libraries for the same layers, where they are installed.

Each is asked for the same result on the same inputs and checked as ours are; one that computes something else (a tanh
GELU for an erf GELU, attention in int8) is timed, and its row says how far it is off.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layer_cases import Case
from torch import Tensor

Call = Callable[..., Any]


@dataclass(frozen=True)
class Library:
    """One library.

    Attributes:
        module: what is imported.
        package: what pip installs.
        build: (module, case) -> the function of the case's arguments, or ``None`` where it has no such kernel.
        devices: where its kernels run.
    """

    module: str
    package: str
    build: Callable[[Any, Case], Call | None]
    devices: tuple[str, ...] = ("cuda",)


def _xformers(module: Any, case: Case) -> Call | None:
    return module.memory_efficient_attention if case.op == "attention" else None


def _flash_attn(module: Any, case: Case) -> Call | None:
    return module.flash_attn_func if case.op == "attention" else None


def _sage(module: Any, case: Case) -> Call | None:
    if case.op != "attention":
        return None
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="NHD")


def _liger(module: Any, case: Case) -> Call | None:
    if case.op == "swiglu":
        return lambda x: module.LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))
    if case.op == "geglu":

        def geglu(x: Tensor) -> Tensor:
            hidden, gate = x.chunk(2, dim=-1)
            return module.LigerGELUMulFunction.apply(gate, hidden)

        return geglu
    if case.op == "group_norm_silu" and not case.kwargs["temb"]:

        def group_norm(x: Tensor, w: Tensor, b: Tensor, _: None) -> Tensor:
            return F.silu(module.LigerGroupNormFunction.apply(x.contiguous(), w, b, x.shape[1], 32, 1e-5))

        return group_norm
    return None


def _comfy_kitchen(module: Any, case: Case) -> Call | None:
    if case.op == "adaln_modulate":
        return lambda x, scale, shift: module.adaln(x, scale[:, None], shift[:, None], 1e-6)
    if case.op == "qk_norm_rope" and case.kwargs["rope"] and not (case.kwargs["text"] or case.kwargs["wan"]):

        def rms_rope(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor, *_: None) -> Any:
            c, s = cos[:, ::2], sin[:, ::2]
            table = torch.stack((c, -s, s, c), dim=-1).view(1, q.shape[1], 1, -1, 2, 2)
            return module.rms_rope(q, k, table, qw, kw, 1e-6)

        return rms_rope
    return None


LIBRARIES = {
    "xFormers": Library("xformers.ops", "xformers", _xformers),
    "flash-attn": Library("flash_attn", "flash-attn", _flash_attn),
    "SageAttention": Library("sageattention", "sageattention", _sage),
    "Liger": Library("liger_kernel.ops", "liger-kernel", _liger),
    "comfy-kitchen": Library("comfy_kitchen", "comfy-kitchen", _comfy_kitchen, ("cuda", "cpu")),
}


def available(device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The libraries whose kernels can run on a device, imported, and why the others are not timed."""
    modules: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, library in LIBRARIES.items():
        if device not in library.devices:
            missing[name] = f"has no kernels for {device}"
            continue
        try:
            modules[name] = importlib.import_module(library.module)
        except ModuleNotFoundError as error:
            package = library.module.partition(".")[0]
            absent = error.name is not None and error.name.partition(".")[0] == package
            missing[name] = f"not installed (pip install {library.package})" if absent else f"does not import: {error}"
        except Exception as error:  # of whatever kind: these are other people's extensions
            missing[name] = f"does not import: {type(error).__name__}: {error}"
    return modules, missing

"""What was measured: the fastest backend by kind of device, op and dtype, and the sizes at which a kernel is no gain.

The table is ``losses.json``, which ``python -m fastdiff bench report`` writes from ``benchmarks/results``: a kind of
device, a backend and an op, and the sizes at which eager (for attention torch's own) was faster, beyond noise, in all
rows of a bucket. On a kind of CPU that nothing was measured on, nothing is in the table: kernels serve there, and
``fastdiff info`` says that their speed was not measured; on such a GPU kernels serve on request only, or once
``python -m fastdiff tune`` has checked and measured them there. Whoever asks for a backend by name gets it regardless;
only attention that torch is known to do faster takes a strict request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import __version__, _extension
from fastdiff.backends._facts import cache_folder, fact

TABLE = Path(__file__).with_name("losses.json")
#: Kind of device -> op -> dtype -> what is faster than eager, the fastest first, as in "triton, cuda"; else "eager".
Fastest = dict[str, dict[str, dict[str, str]]]
Features = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Loss:
    """One bucket.

    Attributes:
        device: the kind of device (:func:`kind`).
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        bounds: (feature, least, first one above); see :data:`FEATURES`.
        reason: what the report says.
    """

    device: str
    backend: str
    op: str
    dtype: str
    bounds: tuple[tuple[str, int, int], ...]
    reason: str

    def holds(self, device: str, dtype: str, features: Features) -> bool:
        """Whether a call is in this bucket."""
        for name, least, above in self.bounds:  # most calls end here
            value = features[name]
            if not least <= value < above:
                return False
        return (self.dtype, self.device) == (dtype, device)


@fact
def kind(device: torch.device) -> str:
    """What speed depends on first: ``"cpu avx512_bf16"``, ``"cuda sm_90"``, or the device's type alone."""
    if device.type == "cpu":
        return f"cpu {_extension.cpu_isa()}"
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda sm_{major}{minor}"
    return device.type


def _of_attention(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> dict[str, int]:
    return {"depth": q.shape[3], "queries": q.shape[1], "keys": k.shape[1]}


def _of_group_norm(x: Tensor, *args: Any, **kwargs: Any) -> dict[str, int]:
    return {"numel": x.numel(), "channels_last": int(x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1)}


def _of_any(*args: Any, **kwargs: Any) -> dict[str, int]:
    return {"numel": first_tensor(args, kwargs).numel()}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor of a call."""
    return next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))


#: What tells one size of a call from another, by op; other ops go by the number of values of their first tensor.
FEATURES: dict[str, Callable[..., dict[str, int]]] = {
    "attention": _of_attention,
    "group_norm_silu": _of_group_norm,
}
#: Features that are counted in powers of two; others stand for themselves.
SIZES = frozenset({"numel", "queries", "keys"})
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def features(op: str, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The features of a call of ``op``."""
    return FEATURES.get(op, _of_any)(*args, **kwargs)


def bucket(found: Features) -> tuple[tuple[str, int, int], ...]:
    """The bounds of the bucket that a call with these features is in."""
    bounds = []
    for name, value in found.items():
        least = 1 << (max(value, 1).bit_length() - 1) if name in SIZES else value
        bounds.append((name, least, 2 * least if name in SIZES else value + 1))
    return tuple(bounds)


def _load() -> tuple[dict[str, str], Fastest, dict[tuple[str, str], tuple[Loss, ...]]]:
    table = json.loads(TABLE.read_text())
    entries = [Loss(**row | {"bounds": tuple(map(tuple, row["bounds"]))}) for row in table["losses"]]
    found: dict[tuple[str, str], tuple[Loss, ...]] = {}
    for loss in entries:
        where = loss.backend, loss.op
        found[where] = (*found.get(where, ()), loss)
    return table["measured"], table["fastest"], found


#: The kinds of devices that were measured, each with commit and date; by kind, op and dtype what is faster than
#: eager over all sizes measured; and the losses by backend and op.
measured_on, fastest, by_kernel = _load()
_CPU = kind(torch.device("cpu"))


def why_it_loses(backend: str, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call is better left to others although the backend's kernel takes it, or ``None``."""
    entries = by_kernel.get((backend, op))
    if not entries:
        return None
    x = first_tensor(args, kwargs)
    device = _CPU if x.is_cpu else kind(x.device)
    found = features(op, *args, **kwargs)
    for loss in entries:
        if loss.holds(device, DTYPES.get(x.dtype, ""), found):
            return loss.reason
    return None


#: Why a GPU kernel without a measurement is not chosen by itself.
UNPROVEN = (
    "not proven on a GPU yet, so only on request: backend=..., use_backend or FASTDIFF_BACKEND; or once "
    "`python -m fastdiff tune` has checked and measured it here"
)


def own_file(name: str) -> Path:
    """Where ``python -m fastdiff tune`` keeps what it found to be the fastest on a kind of device."""
    return cache_folder() / f"fastest-{re.sub(r'[^a-z0-9]+', '-', name)}.json"


def own_versions() -> dict[str, str]:
    """What a measurement on this machine holds for."""
    return {"fastdiff": __version__, "torch": torch.__version__}


@fact
def own(name: str, op: str, dtype: str) -> str | None:
    """What was found here to be faster than eager at an op on a kind of device, as in :data:`Fastest`."""
    try:
        found = json.loads(own_file(name).read_text())
        best = found["fastest"][op][dtype]
        return best if isinstance(best, str) and found["versions"] == own_versions() else None
    except (OSError, ValueError, KeyError, TypeError):  # there is none, it was cut, or is another version's
        return None


def by_speed(name: str, op: str, dtype: str) -> list[str]:
    """The backends that are faster than eager at an op in a dtype on a kind of device, the fastest first, and eager.

    As measured here, else as shipped; empty if not measured.
    """
    found = own(name, op, dtype) or fastest.get(name, {}).get(op, {}).get(dtype)
    return [*(b for b in found.split(", ") if b != "eager"), "eager"] if found else []


def is_proven(name: str, op: str) -> bool:
    """Whether the backends of an op were measured on a kind of device, here or for what is shipped."""
    return any(by_speed(name, op, dtype) for dtype in DTYPES.values())


def faster_than(backend: str, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], str]:
    """What is faster than a GPU kernel at such calls, the fastest first, and how the report says it. Where nothing was
    measured that is ``"eager"``."""
    x = first_tensor(args, kwargs)
    name, dtype = kind(x.device), DTYPES.get(x.dtype, "")
    found = by_speed(name, op, dtype)
    if not found:
        return ["eager"], UNPROVEN
    faster = found[: found.index(backend)] if backend in found else found
    return faster, f"{faster[0]} is the faster one on {name} in {dtype}, as measured" if faster else ""


def is_measured(device: torch.device, op: str) -> bool:
    """Whether fastdiff ships measurements of an op on that kind of device."""
    return op in fastest.get(kind(device), {})


def standing(backend: str, device: torch.device) -> str:
    """Whether the speed of a backend's kernels is known on a device, for ``fastdiff info``."""
    name = kind(device)
    if name not in measured_on:
        return f"speed not measured on {name}"
    count = sum((loss.backend, loss.device) == (backend, name) for entries in by_kernel.values() for loss in entries)
    left = {0: "no measured size is", 1: "one measured size is"}.get(count, f"{count} measured sizes are")
    return f"speed measured on {name}, {left} left to others"

"""Launch configurations: a small table, refined per architecture, and by ``python -m fastdiff tune`` per device.

Nothing is tuned while a user's picture is drawn. An entry is found under ``"<op>/<bucket>"``, else ``"<op>"``; a bucket
may have buckets.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import losses
from fastdiff.backends._facts import cache_folder, fact
from fastdiff.backends._gpu import FEW_KEYS, TORCH_ATTENTION, TORCH_ATTENTION_SOURCE, why_torch_attends

Config = dict[str, Any]

#: m, n: of a tile of queries and of a block of keys. keys: how many stay on the chip, where they fit; keys_deep: how
#: many with a head dimension above 64 or in two parts, so that nothing spills. hoist: invariants out of the loop.
_SHORT: Config = {"m": 64, "n": 64, "warps": 4, "waves": 2, "keys": FEW_KEYS, "keys_deep": 160, "hoist": True}

#: Used wherever neither an architecture nor the tuning of the device says otherwise. Buckets: rows by the power of
#: two that holds the row; group norm: in fp32, there wide where a group is wider than a tile; attention by head
#: dimension, "fp32" apart: the power of two below it, in it as it is held; of few keys as it is held.
DEFAULT: dict[str, Config] = {
    "elementwise": {"block": 1024, "warps": 4},
    "cfg_rescale": {"block": 4096, "warps": 8},
    # elements: of a tile of rows; waves: programs per multiprocessor worth having before one takes several tiles
    "rows": {"elements": 1024, "warps": 4, "waves": 16},
    "rows/2048": {"elements": 2048, "warps": 8, "waves": 8},
    "rows/4096": {"elements": 4096, "warps": 8, "waves": 8},
    "rows/8192": {"elements": 8192, "warps": 16, "waves": 4},
    "qk_norm_rope": {"elements": 1024},
    # pixels: how many a tile holds; once: up to how many per sample go in one launch
    "group_norm": {"pixels": 64, "warps": 8, "waves": 2, "once": 512},
    "group_norm/fp32": {"pixels": 32, "warps": 4, "waves": 2, "once": 512},
    "group_norm/fp32/wide": {"pixels": 32, "warps": 8, "waves": 2, "once": 512},
    "rms_norm": {"elements": 8192, "warps": 8},
    "attention": {"m": 128, "n": 64, "warps": 8, "stages": 2},
    "attention/128/160": {"m": 128, "n": 32, "warps": 8, "stages": 2},
    "attention/256": {"m": 32, "n": 64, "warps": 8, "stages": 2},
    "attention/512": {"m": 32, "n": 32, "warps": 8, "stages": 1},
    "attention/fp32": {"m": 32, "n": 32, "warps": 8, "stages": 1},
    "attention/fp32/512": {"m": 16, "n": 32, "warps": 8, "stages": 1},
    "short_attention": _SHORT,
    "short_attention/128": _SHORT | {"m": 32},
    "short_attention/256": _SHORT | {"m": 32, "keys_deep": 128},
    # its unrolled products, without matrix instructions, would spill
    "short_attention/fp32": _SHORT | {"keys": 0, "keys_deep": 0},
    # head dimensions at which torch's attention, in half precision, is the faster one: with many keys, and with few;
    # source: of that knowledge
    "torch_attention": {"many": [], "few": [], "source": "not measured"},
}


#: Of sm_90 and sm_100. Their matrix instructions read keys and values where they lie on the chip, not from registers.
_HOPPER: dict[str, Config] = {
    "attention/128/160": DEFAULT["attention"],
    "attention/256": {"m": 64, "n": 32, "warps": 8, "stages": 2},
    "short_attention": _SHORT | {"keys_deep": FEW_KEYS, "hoist": False},
    "short_attention/160": _SHORT | {"hoist": False},
    "short_attention/256": _SHORT | {"hoist": False, "keys_deep": 128},
    "short_attention/fp32": DEFAULT["short_attention/fp32"],
    "torch_attention": {"many": [*TORCH_ATTENTION[9, 0]], "few": [], "source": TORCH_ATTENTION_SOURCE},
}

#: What differs by compute capability.
BY_ARCHITECTURE: dict[tuple[int, int], dict[str, Config]] = {
    # The interpreter: few and large tiles, as its time goes by their number; small images still take two launches.
    (0, 0): {
        "elementwise": {"block": 65536, "warps": 4},
        "rows": {"elements": 4096, "warps": 4, "waves": 1},
        "group_norm": {"pixels": 64, "warps": 8, "waves": 1, "once": 64},
        "qk_norm_rope": {"elements": 16384},
        "rms_norm": {"elements": 32768, "warps": 4},
        "attention": {"m": 256, "n": 256, "warps": 4, "stages": 1},
        "short_attention": _SHORT | {"m": 256, "n": 128, "waves": 1},
        "short_attention/fp32": DEFAULT["short_attention/fp32"],
    },
    (9, 0): _HOPPER,
    # Its tensor memory does not hold the products of more blocks.
    (10, 0): _HOPPER
    | {
        "short_attention": _SHORT | {"keys": 320, "hoist": False},
        "short_attention/256": DEFAULT["short_attention/256"],
        # for ptxas of CUDA 13.4, which would rather spill a register than use more
        "rows/4096": DEFAULT["rows/4096"] | {"warps": 16},
        "qk_norm_rope": {"elements": 2048},
    },
}


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Of the Triton that would be imported, ``None`` if there is none.

    Read from its source: the distribution is ``triton`` for NVIDIA's GPUs only, and has other names for ROCm, Intel
    and Windows; importing it takes half a second.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", Path(spec.origin).read_text(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def architecture(device: torch.device) -> tuple[int, int]:
    """The compute capability; (0, 0) for the interpreter, (0, 1) for a GPU without one."""
    if device.type == "cpu":
        return 0, 0
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 1)


def cache_file(device: torch.device) -> Path:
    """Where the tuning of this device is kept."""
    name = getattr(torch, device.type).get_device_name(device) if device.type != "cpu" else "interpreter"
    version = ".".join(map(str, triton_version() or ()))
    return cache_folder() / f"triton-{version}-{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"


@functools.cache
def table(device: torch.device) -> dict[str, Config]:
    """All entries for a device."""
    ours = BY_ARCHITECTURE.get(architecture(device), {})
    # An entry of an architecture hides the smaller buckets of the default.
    merged = {k: v for k, v in DEFAULT.items() if k.partition("/")[0] not in ours} | ours
    try:
        tuned = json.loads(cache_file(device).read_text())
    except (OSError, ValueError):  # there is none, or it was cut
        tuned = {}
    # An entry of another version of the table could lack a parameter.
    for key, entry in tuned.items() if isinstance(tuned, dict) else ():
        if isinstance(entry, dict) and entry.keys() == merged.get(key, merged.get(key.partition("/")[0], {})).keys():
            merged[key] = entry
    return merged


@functools.cache
def config(op: str, device: torch.device, bucket: int | str | None = None) -> Config:
    """The entry for one launch."""
    entries = table(device)
    key = op if bucket is None else f"{op}/{bucket}"
    while key not in entries and key != op:
        key = key.rpartition("/")[0]
    return entries[key]


@fact
def _torch_attention(device: torch.device, which: str) -> tuple[tuple[int, ...], str]:
    known = config("torch_attention", device)
    published = known["source"] == TORCH_ATTENTION_SOURCE
    return () if published and losses.is_measured(device, "attention") else tuple(known[which]), known["source"]


def torch_is_faster(q: Tensor, k: Tensor, *_: Any, **__: Any) -> str | None:
    """Why a call of ``attention`` is better left to torch, or ``None``."""
    return why_torch_attends(q, k, *_torch_attention(q.device, "few" if k.shape[1] <= FEW_KEYS else "many"))


def forget() -> None:
    """Read the tables anew."""
    for function in (table, config, _torch_attention):
        function.cache_clear()

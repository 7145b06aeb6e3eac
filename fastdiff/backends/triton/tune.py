"""``python -m fastdiff tune``: measure launch configurations on this GPU and keep the best ones; then let kernels serve
unasked that prove themselves."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from fastdiff.backends import _proof
from fastdiff.backends import triton as backend
from fastdiff.backends.triton import _config
from fastdiff.backends.triton._config import Config

#: A configuration must be this much faster than the shipped one to take its place.
MARGIN = 1.03
#: Head dimensions of models, at which torch's attention is compared.
DEPTHS = (40, 64, 72, 80, 88, 96, 112, 128, 160, 256, 512)


@dataclass(frozen=True)
class Task:
    """An entry of the table, the values to try, and a call that uses it."""

    key: str
    choices: dict[str, tuple[Any, ...]]
    call: Callable[[], Any]

    def candidates(self, table: dict[str, Config]) -> list[Config]:
        """The entry as it is, then every other combination."""
        current = table.get(self.key) or table[self.key.partition("/")[0]]
        others = [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]
        return [current, *(current | other for other in others if current | other != current)]


def tasks(device: torch.device) -> Iterator[Task]:
    """What is tuned: sizes of real models, in bfloat16."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    from fastdiff.backends.triton import adaln_modulate, attention, gelu_tanh, group_norm_silu, rms_norm_silu

    x = random(2, 4096, 5120)
    yield Task("elementwise", {"block": (1024, 2048, 4096), "warps": (4, 8)}, lambda: gelu_tanh.run(x))
    for width in (320, 640, 1280, 3072, 6144):
        rows, modulation = random(2, 4096, width), random(2, 2 * width).chunk(2, 1)
        bucket = 1 << (width - 1).bit_length()
        choices = {"warps": (1, 2, 4, 8, 16), "waves": (4, 8, 16, 32), "elements": (max(1024, bucket), 2 * bucket)}
        yield Task(f"rows/{bucket}", choices, partial(adaln_modulate.run, rows, modulation[0], modulation[1]))
    image, weight = random(2, 320, 128, 128), random(320)
    choices = {"pixels": (32, 64, 128), "warps": (4, 8), "waves": (1, 2, 4)}
    yield Task("group_norm", choices, lambda: group_norm_silu.run(image, 32, weight, weight))
    video, weight = random(1, 192, 5, 240, 416), random(192)
    choices = {"elements": (4096, 8192, 16384), "warps": (4, 8)}
    yield Task("rms_norm", choices, lambda: rms_norm_silu.run(video, weight, clamp=True))
    for depth in (40, 64, 128, 256, 512):
        q = random(1, 4096, 8 if depth < 512 else 1, depth)
        choices = {"m": (64, 128), "n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}
        bucket = (1 << depth.bit_length()) // 2
        yield Task(f"attention/{bucket}", choices, partial(attention.run, q, q, q))
    q, k = random(2, 4096, 8, 64), random(2, 77, 8, 64)
    choices = {"m": (32, 64, 128), "n": (32, 64, 128), "warps": (4, 8), "waves": (1, 2, 4)}
    yield Task("short_attention", choices, lambda: attention.run(q, k, k))


def against_torch(device: torch.device, measure: Callable[[Callable[[], Any]], float]) -> Config:
    """The entry ``torch_attention``: head dimensions at which torch's attention is the faster one by MARGIN."""
    from fastdiff.backends.triton import attention

    torch_attention: Any = torch.nn.functional.scaled_dot_product_attention
    found: Config = {"many": [], "few": [], "source": "measured by tune"}
    for which, keys in (("many", 4096), ("few", 77)):
        for depth in DEPTHS:
            q, k = (
                torch.randn(2, n, 8 if depth < 512 else 1, depth, device=device, dtype=torch.bfloat16)
                for n in (4096, keys)
            )
            of_torch = [t.transpose(1, 2) for t in (q, k, k)]
            ours = measure(partial(attention.run, q, k, k))
            if ours / measure(partial(torch_attention, *of_torch)) >= MARGIN:
                found[which].append(depth)
    return found


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call on the GPU, its buffers flushed from the cache before each."""
    device = backend.device_type()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def best(task: Task, device: torch.device, measure: Callable[[Callable[[], Any]], float]) -> tuple[Config, float]:
    """The best configuration of a task, and how many times as fast as the shipped one it is.

    One that the GPU cannot run (too much shared memory, too many registers) is passed over.
    """
    table = _config.table(device)
    saved = table.get(task.key)
    times: list[tuple[float, Config]] = []
    for candidate in task.candidates(dict(table)):
        table[task.key] = candidate
        _config.config.cache_clear()
        try:
            times.append((measure(task.call), candidate))
        except Exception as error:
            if not _proof.is_of_the_compiler(error):
                raise
    if saved is None:
        del table[task.key]
    else:
        table[task.key] = saved
    _config.config.cache_clear()
    shipped, (fastest, config) = times[0], min(times, key=lambda t: t[0])
    if shipped[0] / fastest < MARGIN:
        return shipped[1], 1.0
    return config, shipped[0] / fastest


def tune(device: torch.device, measure: Callable[[Callable[[], Any]], float] = milliseconds) -> dict[str, Config]:
    """Measure every task with a progress bar; keep what is faster than shipped in the device's cache file."""
    found: dict[str, Config] = {}
    planned = list(tasks(device))
    with Progress() as progress:
        bar = progress.add_task("tuning", total=len(planned) + 1)
        for task in planned:
            progress.update(bar, description=task.key)
            config, gain = best(task, device, measure)
            if gain > 1.0:
                found[task.key] = config
                progress.console.print(f"{task.key}: {gain:.2f} times as fast with {config}")
            progress.advance(bar)
        progress.update(bar, description="torch_attention")
        _save(found, device)
        found["torch_attention"] = against_torch(device, measure)
        progress.advance(bar)
    _save(found, device)
    return found


def _save(found: dict[str, Config], device: torch.device) -> None:
    path = _config.cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    _config.forget()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m fastdiff tune``."""
    parser.add_argument("--device", default=backend.device_type(), help="which GPU (default: %(default)s)")
    parser.add_argument("--reset", action="store_true", help="forget what was tuned before, and stop")


def run(args: argparse.Namespace) -> int:
    """``python -m fastdiff tune``."""
    reason = backend.why_not()
    if reason is None and (backend.INTERPRETED or not getattr(torch, backend.device_type()).is_available()):
        reason = "torch sees no GPU that Triton can use"
    if reason is not None:
        sys.stderr.write(f"there is nothing to tune: {reason}\n")
        return 1
    device = torch.empty(0, device=args.device).device
    path = _config.cache_file(device)
    if args.reset:
        path.unlink(missing_ok=True)
        _config.forget()
        _proof.forget(device)
        return 0
    path.unlink(missing_ok=True)
    _config.forget()
    found = tune(device)
    sys.stdout.write(f"{len(found) - 1} configurations are faster than the shipped ones; they are in {path}\n")
    for which, depths in found["torch_attention"].items():
        if which != "source":
            sys.stdout.write(f"torch's attention is the faster one with {which} keys at head dimensions: {depths}\n")
    for (op, dtype), (best, gain) in _proof.prove(device, milliseconds).items():
        said = "left to eager" if best == "eager" else f"served by {best} from now on, {gain:.2f} times as fast"
        sys.stdout.write(f"{op} in {dtype}: {said}\n")
    return 0

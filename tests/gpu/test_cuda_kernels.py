"""The CUDA kernels on a GPU: the numbers of the ops' tests, streams, graphs, devices, sizes past 2^31, sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_suite import NUMBERS, TESTS, assert_numerics_rule, host_microseconds, run_numbers, tensors_of

from fastdiff import ops, use_backend
from fastdiff.backends import cuda


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return cuda.why_not() or cuda.device_reason(0)


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def randn(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def table(tokens: int, width: int, device: str) -> torch.Tensor:
    angle = randn(tokens, width // 2, dtype=torch.float32, device=device)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


def rows(n: int, device: str) -> tuple[torch.Tensor, ...]:
    x, residual = (randn(2, n, 1152, device=device) for _ in range(2))
    return x, randn(2, 1, 1152, device=device), residual


#: A call of every op on a device, with so many tokens; 1024 is what real models have.
CALLS: dict[str, Callable[[str, int], tuple[Any, ...]]] = {
    "adaln_modulate": lambda d, n: (randn(2, n, 1152, device=d), *randn(2, 2304, device=d).chunk(2, 1)),
    "adaln_modulate_dual": lambda d, n: (randn(2, n, 1152, device=d), *randn(2, 4608, device=d).chunk(4, 1)),
    "attention": lambda d, n: tuple(randn(2, m, 8, 40, device=d) for m in (n, 77, 77)),
    "cfg_combine": lambda d, n: (*randn(4, 4, 16, n, device=d).chunk(2), 7.5, 0.7),
    "gate_residual": lambda d, n: rows(n, d),
    "gate_residual_adaln": lambda d, n: rows(n, d),
    "geglu": lambda d, n: (randn(2, n, 2560, device=d),),
    "gelu_tanh": lambda d, n: (randn(2, n, 1536, device=d),),
    "group_norm_silu": lambda d, n: (randn(2, 320, 4, n, device=d), 32),
    "qk_norm_rope": lambda d, n: (
        *(randn(1, n, 24 * 128, device=d).unflatten(-1, (24, 128)) for _ in range(2)), randn(128, device=d),
        randn(128, device=d), None, None, table(n + 16, 128, d), None,
        *(randn(1, 16, 24, 128, device=d) for _ in range(2)),
    ),
    "rms_norm_silu": lambda d, n: (randn(1, 96, 3, n, device=d), randn(96, device=d)),
    "scheduler_step": lambda d, n: (
        randn(2, 4, 16, n, dtype=torch.float32, device=d), randn(2, 4, 16, n, device=d),
        [randn(2, 4, 16, n, device=d)], None, [0.9, -0.1, 0.3, 0.0, 0.2], [1.1, -0.4],
    ),
    "swiglu": lambda d, n: tuple(randn(2, n, 5120, device=d).chunk(2, -1)),
}  # fmt: skip


def run(op: str, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    with use_backend("cuda", strict=True):
        choice = getattr(ops, op).choose(*args, **kwargs)
        assert choice.backend == "cuda", choice.reason
        result = choice.run(*args, **kwargs)
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def close(got: tuple[torch.Tensor, ...], op: str, *args: Any, **kwargs: Any) -> None:
    eager = tensors_of(getattr(ops, op).eager(*args, **kwargs))
    assert_numerics_rule(op, tensors_of(got), eager, args, kwargs)


def test_every_op_has_a_call() -> None:
    assert set(CALLS) == set(cuda.OPS)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    run_numbers(name, "cuda")


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_current_stream(op: str) -> None:
    """Its input is written late, by earlier work of a stream that no other waits for."""
    args = CALLS[op]("cuda", 1024)
    first, expected = args[0].clone(), run(op, *args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        args[0].fill_(torch.nan)
        torch.cuda._sleep(20_000_000)
        args[0].copy_(first)
        got = run(op, *args)
    stream.synchronize()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", CALLS)
def test_graph_capture(op: str) -> None:
    args = CALLS[op]("cuda", 1024)
    run(op, *args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, *args)
    args[0].normal_()
    graph.replay()
    torch.cuda.synchronize()
    close(captured, op, *args)
    assert all(torch.equal(c, n) for c, n in zip(captured, run(op, *args), strict=True))


@pytest.mark.parametrize("op", CALLS)
def test_second_device(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    args = CALLS[op]("cuda:1", 1024)
    with torch.cuda.device(0):
        got = run(op, *args)
    assert all(g.device.index == 1 for g in got)
    close(got, op, *args)


def test_tensors_on_two_devices_are_refused() -> None:
    x, cond = randn(2, 8, device="cuda"), randn(2, 8, device="cpu")
    with pytest.raises(RuntimeError, match="is on another device"):
        torch.ops.fastdiff.cfg_combine(x, cond, 2.0)


def test_scheduler_step_is_one_launch_and_costs_little_host_time() -> None:
    args = CALLS["scheduler_step"]("cuda", 1024)
    with use_backend("cuda", strict=True):
        step = ops.scheduler_step.choose(*args).run
    step(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(*args)
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_gpu if "Sync" not in name and "Activity" not in name]  # the profiler's own entries
    assert len(kernels) == 1 and "scheduler_step_kernel" in kernels[0], kernels
    microseconds = host_microseconds(lambda: step(*args))
    print(f"scheduler_step: {microseconds:.1f} us of host time a call")
    assert microseconds < 10


@pytest.mark.parametrize(
    "op",
    [
        *("adaln_modulate", "gelu_tanh", "group_norm_silu", "group_norm_silu channels_last", "rms_norm_silu"),
        "rms_norm_silu channels_last",
    ],
)
def test_more_than_2_to_31_elements(op: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    shape = {"gelu_tanh": (2**31 + 24,), "adaln_modulate": (1, 2**21 + 3, 1032)}.get(op, (1, 40, 2, 5200, 5200))
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    if "channels_last" in op:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    name = op.split()[0]
    (got,) = run(name, x, *((4,) if name == "group_norm_silu" else ()))
    if name == "group_norm_silu":
        got, x = got[:, 30:], x[:, 30:]  # the last group
        expected = ops.group_norm_silu.eager(x.float(), 1)
        torch.testing.assert_close(got[..., -4:].float(), expected[..., -4:], rtol=0.02, atol=0.02)
    else:  # a row, or a pixel, needs no others
        tail = x[..., -999:, :] if x.dim() > 1 else x[-999:]
        expected = getattr(ops, name).eager(tail.double())
        torch.testing.assert_close(
            (got[..., -999:, :] if x.dim() > 1 else got[-999:]).double(), expected, rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    # Each tensor an allocation of its own, so that what lies behind one is not another's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    folder = str(TESTS / "gpu")
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_cuda_kernels as t; t.small_calls('cuda')"
    # torch asks the driver for functions that it may not have; memcheck would count that as an error.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "3", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def small_calls(device: str) -> None:
    """One small call of each op and each of its kernels, for a sanitizer. The emulation runs them too, and compares."""
    torch.manual_seed(0)

    def call(op: str, *args: Any, **options: Any) -> None:
        got = run(op, *args, **options)
        if device == "cpu":
            close(got, op, *args, **options)

    for op, arguments in CALLS.items():
        call(op, *arguments(device, 19 if op == "attention" else 3))
    for shape in ((1, 40, 9, 11), (1, 8, 99, 102)):  # in one launch, and in two
        x = randn(*shape, device=device)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            call("group_norm_silu", layout, 2)
        call("group_norm_silu", x, 2, tokens=True)
    # A group of more channels than a block has threads, the pixels split too, and the most channels.
    for shape in ((1, 2570, 2, 2), (1, 2056, 2, 4), (1, 32767, 2, 1)):
        x = randn(*shape, device=device)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            call("group_norm_silu", layout, 1)
    for channels in (40, 4096):  # in packs along the pixels and the channels; and the most shared memory
        x = randn(1, channels, 8, 8, device=device)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            call("rms_norm_silu", layout, randn(channels, device=device))
    for rms in (False, True):  # rows longer than the registers, of whole packs and not
        for width in (8200, 8195):
            x, gate, residual = randn(3, 1, 2, width, device=device)
            call("adaln_modulate", x, gate, residual, rms=rms)
            call("adaln_modulate_dual", x, gate, residual, residual, gate, rms=rms)
            for g in (gate, None):
                call("gate_residual_adaln", x, g, residual, gate, rms=rms)
    # Resident keys, streamed ones, a depth of whole packs and not, few queries, two warps for a row.
    for queries, keys, depth in ((70, 77, 40), (33, 300, 256), (20, 70, 33), (7, 90, 64), (40, 33, 512)):
        call("attention", *(randn(1, n, 2, depth, device=device) for n in (queries, keys, keys)))
    for depth in (40, 512):  # without tensor cores
        call("attention", *(randn(1, n, 2, depth, device=device, dtype=torch.float32) for n in (9, 37, 37)))
    q, k, v = (randn(1, n, 2, 40, device=device) for n in (21, 9, 9))
    for mask in (randn(1, 1, 21, 1, device=device), randn(1, 2, 9, 21, device=device).mT > 0):
        call("attention", q, k, v, mask)
    q, k = (randn(1, 3, 12, 128, device=device) for _ in range(2))
    for dtype in (torch.float64, torch.float16):
        call("qk_norm_rope", q, k, cos=table(3, 128, device).to(dtype))
    w = randn(12 * 128, device=device)
    for interleaved in (True, False):
        options = {"cos": table(3, 96, device), "across_heads": True, "interleaved": interleaved}
        call("qk_norm_rope", q, k, w, w, **options)
    if device == "cuda":
        torch.cuda.synchronize()

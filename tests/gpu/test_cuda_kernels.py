"""The CUDA kernels on a GPU: the numbers of the ops' tests, streams, graphs, devices, sizes past 2^31, sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import ops, use_backend
from fastdiff.backends import cuda

TESTS = Path(__file__).resolve().parents[1]
#: The test files of tests/ops about ops that have a CUDA kernel.
NUMBERS = (
    "adaln_modulate",
    "attention",
    "cfg_combine",
    "gate_residual",
    "gelu",
    "group_norm_silu",
    "scheduler_step",
    "swiglu",
)


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return cuda.why_not() or cuda.device_reason(0)


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


#: A call of every op at a size that real models have, on a device.
CALLS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "adaln_modulate": lambda d: (randn(2, 1024, 1152, device=d), *randn(2, 2304, device=d).chunk(2, 1)),
    "attention": lambda d: tuple(randn(2, n, 8, 40, device=d) for n in (1024, 77, 77)),
    "cfg_combine": lambda d: (*randn(4, 4, 128, 128, device=d).chunk(2), 7.5, 0.7),
    "gate_residual": lambda d: (
        randn(2, 1024, 1152, device=d), randn(2, 1, 1152, device=d), randn(2, 1024, 1152, device=d)
    ),
    "gate_residual_adaln": lambda d: (
        randn(2, 1024, 1152, device=d), randn(2, 1, 1152, device=d), randn(2, 1024, 1152, device=d)
    ),
    "geglu": lambda d: (randn(2, 1024, 2560, device=d),),
    "gelu_tanh": lambda d: (randn(2, 1024, 1536, device=d),),
    "group_norm_silu": lambda d: (randn(2, 320, 64, 64, device=d), 32),
    "scheduler_step": lambda d: (
        randn(2, 4, 128, 128, dtype=torch.float32, device=d), randn(2, 4, 128, 128, device=d),
        [randn(2, 4, 128, 128, device=d)], None, [0.9, -0.1, 0.3, 0.0, 0.2], [1.1, -0.4],
    ),
    "swiglu": lambda d: tuple(randn(2, 1024, 5120, device=d).chunk(2, -1)),
}  # fmt: skip


def run(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
    with use_backend("cuda", strict=True):
        choice = getattr(ops, op).choose(*args)
        assert choice.backend == "cuda", choice.reason
        result = choice.run(*args)
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def close(got: tuple[torch.Tensor, ...], op: str, *args: Any) -> None:
    """Within a few roundings of eager in fp64."""
    wide = torch.utils._pytree.tree_map(lambda a: a.double() if isinstance(a, torch.Tensor) else a, args)
    exact = getattr(ops, op).eager(*wide)
    for g, e in zip(got, (exact,) if isinstance(exact, torch.Tensor) else exact, strict=True):
        if g.numel():
            assert ((g.double() - e).norm() / e.norm()).item() < 2 * torch.finfo(g.dtype).eps


def test_every_op_has_a_call() -> None:
    assert set(CALLS) == set(cuda.OPS)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    """The tests of the ops' numbers, on this GPU."""
    file, selection = TESTS / "ops" / f"test_{name}.py", ["-k", "not float32"] if name == "attention" else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numerics", *selection, file],
        env=os.environ | {"FASTDIFF_TEST_BACKEND": "cuda", "FASTDIFF_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_current_stream(op: str) -> None:
    """Its input is written late, by earlier work of a stream that no other waits for."""
    args = CALLS[op]("cuda")
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
    args = CALLS[op]("cuda")
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
    args = CALLS[op]("cuda:1")
    with torch.cuda.device(0):
        got = run(op, *args)
    assert all(g.device.index == 1 for g in got)
    close(got, op, *args)


def test_tensors_on_two_devices_are_refused() -> None:
    x, cond = randn(2, 8), torch.randn(2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="is on another device"):
        torch.ops.fastdiff.cfg_combine(x, cond, 2.0)


@pytest.mark.parametrize("op", ["gelu_tanh", "group_norm_silu", "group_norm_silu channels_last", "adaln_modulate"])
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
    else:
        tail = x[..., -999:, :] if x.dim() > 1 else x[-999:]
        expected = getattr(ops, name).eager(tail.double())
        torch.testing.assert_close(
            (got[..., -999:, :] if x.dim() > 1 else got[-999:]).double(), expected, rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    code = f"import sys; sys.path.insert(0, {str(TESTS / 'gpu')!r}); import test_cuda_kernels as t; t.small_calls()"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def small_calls() -> None:
    """One small call of each op and layout, for a sanitizer."""
    x = randn(1, 40, 9, 11)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        run("group_norm_silu", layout, 8)
    ops.group_norm_silu(x, 8, tokens=True)
    for depth, keys in ((40, 77), (33, 70), (256, 300)):
        run("attention", *(randn(1, n, 2, depth) for n in (70, keys, keys)))
    for op in (
        "adaln_modulate",
        "cfg_combine",
        "gate_residual_adaln",
        "geglu",
        "gelu_tanh",
        "scheduler_step",
        "swiglu",
    ):
        run(op, *CALLS[op]("cuda"))
    torch.cuda.synchronize()

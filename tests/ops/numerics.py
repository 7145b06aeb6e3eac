"""How the ops' numbers are judged: against an fp64 reference of the same inputs, pooled over seeds.

The rule (relative RMS error, at least ten seeds):

* fp16 and bf16 outputs: at most 1.02 times the error of the correctly rounded fp64 result;
* fp32 outputs: at most twice eager's error (or twice that of the correctly rounded result, if larger);
* fp16 and bf16 outputs of ops that round inside by nature, such as attention (``rule="eager"``): at most eager's
  error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import use_backend
from fastdiff.ops._library import FusedOp

#: What the tests judge: the CPU kernels, or what a run of ``-m numerics`` with another backend sets.
BACKEND = os.environ.get("FASTDIFF_TEST_BACKEND", "cpu")
DEVICE = torch.device(os.environ.get("FASTDIFF_TEST_DEVICE", "cpu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Triton's interpreter, which has no arithmetic of bfloat16; its time goes by the number of tiles.
INTERPRETED = BACKEND == "triton" and DEVICE.type == "cpu"
if INTERPRETED:
    DTYPES = (torch.float32, torch.float16)
#: How far an fp32 kernel with one exponential may be off: the GPU's own exp2 is good to 2 ulp, the CPU kernels' to 0.5.
EXP_ULPS = 4 if BACKEND == "cpu" else 6
#: How far fp32 results of matrix products may be off on a GPU (RMS): tensor cores cut off what a sum loses instead of
#: rounding it (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021).
PRODUCT_ULPS = 4

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Of feature maps (B, C, H, W): a tensor -> the same values in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "permuted": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
}



def numerics_on_gpus(reason: str) -> pytest.MarkDecorator:
    """Of tests of what a CPU kernel refuses, and so not among the numbers of one."""
    return pytest.mark.skip(reason=reason) if BACKEND == "cpu" else pytest.mark.numerics


def run_kernel(op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``op`` so that only the kernel under test can serve it, into memory that held NaN before.

    Tensors go to the device under test with their strides and offsets; results come back.
    """
    args, kwargs = _map(_to_device, (args, kwargs))
    poison(args, kwargs)
    with use_backend(BACKEND, strict=True):
        choice = op.choose(*args, **kwargs)
        assert choice.backend == BACKEND, choice.reason
        return _map(lambda v: v.cpu() if isinstance(v, Tensor) else v, choice.run(*args, **kwargs))


def _to_device(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device == DEVICE:
        return value
    memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(DEVICE)
    there = torch.empty(0, dtype=value.dtype, device=DEVICE)
    return there.set_(memory.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def poison(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Leave NaN in the memory that an output of an argument's size is likely to be allocated from."""
    _spacers.clear()
    sizes = {t.numel() * t.element_size() for t in _tensors((args, kwargs))} - {0}
    # All-ones bytes are NaN in every floating format. Many small ones use up whatever else would fit.
    held = [
        [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(32 if size < 1 << 18 else 4)]
        for size in sizes
    ]
    for buffers in held:
        _spacers.extend(buffers[1::2])


#: Between the buffers that :func:`poison` frees, lest the allocator join these to some of another size.
_spacers: list[Tensor] = []


def assert_numerics(
    op: FusedOp[..., Any],
    arguments: Callable[[torch.Generator], Arguments],
    *,
    rule: str = "rounded",
    seeds: int = 10,
) -> None:
    """Hold the kernel under test of ``op`` to the numerics rule.

    Args:
        op: the op; its ``eager``, on the arguments in fp64, is the reference.
        arguments: generator -> (args, kwargs) in the dtypes under test.
        rule: ``"rounded"`` or ``"eager"``, see the module's docstring.
        seeds: how many draws are pooled.
    """
    assert seeds >= 10 and rule in ("rounded", "eager")
    pools: list[dict[str, float]] = []
    for seed in range(seeds):
        args, kwargs = arguments(torch.Generator().manual_seed(seed))
        ours = _outputs(run_kernel(op, *args, **kwargs))
        eager = _outputs(op.eager(*args, **kwargs))
        exact = _outputs(op.eager(*_to_fp64(args), **_to_fp64(kwargs)))
        assert len(ours) == len(eager) == len(exact)
        for i, (o, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
            assert o.dtype == e.dtype and o.shape == e.shape and x.dtype == torch.float64
            assert torch.isfinite(x).all(), "the reference is not finite; use assert_same_nonfinite"
            if i == len(pools):
                pools.append(dict.fromkeys(("ours", "eager", "rounded", "norm"), 0.0))
            for name, value in (("ours", o), ("eager", e), ("rounded", x.to(o.dtype))):
                pools[i][name] += (value.double() - x).square().sum().item()
            pools[i]["norm"] += x.square().sum().item()
    for i, (pool, output) in enumerate(zip(pools, ours, strict=True)):
        assert pool["norm"] > 0, f"output {i} of {op.name} is all zero: nothing is tested"
        ours_, eager_, rounded = ((pool[k] / pool["norm"]) ** 0.5 for k in ("ours", "eager", "rounded"))
        if output.dtype not in (torch.bfloat16, torch.float16):
            limit, what = 2 * max(eager_, rounded), "2 x eager's error"
            if rule == "eager" and DEVICE.type != "cpu":
                limit = max(limit, PRODUCT_ULPS * torch.finfo(output.dtype).eps)
        elif rule == "eager":
            limit, what = eager_, "eager's error"
            if DEVICE.type != "cpu":  # three standard deviations of what chance does to a ratio of RMS errors
                limit *= 1 + 3 / (seeds * output.numel()) ** 0.5
        else:
            limit, what = 1.02 * rounded, "1.02 x the correctly rounded result's error"
        assert ours_ <= limit, (
            f"{op.name}, output {i}: relative RMS error {ours_:.4g} exceeds {what} = {limit:.4g} "
            f"(eager {eager_:.4g}, correctly rounded {rounded:.4g})"
        )


def assert_same_nonfinite(op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> None:
    """The kernel is non-finite only where eager is, and NaN wherever eager is NaN."""
    for ours, eager in zip(_outputs(run_kernel(op, *args, **kwargs)), _outputs(op.eager(*args, **kwargs)), strict=True):
        extra = ~torch.isfinite(ours) & torch.isfinite(eager)
        assert not extra.any(), f"{int(extra.sum())} non-finite values that eager does not have"
        lost = torch.isfinite(ours) & torch.isnan(eager)
        assert not lost.any(), f"{int(lost.sum())} NaN of eager are finite here"


def assert_gradients(op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> None:
    """Where gradients are needed the op runs eager, says so, and has eager's gradients; ``torch.ops`` too."""

    def gradients(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves, (a, k) = _with_grad((args, kwargs))
        if function == op:
            choice = op.choose(*a, **k)
            assert choice.backend == "eager" and "gradient" in choice.reason, choice
        outputs = [o for o in _outputs(function(*a, **k)) if o.numel()]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
        return torch.autograd.grad(outputs, leaves, seeds)

    expected = gradients(op.eager)
    assert expected and any(g.abs().sum() > 0 for g in expected)
    for function in (op, op.overload):
        for got, want in zip(gradients(function), expected, strict=True):
            torch.testing.assert_close(got, want)


def assert_compiles(op: FusedOp[..., Any], *args: Any, **kwargs: Any) -> None:
    """``torch.compile(fullgraph=True)`` by the real inductor keeps the kernel: same bits as without."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: op(*a, **k), fullgraph=True)
    with torch.no_grad():
        expected = _outputs(run_kernel(op, *args, **kwargs))
        for got, want in zip(_outputs(compiled(*args, **kwargs)), expected, strict=True):
            assert got.stride() == want.stride()
            assert torch.equal(got, want)


def _outputs(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, v) for v in value)
    return function(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda v: found.append(v) if isinstance(v, Tensor) else None, value)
    return found


def _to_fp64(value: Any) -> Any:
    def convert(v: Any) -> Any:
        if isinstance(v, Tensor) and v.is_floating_point():
            return v.double()
        return torch.float64 if isinstance(v, torch.dtype) else v

    return _map(convert, value)


def _with_grad(value: Any) -> tuple[list[Tensor], Any]:
    leaves: list[Tensor] = []

    def convert(v: Any) -> Any:
        if not (isinstance(v, Tensor) and v.is_floating_point()):
            return v
        leaves.append(v.detach().clone().requires_grad_())
        return leaves[-1]

    return leaves, _map(convert, value)

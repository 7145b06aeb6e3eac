"""The ops' own backward: numbers against fp64, second order, forward mode, tracing, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import DTYPES, poison
from torch import Tensor
from torch.profiler import profile

from fastdiff.backends import cpu
from fastdiff.ops import adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln, group_norm_silu
from fastdiff.ops._library import FusedOp

Call = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[[torch.Generator, torch.dtype], Call]
DIFFERENTIABLE = (adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln, group_norm_silu)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 0)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def norm_call(
    shape: tuple[int, ...], groups: int, *, nhwc: bool = False, modulated: bool = False, **options: Any
) -> Make:
    """Arguments of ``group_norm_silu`` with weight and bias, and with ``modulated`` all else."""
    batch, channels = shape[:2]

    def call(generator: torch.Generator, dtype: torch.dtype) -> Call:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        x = random(*shape) * 1.5 + 0.5
        kwargs = dict(options)
        if modulated:
            scale, shift = random(batch, 2 * channels).chunk(2, dim=1)
            kwargs |= {"temb": random(batch, channels, *(1,) * (len(shape) - 2)), "scale": scale, "shift": shift}
        return (channels_last(x) if nhwc else x, groups, random(channels), random(channels)), kwargs

    return call


def row_call(
    op: FusedOp[..., Any], shape: tuple[int, ...], *, rms: bool = False, affine: bool = False, vector: bool = False
) -> Make:
    """Arguments of one of the row ops, modulated per sample or, with ``vector``, by (D,)."""

    def call(generator: torch.Generator, dtype: torch.dtype) -> Call:
        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        width = shape[-1]
        modulations = [random(width)] * 4 if vector else random(shape[0], 4 * width).chunk(4, dim=1)
        norm = {"rms": rms}
        if affine:
            norm |= {"weight": random(width), "bias": random(width)}
        x, residual = random(*shape), random(*shape)
        if op is adaln_modulate:
            return (x, *modulations[:2]), norm
        if op is adaln_modulate_dual:
            return (x, *modulations), norm
        if op is gate_residual:
            return (x, modulations[0], residual), {}
        return (x, modulations[0], residual, *modulations[1:3]), norm

    return call


def without_gate(make: Make) -> Make:
    """The same arguments of ``gate_residual_adaln`` but for the gate."""

    def call(generator: torch.Generator, dtype: torch.dtype) -> Call:
        (x, _, *others), norm = make(generator, dtype)
        return (x, None, *others), norm

    return call


NORMS = {
    "plain": norm_call((2, 40, 9, 11), 8),
    "no silu, tokens": norm_call((2, 40, 9, 11), 8, silu=False, tokens=True),
    "modulated": norm_call((2, 40, 9, 11), 8, modulated=True),
    "modulated nhwc": norm_call((2, 40, 9, 11), 8, nhwc=True, modulated=True),
    "nhwc tokens": norm_call((2, 24, 13, 5), 3, nhwc=True, tokens=True),
    "one channel a group": norm_call((3, 42, 5, 3), 42, modulated=True),
    "one group, long": norm_call((1, 12, 50, 41), 1),
    "long nhwc": norm_call((1, 20, 50, 41), 4, nhwc=True),
    "no pixels": norm_call((3, 64), 8),
    "3d": norm_call((1, 12, 3, 5, 7), 4, modulated=True),
}
ROWS = {
    "adaln": (adaln_modulate, row_call(adaln_modulate, (2, 37, 77))),
    "adaln affine": (adaln_modulate, row_call(adaln_modulate, (2, 37, 48), affine=True)),
    "adaln rms": (adaln_modulate, row_call(adaln_modulate, (3, 21, 40), rms=True, affine=True)),
    "adaln vector": (adaln_modulate, row_call(adaln_modulate, (2, 3, 7, 33), vector=True)),
    "adaln of rows": (adaln_modulate, row_call(adaln_modulate, (5, 64))),
    "dual": (adaln_modulate_dual, row_call(adaln_modulate_dual, (2, 37, 77))),
    "dual affine": (adaln_modulate_dual, row_call(adaln_modulate_dual, (2, 37, 48), affine=True)),
    "dual rms, vector": (adaln_modulate_dual, row_call(adaln_modulate_dual, (3, 21, 40), rms=True, vector=True)),
    "gate": (gate_residual, row_call(gate_residual, (2, 37, 77))),
    "gate vector": (gate_residual, row_call(gate_residual, (2, 37, 77), vector=True)),
    "gate and adaln": (gate_residual_adaln, row_call(gate_residual_adaln, (2, 37, 77))),
    "gate and adaln, affine": (gate_residual_adaln, row_call(gate_residual_adaln, (2, 37, 48), affine=True)),
    "residual and adaln": (gate_residual_adaln, without_gate(row_call(gate_residual_adaln, (2, 37, 48), affine=True))),
    "gate and rms": (gate_residual_adaln, row_call(gate_residual_adaln, (2, 21, 40), rms=True)),
}
CASES = {**{name: (group_norm_silu, call) for name, call in NORMS.items()}, **ROWS}


def leaves_of(call: Call, dtype: torch.dtype, wanted: Callable[[int], bool] = lambda i: True) -> tuple[Call, dict]:
    """The call with fresh tensors of ``dtype``, in their layouts, and those of them that require a gradient."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().to(dtype).clone(memory_format=torch.preserve_format)
        if wanted(len(leaves)):
            value.requires_grad_()
        leaves[name] = value
        return value

    args = tuple(leaf(str(i), v) for i, v in enumerate(call[0]))
    kwargs = {n: leaf(n, v) for n, v in call[1].items()}
    return (args, kwargs), {n: t for n, t in leaves.items() if t.requires_grad}


def outputs_of(function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
    result = function(*call[0], **call[1])
    return result if isinstance(result, tuple) else (result,)


def gradients(
    function: Callable[..., Any], call: Call, dtype: torch.dtype, seeds: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of a random projection, drawn in ``seeds``, of what the call gives in ``dtype``."""
    call, leaves = leaves_of(call, dtype)
    outputs = outputs_of(function, call)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).to(seeds).to(dtype) for o in outputs]
    poison(call[0], call[1])
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), directions), strict=True))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_numerics(name: str, dtype: torch.dtype) -> None:
    """fp32 gradients: at most twice eager's error. Half: at most eager's, or 1.02 roundings of the exact result."""
    op, make = CASES[name]
    pools: dict[str, list[float]] = {}
    for seed in range(10):
        call = make(torch.Generator().manual_seed(seed), dtype)
        assert op.choose(*leaves_of(call, dtype)[0][0], **leaves_of(call, dtype)[0][1]).backend == "cpu"
        ours, eager, exact = (
            gradients(f, call, d, dtype) for f, d in ((op, dtype), (op.eager, dtype), (op.eager, torch.float64))
        )
        for leaf, x in exact.items():
            assert ours[leaf].dtype == dtype and ours[leaf].shape == x.shape
            pool = pools.setdefault(leaf, [0.0] * 4)
            for i, value in enumerate((ours[leaf].double() - x, eager[leaf].double() - x, x.to(dtype).double() - x, x)):
                pool[i] += value.square().sum().item()
    for leaf, pool in pools.items():
        error, of_eager, rounded = ((p / pool[3]) ** 0.5 for p in pool[:3])
        limit = 2 * max(of_eager, rounded) if dtype == torch.float32 else max(of_eager, 1.02 * rounded)
        assert pool[3] > 0 and error <= limit, f"gradient of {leaf}: {error:.3g}, eager {of_eager:.3g}"


@pytest.mark.parametrize("name", [*CASES, "one sample, vectors"])
def test_gradients_accumulate(name: str) -> None:
    """Each leaf has memory of its own: what comes second is added to it once."""
    if name in CASES:
        op, make = CASES[name]
        call = make(torch.Generator().manual_seed(0), torch.float32)
    else:
        op, call = adaln_modulate, ((torch.randn(1, 9, 64), None, torch.randn(1, 64), None, torch.randn(64)), {})
    call, leaves = leaves_of(call, torch.float32)
    for times in (1, 2):
        torch.cat([o.flatten() for o in outputs_of(op, call)]).sum().backward()
        grads = {n: t.grad for n, t in leaves.items()}
        if times == 1:
            single = {n: g.clone() for n, g in grads.items()}
    assert len({g.data_ptr() for g in grads.values()}) == len(leaves)
    for n, grad in grads.items():
        assert torch.equal(grad, 2 * single[n]), n


@pytest.mark.numerics
@pytest.mark.parametrize("nhwc", [False, True])
def test_threads_agree(nhwc: bool) -> None:
    """Several threads split the pixels, or the tokens, and add up their parts."""
    norm = norm_call((1, 24, 61, 67), 2, nhwc=nhwc, modulated=True)
    calls = [(group_norm_silu, norm), (gate_residual_adaln, row_call(gate_residual_adaln, (1, 997, 64)))]
    threads = torch.get_num_threads()
    for op, make in calls:
        call = make(torch.Generator().manual_seed(0), torch.float32)
        found = []
        try:
            for count in (1, 5):
                torch.set_num_threads(count)
                found.append(gradients(op, call, torch.float32, torch.float32))
        finally:
            torch.set_num_threads(threads)
        for leaf in found[0]:
            torch.testing.assert_close(found[0][leaf], found[1][leaf], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_eager_reference(name: str) -> None:
    """In fp64, the backward made of eager references gives what autograd makes of the forward's."""
    op, make = CASES[name]
    call, leaves = leaves_of(make(torch.Generator().manual_seed(0), torch.float64), torch.float64)
    outputs = outputs_of(op.eager, call)
    generator = torch.Generator().manual_seed(1)
    grads = tuple(torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs)
    expected = torch.autograd.grad(outputs, list(leaves.values()), grads)

    names = list(op._parameters)
    arguments = dict.fromkeys(names) | op._defaults | dict(zip(names, call[0], strict=False)) | call[1]
    arguments |= {f"output{i}": o for i, o in enumerate(outputs) if f"output{i}" in op._backward.saved}
    with torch.no_grad():
        found = op._backward.function(frozenset(names), grads, **arguments)
    for leaf, exact in zip(leaves, expected, strict=True):
        ours = found[names[int(leaf)] if leaf.isdigit() else leaf]
        ours = ours.sum(0) if ours.numel() != exact.numel() else ours
        torch.testing.assert_close(ours.reshape(exact.shape).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_gradcheck_runs_eager(op: FusedOp[..., Any]) -> None:
    """In fp64 the ops run eager, to any order."""
    make = norm_call((2, 4, 3), 2, modulated=True) if op is group_norm_silu else row_call(op, (2, 3, 5))
    call, leaves = leaves_of(make(torch.Generator().manual_seed(0), torch.float64), torch.float64)
    assert "float64" in op.choose(*call[0], **call[1]).reason

    def function(*values: Tensor) -> Any:
        named = dict(zip(leaves, values, strict=True))
        args = (named.get(str(i), v) for i, v in enumerate(call[0]))
        return op(*args, **{n: named.get(n, v) for n, v in call[1].items()})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), atol=1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "name", ["modulated", "modulated nhwc", "no silu, tokens", "adaln affine", "dual", "gate", "gate and adaln"]
)
def test_second_order(name: str) -> None:
    """A gradient penalty: the second derivative is that of the backward's eager reference."""
    op, make = CASES[name]
    found = []
    for function, dtype in ((op, torch.float32), (op.eager, torch.float64)):
        call, leaves = leaves_of(make(torch.Generator().manual_seed(0), torch.float32), dtype)
        loss = sum(o.square().mean() for o in outputs_of(function, call))
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True))
    for ours, exact in zip(*found, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert (ours.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-9


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["modulated", "adaln", "dual", "gate", "gate and adaln"])
def test_compiled(name: str) -> None:
    """Inductor keeps forward and backward kernels, and the numbers."""
    op, make = CASES[name]
    call = make(torch.Generator().manual_seed(0), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: op(*a, **k), fullgraph=True)
    expected = gradients(op, call, torch.float32, torch.float32)
    gradients(compiled, call, torch.float32, torch.float32)
    with profile() as profiled:
        found = gradients(compiled, call, torch.float32, torch.float32)
    for leaf, value in expected.items():
        torch.testing.assert_close(found[leaf], value, rtol=1e-5, atol=1e-5)
    kernels = {event.key for event in profiled.key_averages() if event.key.startswith("fastdiff::")}
    assert f"fastdiff::{op.name}" in kernels and any(k.endswith("_backward") for k in kernels), kernels


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["modulated", "nhwc tokens", "no silu, tokens", "adaln rms", "dual", "gate and adaln"])
def test_opcheck(name: str) -> None:
    op, make = CASES[name]
    call, _ = leaves_of(make(torch.Generator().manual_seed(0), torch.float32), torch.float32)
    torch.library.opcheck(op.overload, *call, rtol=1e-4, atol=1e-4)  # tracing changes x's layout, and the order of sums


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES)
def test_no_more_memory_than_eager(name: str) -> None:
    """What is kept for the backward: at most what eager keeps; of GroupNorm + SiLU, less than half."""
    op, make = CASES[name]

    def kept(function: Callable[..., Any]) -> int:
        call, leaves = leaves_of(make(torch.Generator().manual_seed(0), torch.float32), torch.float32)
        names = ("2", "3") if op is group_norm_silu else ("weight", "bias")  # parameters, which stay in memory anyway
        parameters = {t.data_ptr() for n, t in leaves.items() if n in names}
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in parameters:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = outputs_of(function, call)
        del outputs
        return sum(storages.values())

    ours, eager = kept(op), kept(op.eager)
    assert 0 < ours <= eager
    if name in ("modulated", "long nhwc"):
        assert ours < 0.6 * eager


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["modulated", "adaln affine", "dual affine", "gate", "gate and adaln"])
def test_some_gradients_only(name: str) -> None:
    """Frozen weights, or a frozen input: what is needed comes out, and nothing else is touched."""
    op, make = CASES[name]
    call = make(torch.Generator().manual_seed(0), torch.float32)
    count = len(leaves_of(call, torch.float32)[1])
    everything = gradients(op, call, torch.float32, torch.float32)
    for only in range(count):
        some, leaves = leaves_of(call, torch.float32, lambda i, only=only: i == only)
        outputs = outputs_of(op, some)
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator) for o in outputs])
        for leaf, tensor in leaves.items():
            torch.testing.assert_close(tensor.grad, everything[leaf], rtol=1e-6, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["gate and adaln", "dual affine"])
def test_one_of_two_results(name: str) -> None:
    """Either may be unused."""
    op, make = CASES[name]
    call = make(torch.Generator().manual_seed(0), torch.float32)
    for index in (0, 1):
        found = []
        for function in (op, op.eager):
            fresh, leaves = leaves_of(call, torch.float32)
            result = outputs_of(function, fresh)[index]
            found.append(torch.autograd.grad(result.square().sum(), list(leaves.values()), allow_unused=True))
        for ours, eager in zip(*found, strict=True):
            if eager is None:
                assert ours is None or not ours.any()
            else:
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.kernel
def test_forward_mode_and_functional_transforms_run_eager() -> None:
    x, direction = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    expected = torch.func.jvp(lambda x: group_norm_silu.eager(x, 4), (x,), (direction,))
    for ours, eager in zip(torch.func.jvp(lambda x: group_norm_silu(x, 4), (x,), (direction,)), expected, strict=True):
        torch.testing.assert_close(ours, eager)
    seen = []

    def loss(op: Callable[..., Tensor], x: Tensor) -> Tensor:
        seen.append(group_norm_silu.choose(x, 4).reason)
        return op(x, 4).square().sum()

    for op in (group_norm_silu, group_norm_silu.overload):
        ours = torch.func.grad(lambda x, op=op: loss(op, x))(x)
        torch.testing.assert_close(ours, torch.func.grad(lambda x: loss(group_norm_silu.eager, x))(x))
    assert set(seen) == {"cpu: a gradient is needed within a transform of torch.func"}


@pytest.mark.kernel
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 6, 32, requires_grad=True)
    sample, token = torch.randn(2, 32), torch.randn(2, 6, 32)
    assert adaln_modulate.choose(x, sample).backend == "cpu"
    for choice in (
        adaln_modulate.choose(x, token),
        adaln_modulate.choose(x, sample, token),
        gate_residual.choose(x, token, token),
        gate_residual_adaln.choose(x, sample, token, token),
        adaln_modulate_dual.choose(x, sample, sample, scale2=token),
    ):
        assert choice.backend == "eager"
        assert choice.reason == "cpu: a gradient is needed, and the modulation is per token"
    for op in (adaln_modulate, adaln_modulate_dual):
        assert "out_dtype is not x's" in op.choose(x, out_dtype=torch.bfloat16).reason
    monkeypatch.setattr(cpu, "SMALL", x.numel() + 1)
    choice = adaln_modulate.choose(x, sample)
    assert (choice.backend, choice.reason) == (
        "eager", "cpu: a gradient is needed, and for this size eager's backward is as fast",
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in adaln_modulate.choose(x, sample).reason


@pytest.mark.kernel
def test_input_changed_before_the_backward_raises() -> None:
    x = torch.randn(2, 8, 5, requires_grad=True) * 1
    y = group_norm_silu(x, 4)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    group_norm_silu(x, 4, weight).sum().backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros(8))

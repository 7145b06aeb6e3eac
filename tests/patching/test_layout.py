"""channels_last inside, with packed weights or without: numbers and layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES, Case, assert_no_further, output, sd15_unet, vae
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching.blocks import layout, packed

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not packed._half_dtypes(), reason="no bf16 convolutions in oneDNN here")

CONVOLUTIONAL = pytest.mark.parametrize("case", [c for c in CASES if c.name != "DiT"], ids=lambda c: c.name)
PREPACK = pytest.mark.parametrize("prepack", [False, True], ids=["default", "prepack"])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(case: Case, dtype: torch.dtype, seed: int = 0, batch: int = 2) -> dict[str, Any]:
    return _first(case.inputs(_generator(seed), dtype), batch)


def _first(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    return {k: _first(v, batch) if isinstance(v, dict) else v[:batch] for k, v in inputs.items()}


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _double(v) if isinstance(v, dict) else v.double() if v.is_floating_point() else v for k, v in inputs.items()
    }


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _layouts(model: nn.Module) -> set[tuple[str, str]]:
    return {(row.backend, row.reason) for row in fastdiff.report(model).layouts}


@CONVOLUTIONAL
@PREPACK
def test_numerics(case: Case, prepack: bool) -> None:
    """Pooled over ten seeds at most 1.05 times as far from fp64 as eager, computed in NHWC everywhere inside."""
    model = case.build().to(BF16)
    exact = copy.deepcopy(model).double()
    calls = [_inputs(case, BF16, seed) for seed in range(10)]
    reference = torch.stack([output(exact, _double(inputs)) for inputs in calls])
    eager = torch.stack([output(model, inputs) for inputs in calls])
    fastdiff.patch(model, prepack_weights=prepack)
    seen: dict[str, bool] = {}
    names = {m: n for n, m in model.named_modules()}
    hooks = [
        m.register_forward_hook(lambda m, args, out: seen.update({names[m]: _is_nhwc(args[0]) and _is_nhwc(out)}))
        for m in model.modules()
        if type(m) is nn.Conv2d and "quant_conv" not in names[m]
    ]
    output(model, calls[0])
    assert len(seen) > 10
    assert all(seen.values()), [n for n, nhwc in seen.items() if not nhwc]
    for hook in hooks:
        hook.remove()
    ours = torch.stack([output(model, inputs) for inputs in calls])
    assert _layouts(model) == {("channels_last", "")}
    assert fastdiff.report(model).coverage == 1.0
    assert_no_further(ours, eager, reference)


@CONVOLUTIONAL
@PREPACK
@pytest.mark.parametrize("batch", [1, 2])
def test_output_has_the_stock_layout(case: Case, prepack: bool, batch: int) -> None:
    model = case.build().to(BF16)
    inputs = _inputs(case, BF16, batch=batch)
    calls: list[Callable[[], Tensor]] = [lambda: output(model, inputs)]
    if case.name == "AutoencoderKL":
        latents = torch.randn(batch, 4, 8, 8, generator=_generator()).to(BF16)
        calls = [
            lambda: model.encode(inputs["sample"]).latent_dist.mean,
            lambda: model.decode(latents).sample,
            lambda: model.encoder(inputs["sample"]),
            lambda: model.decoder(latents),
        ]
    else:
        calls.append(lambda: model(**inputs).sample)
    with torch.no_grad():
        stock = [call() for call in calls]
        fastdiff.patch(model, prepack_weights=prepack)
        for call, want in zip(calls, stock, strict=True):
            got = call()
            assert _layouts(model) >= {("channels_last", "")}
            assert got.stride() == want.stride()
            assert got.dtype == want.dtype


def test_fp32_stays_in_the_stock_layout() -> None:
    model = sd15_unet()
    inputs = _inputs(CASES[0], torch.float32)
    fastdiff.patch(model, skip="")  # the empty path is the U-Net itself: no layout
    assert not patch_of(model).layouts
    without = output(model, inputs)
    fastdiff.patch(model)
    assert torch.equal(output(model, inputs), without)
    ((backend, reason),) = _layouts(model)
    assert backend == "stock"
    assert "less accurate" in reason


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.autocast("cpu", BF16), "autocast is on"),
        (lambda: fastdiff.use_backend("eager"), "use_backend('eager') is in effect"),
        (lambda: torch.backends.mkldnn.flags(enabled=False), "torch.backends.mkldnn is switched off"),
    ],
    ids=["autocast", "use_backend", "mkldnn"],
)
def test_layout_reasons(context: Any, reason: str) -> None:
    model = vae().to(BF16)
    inputs = _inputs(CASES[4], BF16)
    fastdiff.patch(model)
    with context():
        ours = output(model, inputs)
        fastdiff.unpatch(model)
        stock = output(model, inputs)
        fastdiff.patch(model)
        output(model, inputs)
    assert ours.stride() == stock.stride()
    assert all(backend == "stock" and reason in why for backend, why in _layouts(model))
    fastdiff.patch(model, backend="eager")
    output(model, inputs)
    assert {backend for backend, _ in _layouts(model)} == {"stock"}


@CONVOLUTIONAL
@PREPACK
@pytest.mark.parametrize("what", ["weights", "input"])
def test_channels_last_already(case: Case, what: str, prepack: bool) -> None:
    """What the user made channels_last gives the same layout as without fastdiff."""
    model = case.build().to(BF16)
    inputs = _inputs(case, BF16)
    if what == "weights":
        model.to(memory_format=torch.channels_last)
    else:
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    stock = output(model, inputs)
    fastdiff.patch(model, prepack_weights=prepack)
    ours = output(model, inputs)
    assert ours.stride() == stock.stride()
    assert (ours - stock).norm() < 0.05 * stock.norm()
    assert fastdiff.report(model).coverage == 1.0


def test_gradients_run_in_the_stock_layout() -> None:
    model = vae().to(BF16).requires_grad_(True)
    fastdiff.patch(model)
    model(**_inputs(CASES[4], BF16)).sample.float().sum().backward()
    assert _layouts(model) == {("stock", "layout: a gradient is needed")}
    assert all(p.grad is not None and p.grad.is_contiguous() for p in model.decoder.conv_in.parameters())


def test_large_weight_is_computed_in_nchw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution with far more weights than inputs; the layers around it see nothing of that."""
    monkeypatch.setattr(layout, "_LARGE_WEIGHT", 64 * 64 * 9)
    seen: dict[int, list[bool]] = {}
    stock = nn.Conv2d.forward

    def forward(self: nn.Conv2d, input: Tensor) -> Tensor:
        seen.setdefault(self.weight.numel(), []).append(_is_nhwc(input))
        return stock(self, input)

    model = vae().to(BF16)
    latents = torch.randn(2, 4, 4, 4, generator=_generator()).to(BF16)
    with torch.no_grad():
        eager = model.decode(latents).sample
        monkeypatch.setattr(nn.Conv2d, "forward", forward)
        fastdiff.patch(model)
        small = model.decode(latents).sample
        assert seen[64 * 64 * 9][0] is False  # 2 x 64 x 4 x 4 inputs for 36864 weights
        assert all(seen[32 * 32 * 9])
        assert (small - eager).norm() < 0.05 * eager.norm()
        seen.clear()
        model.decode(torch.randn(2, 4, 16, 16, generator=_generator()).to(BF16))
        assert all(seen[64 * 64 * 9])
    fastdiff.unpatch(model)
    assert all("forward" not in vars(m) for m in model.modules())


@PREPACK
def test_compiled_without_graph_breaks(prepack: bool) -> None:
    """Under torch.compile the convolutions and the layout are the compiler's own."""
    decoder = vae().to(BF16).decoder
    model = vae().to(BF16)
    fastdiff.patch(model, prepack_weights=prepack)
    decoder = model.decoder
    x = torch.randn(1, 4, 4, 4, generator=_generator()).to(BF16)
    with torch.no_grad():
        want = decoder(x)
        for site in patch_of(model).sites:
            if isinstance(site.state, packed.PackedWeight):
                site.state._current = None
        torch._dynamo.reset()
        got = torch.compile(decoder, fullgraph=True, backend="aot_eager")(x)
    assert (got - want).norm() < 0.05 * want.norm()
    states = [s.state for s in patch_of(model).sites if isinstance(s.state, packed.PackedWeight)]
    assert not any(state.nbytes for state in states)
    assert bool(states) is prepack

"""channels_last inside and packed weights: numbers, layouts, and that no change of a weight is missed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES, Case, output, sd15_unet, vae
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of
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

    def error(value: Tensor) -> float:
        return ((value.double() - reference).norm() / reference.norm()).item()

    assert error(ours) <= 1.05 * error(eager), (error(ours), error(eager))


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


class _Layers(nn.Module):
    """One packed convolution and one packed linear layer, as ``patch`` installs them."""

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(48, 64, 3, padding=1)
        self.linear = nn.Linear(256, 288)
        self.to(dtype).requires_grad_(False)
        self.patch = patch_of(fastdiff.patch(vae()))
        self.patch.options = fastdiff.patching.Options(prepack_weights=True)
        packed.prepack(self.patch, self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.linear(x.flatten(1)[:, :256])


LAYERS = pytest.mark.parametrize("name", ["conv", "linear"])


def _layer(name: str, dtype: torch.dtype = BF16) -> tuple[nn.Module, Tensor]:
    """A packed layer that ran once, and its input."""
    layer = getattr(_Layers(dtype), name)
    shape = (2, 48, 6, 6) if name == "conv" else (2, 7, 256)
    x = torch.randn(shape, generator=_generator()).to(dtype)
    with torch.no_grad():
        layer(x)
    return layer, x


def _assert_current(layer: nn.Module, x: Tensor, before: Tensor) -> None:
    """The layer computes with the weight it has now, packed."""
    with torch.no_grad():
        ours, stock = layer(x), type(layer).forward(layer, x)
    assert site_of(layer).reason == ""
    assert site_of(layer).state.nbytes > 0
    exact = (stock.double() - before.double()).norm()
    assert exact > 0, "the change changes nothing"
    assert (ours.double() - stock.double()).norm() < 0.02 * exact
    assert ours.stride() == stock.stride()


def _in_place(layer: nn.Module) -> None:
    layer.weight[0, 0] += 50.0  # few elements: seen by the version counter


def _data_dense(layer: nn.Module) -> None:
    layer.weight.data += 0.1 * torch.randn(layer.weight.shape, generator=_generator(5)).to(layer.weight.dtype)


def _data_low_rank(layer: nn.Module) -> None:
    """What PEFT's merge does; of one rank, and most elements keep their bf16 value."""
    g, weight = _generator(6), layer.weight
    delta = torch.randn(weight.shape[0], 1, generator=g) @ torch.randn(1, weight[0].numel(), generator=g)
    new = weight.data + (5e-5 * delta).view(weight.shape).to(weight.dtype)
    assert 0.005 < (new != weight).float().mean() < 0.5
    weight.data.copy_(new)


def _data_swap(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * 2


def _load(layer: nn.Module) -> None:
    layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()})


def _assign(layer: nn.Module) -> None:
    layer.load_state_dict({k: v * 3 for k, v in layer.state_dict().items()}, assign=True)


def _replace(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(-layer.weight, requires_grad=False)


def _nhwc(layer: nn.Module) -> None:
    layer.weight.data *= 2
    layer.to(memory_format=torch.channels_last)


def _bias(layer: nn.Module) -> None:
    layer.bias.data += 1


@LAYERS
@pytest.mark.parametrize(
    "change",
    [_in_place, _data_dense, _data_low_rank, _data_swap, _load, _assign, _replace, _nhwc, _bias],
    ids=lambda f: f.__name__.strip("_"),
)
def test_changed_weights_are_seen(name: str, change: Callable[[nn.Module], None]) -> None:
    layer, x = _layer(name)
    with torch.no_grad():
        before = layer(x)
        change(layer)
    _assert_current(layer, x, before)


@LAYERS
def test_inference_tensors(name: str) -> None:
    """They count no versions, so that the sample alone sees their changes."""
    with torch.inference_mode():
        layer, x = _layer(name)
        assert layer.weight.is_inference()
        before = layer(x)
        layer.weight *= 2
        _assert_current(layer, x, before)


@LAYERS
def test_unchanged_weights_are_packed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(name)
    first = site_of(layer).state._current
    for other in (x, x[:1], x.repeat(3, 1, 1, 1) if name == "conv" else x[0], x.clone()):
        with torch.no_grad():
            layer(other)
        assert site_of(layer).state._current is first


@LAYERS
def test_dtype_change(name: str) -> None:
    layer, x = _layer(name)
    layer.float()
    with torch.no_grad():
        assert torch.equal(layer(x.float()), type(layer).forward(layer, x.float()))
    assert "less accurate" in site_of(layer).reason
    layer.bfloat16()
    _assert_current(layer, x, torch.zeros(()))


@LAYERS
@pytest.mark.parametrize(
    ("context", "dtype", "reason"),
    [
        (torch.no_grad, torch.float32, "float32"),
        (torch.no_grad, torch.float64, "this CPU does not compute in float64"),
        (lambda: torch.autocast("cpu", BF16), BF16, "autocast is on"),
        (lambda: fastdiff.use_backend("eager"), BF16, "use_backend('eager') is in effect"),
        (lambda: torch.backends.mkldnn.flags(enabled=False), BF16, "mkldnn is switched off"),
    ],
    ids=["fp32", "fp64", "autocast", "use_backend", "mkldnn"],
)
def test_reasons(name: str, context: Any, dtype: torch.dtype, reason: str) -> None:
    layer, x = _layer(name, dtype)
    with context(), torch.no_grad():
        assert torch.equal(layer(x), type(layer).forward(layer, x))
    assert reason in site_of(layer).reason


@LAYERS
def test_gradients(name: str) -> None:
    layer, x = _layer(name)
    layer.requires_grad_(True)
    want = torch.autograd.grad(type(layer).forward(layer, x).float().square().sum(), layer.weight)[0]
    got = torch.autograd.grad(layer(x).float().square().sum(), layer.weight)[0]
    assert torch.equal(got, want)
    assert "a gradient is needed" in site_of(layer).reason


class _Subclass(Tensor):
    pass


def _circular(layer: Any, x: Tensor) -> Tensor:
    """How pipelines are made to draw seamless textures."""
    layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    return x


def _own_forward(layer: Any, x: Tensor) -> Tensor:
    layer._conv_forward = lambda input, weight, bias: nn.functional.conv2d(input, weight, bias)
    return x


def _subclass(layer: Any, x: Tensor) -> Tensor:
    layer.weight = nn.Parameter(layer.weight.as_subclass(_Subclass), requires_grad=False)
    return x


def _strided(layer: Any, x: Tensor) -> Tensor:
    wide = torch.cat([layer.weight, layer.weight], dim=1)
    layer.weight = nn.Parameter(wide, requires_grad=False)
    layer.weight.data = wide[:, ::2]
    return x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_circular, "its padding is not plain zeros"),
        (_own_forward, "its padding is not plain zeros"),
        (_subclass, "a tensor is a "),
        (_strided, "the weight is strided"),
        (lambda layer, x: x[0], "the input is not a batch of feature maps"),
    ],
    ids=["circular", "_conv_forward", "subclass", "strided", "unbatched"],
)
def test_reasons_of_convolutions(change: Any, reason: str) -> None:
    layer, x = _layer("conv")
    with torch.no_grad():
        x = change(layer, x)
        assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))
    assert reason in site_of(layer).reason


def test_offloaded_weight_runs_stock() -> None:
    layer, x = _layer("linear")
    layer.to("meta")
    with torch.no_grad():
        layer(x.to("meta"))
    assert "a tensor is on meta" in site_of(layer).reason


def test_lora() -> None:
    """Through PEFT's wrapper around a packed convolution and linear layer; merged (through ``.data``), unmerged."""
    model = sd15_unet(block_out_channels=(64, 128), attention_head_dim=8).to(BF16)
    inputs = _inputs(CASES[0], BF16)
    fastdiff.patch(model, prepack_weights=True)
    plain = output(model, inputs)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["conv1", "ff.net.2"])
    inject_adapter_in_model(config, model)
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    assert {type(m.base_layer) for m in layers} == {nn.Conv2d, nn.Linear}
    results = {"unmerged": output(model, inputs)}
    packs = [site_of(m.base_layer) for m in layers]
    assert any(site is not None and site.state.nbytes and not site.reason for site in packs)
    for m in layers:
        m.merge()
    results["merged"] = output(model, inputs)
    fastdiff.unpatch(model)
    expected = output(model, inputs)
    assert (expected - plain).norm() > 0.05 * plain.norm(), "the LoRA does nothing"
    for got in results.values():
        assert (got - expected).norm() < 0.3 * (expected - plain).norm()
    fastdiff.patch(model, prepack_weights=True)
    output(model, inputs)
    for m in layers:
        m.unmerge()
        m.enable_adapters(False)
    assert (output(model, inputs) - plain).norm() < 0.3 * (expected - plain).norm()


def test_the_copy_stays_inside() -> None:
    """Not in the state dict, a deep copy or a pickle; given back by unpatch."""
    model = sd15_unet().to(BF16)
    inputs = _inputs(CASES[0], BF16)
    before, size = model.state_dict(), len(pickle.dumps(model))
    eager = output(model, inputs)
    fastdiff.patch(model, prepack_weights=True)
    ours = output(model, inputs)
    held = [site.state for site in patch_of(model).sites if isinstance(site.state, packed.PackedWeight)]
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Conv2d))
    assert sum(state.nbytes for state in held) >= weights
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k].data_ptr() == before[k].data_ptr() for k in before)

    twin = copy.deepcopy(model)
    data = pickle.dumps(model)
    assert len(data) < size + weights / 2
    loaded = pickle.loads(data)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, loaded, torch.load(file, weights_only=False)):
        states = [site.state for site in patch_of(other).sites if isinstance(site.state, packed.PackedWeight)]
        assert len(states) == len(held)
        assert not any(state.nbytes for state in states)
        assert torch.equal(output(other, inputs), ours)
        assert all(state.nbytes for state in states)

    packs = [weakref.ref(state._current.packed) for state in held]
    del held
    fastdiff.unpatch(model)
    gc.collect()
    assert not any(ref() is not None for ref in packs)
    assert torch.equal(output(model, inputs), eager)


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


def test_option() -> None:
    model = sd15_unet()
    with pytest.raises(ValueError, match="prepack_weights is 'yes'; expected True or False"):
        fastdiff.patch(model, prepack_weights="yes")  # type: ignore[arg-type]
    assert patch_of(model) is None
    fastdiff.patch(model, prepack_weights=True, backend="eager")
    rows = [row for row in fastdiff.report(model).rows if "packed" in row.what]
    assert rows
    assert {row.reason for row in rows} == {"backend='eager' was asked for"}
    fastdiff.patch(model)
    assert not [row for row in fastdiff.report(model).rows if "packed" in row.what]

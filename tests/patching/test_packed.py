"""Packed weights of convolutions and linear layers: no change of a weight is missed, and the copy stays inside."""

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
from models import CASES, inputs_of, output, sd15_unet, vae
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import patch_of
from fastdiff.patching._site import site_of
from fastdiff.patching.blocks import packed

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not packed._half_dtypes(), reason="no bf16 convolutions in oneDNN here")


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
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
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
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5))
    layer.weight.data += 0.1 * noise.to(layer.weight.dtype)


def _data_low_rank(layer: nn.Module) -> None:
    """What PEFT's merge does; of one rank, and most elements keep their bf16 value."""
    g, weight = torch.Generator().manual_seed(6), layer.weight
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
    inputs = inputs_of(CASES[0], BF16)
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
    inputs = inputs_of(CASES[0], BF16)
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

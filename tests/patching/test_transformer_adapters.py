"""IP-Adapters and ControlNets of transformers: whatever is loaded before patching or after, the result is stock's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor
from transformer_case import Transformer, outputs
from transformer_models import TRANSFORMERS

import fastdiff

pytestmark = pytest.mark.kernel

IMAGE = 16


def _named(name: str) -> Transformer:
    return next(case for case in TRANSFORMERS if case.name == name)


def _flux_adapter(model: Any) -> Tensor:
    """Load one and return what it takes for a picture. The single blocks keep their processors."""
    text = model.config.joint_attention_dim
    adapted = {
        name: processor if name.startswith("single") else FluxIPAdapterAttnProcessor(model.inner_dim, text)
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(adapted)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(IMAGE, text, 4)])
    return torch.randn(1, 1, IMAGE)


def _sd3_adapter(model: Any) -> Tensor:
    width, head = model.inner_dim, model.config.attention_head_dim
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, width, head, timesteps_emb_dim=64)
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)
    model.image_proj = IPAdapterTimeImageProjection(
        IMAGE, width, hidden_dim=64, depth=1, heads=1, num_queries=3, timestep_in_dim=16
    )
    return torch.randn(2, 5, IMAGE)


#: Model -> how its IP-Adapter is loaded, which attention it leaves to us, and what of its own we serve: Flux's
#: dispatches attention twice, the second time to the picture.
ADAPTERS: dict[str, tuple[Callable[[Any], Tensor], str, set[str]]] = {
    "Flux dev": (_flux_adapter, "single_transformer_blocks", {"attention", "attention 2"}),
    "SD3.5 medium": (_sd3_adapter, "none", set()),
}


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_ip_adapter(name: str, first: str) -> None:
    """Its processors run as they are, with our attention where they dispatch; everything around them by kernels."""
    case, (load, ours_within, dispatched) = _named(name), ADAPTERS[name]
    model = case.build()
    inputs = case.inputs(0, model=model)
    plain = outputs(model, inputs)
    if first == "patch":
        fastdiff.patch(model)
    torch.manual_seed(1)
    picture = load(model)
    model.eval().requires_grad_(False)
    if first == "adapter":
        fastdiff.patch(model)

    def run(m: Any) -> Tensor:
        picture_of = [picture] if isinstance(getattr(m, "encoder_hid_proj", None), torch.nn.Module) else picture
        return outputs(m, inputs | {"joint_attention_kwargs": {"ip_adapter_image_embeds": picture_of}})

    ours = run(model)
    report = fastdiff.report(model)
    expected = run(fastdiff.unpatch(model))
    assert (expected - plain).norm() > 1e-3 * plain.norm(), "the adapter does nothing"
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    for row in report.rows:
        if row.path.startswith("image_proj"):  # the adapter's own
            continue
        foreign = "Attention" in row.cls and not row.path.startswith(ours_within)
        assert row.fused is not foreign, row
        if foreign:
            assert "its processor is " in row.reason, row
            assert {slot for slot, backend in row.served_by.items() if backend == "cpu"} == dispatched, row


#: Model -> its ControlNet, and which arguments take its results.
CONTROLNETS = {
    "Flux dev": ("Flux ControlNet", ("controlnet_block_samples", "controlnet_single_block_samples")),
    "SD3": ("SD3 ControlNet", ("block_controlnet_hidden_states",)),
    "HunyuanDiT": ("HunyuanDiT ControlNet", ("controlnet_block_samples",)),
    "Qwen-Image": ("Qwen-Image ControlNet", ("controlnet_block_samples",)),
    "Sana": ("Sana ControlNet", ("controlnet_block_samples",)),
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnet(name: str) -> None:
    """A ControlNet and the model that takes its results, both patched."""
    control, arguments = CONTROLNETS[name]
    models = [_named(control).build(), _named(name).build()]
    inputs = [_named(n).inputs(0, model=m) for n, m in zip((control, name), models, strict=True)]

    def run(net: Any, model: Any, strength: float) -> Tensor:
        with torch.no_grad():
            found = net(**inputs[0], conditioning_scale=strength, return_dict=False)
        found = (found,) if isinstance(found[0], Tensor) else found  # Qwen-Image gives the samples themselves
        given = {argument: list(value) for argument, value in zip(arguments, found, strict=True)}
        return outputs(model, inputs[1] | given)

    without, expected = run(*models, 0.0), run(*models, 0.7)
    assert (expected - without).norm() > 1e-3 * without.norm(), "the ControlNet does nothing"
    patched = [fastdiff.patch(copy.deepcopy(m)) for m in models]
    ours = run(*patched, 0.7)
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert all(row.fused or row.backend == "stock" for m in patched for row in fastdiff.report(m).rows)


def test_kontext() -> None:
    """Flux Kontext is Flux with a second picture after the first, told apart by the first of the position's axes."""
    case = _named("Flux dev")
    model = case.build()
    inputs = case.inputs(0, model=model)
    tokens, ids = inputs["hidden_states"], inputs["img_ids"]
    other = torch.randn(1, 10, tokens.shape[-1])
    second = ids[:10] + torch.tensor([1.0, 0, 0])
    joint = inputs | {"hidden_states": torch.cat([tokens, other], dim=1), "img_ids": torch.cat([ids, second])}
    alone, expected = outputs(model, inputs), outputs(model, joint)
    assert (expected[: len(alone)] - alone).norm() > 1e-3 * alone.norm(), "the second picture does nothing"
    fastdiff.patch(model)
    ours = outputs(model, joint)
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert all(row.fused for row in fastdiff.report(model).rows)

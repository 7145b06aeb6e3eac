"""What transformers take beside the usual: a time for every token, modulations of tokens apart, fp16 that overflows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.activations import FP32SiLU
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from transformer_case import Transformer, outputs
from transformer_models import TRANSFORMERS

import fastdiff

pytestmark = pytest.mark.kernel


def _named(name: str) -> Transformer:
    return next(case for case in TRANSFORMERS if case.name == name)


def _times(*tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, count, generator=generator) * 900 for n, count in zip(tokens[::2], tokens[1::2], strict=True)]


#: Model -> the arguments that give every token a time of its own.
PER_TOKEN: dict[str, Callable[[], dict[str, Any]]] = {
    "Wan T2V": lambda: {"timestep": _times(1, 18)[0]},
    "Wan I2V": lambda: {"timestep": _times(1, 18)[0]},
    "ChronoEdit": lambda: {"timestep": _times(1, 18)[0]},
    "LTX": lambda: {"timestep": _times(2, 24)[0]},
    "LTX-2": lambda: dict(zip(("timestep", "audio_timestep"), _times(2, 24, 2, 5), strict=True)),
    "LTX-2.3": lambda: dict(zip(("timestep", "audio_timestep"), _times(2, 24, 2, 5), strict=True)),
    "Cosmos": lambda: {"timestep": _times(1, 2)[0].view(1, 1, 2, 1, 1)},
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_time_for_every_token(name: str) -> None:
    case = _named(name)
    model = case.build()
    inputs = case.inputs(0, model=model)
    changed = inputs | PER_TOKEN[name]()
    alike = inputs | {key: torch.full_like(value, 500.0) for key, value in PER_TOKEN[name]().items()}
    expected = outputs(model, changed)
    assert (expected - outputs(model, alike)).norm() > 1e-3 * expected.norm(), "the times make no difference"
    fastdiff.patch(model)
    ours = outputs(model, changed)
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert all(row.fused or row.backend == "stock" for row in fastdiff.report(model).rows)


def test_reference_tokens_with_a_time_of_their_own() -> None:
    """Flux 2 with cached reference pictures: modulations are per token; attention, which fills the cache, is stock."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    case = _named("Flux2")
    model = case.build()
    for attention in (module for module in model.modules() if hasattr(module, "set_processor")):
        parallel = hasattr(attention, "to_qkv_mlp_proj")
        attention.set_processor(Flux2KVParallelSelfAttnProcessor() if parallel else Flux2KVAttnProcessor())
    inputs = case.inputs(0, model=model) | {"kv_cache_mode": "extract", "num_ref_tokens": 6}

    def run(m: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            sample, cache = m(**inputs, return_dict=False)
        kept = cache.get_double(0)
        return sample, torch.cat([kept.k_ref.flatten(), kept.v_ref.flatten()])

    expected = run(model)
    patched = fastdiff.patch(copy.deepcopy(model))
    for ours, stock in zip(run(patched), expected, strict=True):
        assert (ours - stock).norm() <= 1e-5 * stock.norm()
    rows = fastdiff.report(patched).rows
    assert {row.cls for row in rows if not row.fused} == {"Flux2Attention", "Flux2ParallelSelfAttention"}


@pytest.mark.parametrize("name", ["Flux dev", "Flux2", "Chroma"])
def test_fp16_is_clipped(name: str) -> None:
    """Where the text's stream leaves fp16's range, blocks clip it, and everything stays finite."""
    case = _named(name)
    model = case.build().half()
    context = model.transformer_blocks[0].ff_context
    last = [module for module in context.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(1e4 / last.weight.abs().amax())
    seen: list[Tensor] = []
    model.transformer_blocks[0].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    inputs = case.inputs(0, torch.float16, model)
    expected = outputs(model, inputs)
    fastdiff.patch(model)
    ours = outputs(model, inputs)
    assert [t.abs().amax().item() for t in seen] == [65504.0] * 2
    assert ours.isfinite().all()
    assert (ours.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()


def test_ltx2_guided_by_skipped_attention() -> None:
    """In the blocks named, some samples keep their values: that is left to stock code, and nothing else."""
    case = _named("LTX-2.3")
    model = case.build()
    inputs = case.inputs(0, model=model)
    changed = inputs | {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([0.0, 1.0])}
    expected, alone = outputs(model, changed), outputs(model, inputs)
    assert (expected - alone).norm() > 1e-3 * alone.norm(), "nothing is skipped"
    fastdiff.patch(model)
    assert (outputs(model, changed) - expected).norm() <= 1e-5 * expected.norm()
    stock = {row.path: row.reason for row in fastdiff.report(model).rows if not row.fused}
    assert stock == {f"transformer_blocks.1.{name}": "some samples skip attention" for name in ("attn1", "audio_attn1")}


def test_ltx2_streams_apart() -> None:
    """Video and sound may be kept from attending to each other."""
    case = _named("LTX-2")
    model = case.build()
    inputs = case.inputs(0, model=model)
    expected, together = outputs(model, inputs | {"isolate_modalities": True}), outputs(model, inputs)
    assert (expected - together).norm() > 1e-3 * together.norm()
    fastdiff.patch(model)
    assert (outputs(model, inputs | {"isolate_modalities": True}) - expected).norm() <= 1e-5 * expected.norm()


def test_cosmos_keeps_its_dtype_beside_a_controlnet() -> None:
    """Residuals of another dtype are added in place by stock code."""
    case = _named("Cosmos")
    model = case.build().bfloat16()
    block, calls = model.transformer_blocks[0], []
    hook = block.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    outputs(model, case.inputs(0, torch.bfloat16, model))
    hook.remove()
    ((args, kwargs),) = calls
    named = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    named["controlnet_residual"] = torch.randn(named["hidden_states"].shape)
    with torch.no_grad():
        expected = block(**named)
        fastdiff.patch(model)
        ours = block(**named)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert (ours.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


def test_cosmos_with_a_picture_as_context() -> None:
    """Its cross-attention has an attention of its own for the picture: left alone, and the report says so."""
    case = replace(_named("Cosmos"), config=_named("Cosmos").config | {
        "img_context_dim_in": 12, "img_context_num_tokens": 4, "img_context_dim_out": 40,
    })  # fmt: skip
    model = case.build()
    inputs = case.inputs(0, model=model)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"], torch.randn(1, 4, 12)
    inputs["attention_mask"] = None
    expected = outputs(model, inputs)
    fastdiff.patch(model)
    assert (outputs(model, inputs) - expected).norm() <= 1e-5 * expected.norm()
    left = [row for row in fastdiff.report(model).rows if row.cls == "CosmosAttention"]
    assert [row.reason for row in left] == ["it also attends to a picture's context"] * 2


def test_patched_while_another_backend_is_active() -> None:
    """Cosmos's attention asks for the backend at every call, not once for all."""
    case = _named("Cosmos")
    model = case.build()
    inputs = case.inputs(0, model=model)
    with attention_backend("_native_math"):
        fastdiff.patch(model)
        outputs(model, inputs)
        reasons = {row.reason for row in fastdiff.report(model).rows if row.cls == "Attention"}
        assert reasons == {"another attention backend is active"}
    outputs(model, inputs)
    assert all(row.fused for row in fastdiff.report(model).rows if row.cls == "Attention")


def test_hidream_of_a_picture_that_is_not_square() -> None:
    """It is padded to the largest size; keys of the padding are zero."""
    case = _named("HiDream-I1")
    model = case.build()
    inputs = case.inputs(0, model=model)
    changed = inputs | {"hidden_states": torch.randn(2, model.config.in_channels, 4, 6)}
    expected = outputs(model, changed)
    fastdiff.patch(model)
    ours = outputs(model, changed)
    assert not torch.equal(ours, expected)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert all(row.fused for row in fastdiff.report(model).rows)


#: Model -> those of its classes that fuse an activation which is a module of its own.
HAVE_AN_ACTIVATION = {
    "Flux dev": {"FluxSingleTransformerBlock"},
    "Flux2": {"Flux2SwiGLU"},
    "Ovis-Image": {"SwiGLU", "OvisImageSingleTransformerBlock"},
    "Lumina2": {"LuminaFeedForward"},
    "OmniGen": {"OmniGenFeedForward"},
}


@pytest.mark.parametrize("name", HAVE_AN_ACTIVATION)
def test_hooks_on_an_activation_are_called(name: str) -> None:
    """Of a block that has it fused otherwise; the report says of what it is not."""
    case = _named(name)
    model = case.build()
    inputs = case.inputs(0, model=model)
    activations = [m for m in model.modules() if isinstance(m, (nn.SiLU, nn.GELU, FP32SiLU))]
    for activation in activations:
        activation.register_forward_hook(lambda module, given, result: result * 1.5)
    expected = outputs(model, inputs)
    fastdiff.patch(model)
    ours = outputs(model, inputs)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    rows = [row for row in fastdiff.report(model).rows if {"gelu_tanh", "swiglu"} & row.served_by.keys()]
    said = {row.cls for row in rows if "its activation is a " in row.reason and not row.fused}
    assert said == HAVE_AN_ACTIVATION[name]

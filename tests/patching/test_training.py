"""Fine-tuning and guidance with a patched model: eager's gradients, through the ops' own backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from models import CASES, ddpm_unet, dit, improved_ddpm_unet, sd15_unet, sd_pipeline, sdxl_unet
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdiff
from fastdiff.backends import cpu

pytestmark = pytest.mark.kernel

Gradients = dict[str, Tensor]
Objective = Callable[[Any, torch.Generator], Gradients]


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are tiny, too small for the backward kernels to be chosen."""
    monkeypatch.setattr(cpu, "SMALL", 0)


def _random(generator: torch.Generator, *size: int, like: nn.Module) -> Tensor:
    """The same numbers, rounded to the model's precision, whatever that is; an fp64 model gets ``_ROUNDED`` ones."""
    value = torch.randn(*size, generator=generator)
    dtype = next(like.parameters()).dtype
    return value.to(_ROUNDED[-1]).to(dtype)


#: The precision under test, which the inputs of the fp64 reference are rounded to as well.
_ROUNDED = [torch.float32]


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> Gradients:
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    return {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def _parameters(model: nn.Module, marker: str = "") -> dict[str, Tensor]:
    return {n: p.requires_grad_() for n, p in model.named_parameters() if marker in n}


def ddpm_objective(model: Any, generator: torch.Generator) -> Gradients:
    """Of every weight: the mean square error of the predicted noise (Ho et al., 2020)."""
    clean, noise = (_random(generator, 2, 3, 8, 8, like=model) for _ in range(2))
    timesteps = torch.randint(1000, (2,), generator=generator)
    noisy, leaves = DDPMScheduler().add_noise(clean, noise, timesteps), _parameters(model)
    return _gradients(F.mse_loss(model(noisy, timesteps).sample, noise), leaves)


def ddpm_objective_of_dit(model: Any, generator: torch.Generator) -> Gradients:
    clean, noise = (_random(generator, 2, 4, 8, 8, like=model) for _ in range(2))
    timesteps = torch.randint(1000, (2,), generator=generator)
    noisy, leaves = DDPMScheduler().add_noise(clean, noise, timesteps), _parameters(model)
    result = model(noisy, timesteps, class_labels=torch.tensor([1, 7])).sample
    return _gradients(F.mse_loss(result, noise), leaves)


def _denoise(model: Any, sample: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    timesteps = torch.randint(1000, (2,), generator=generator)
    return model(sample, timesteps, encoder_hidden_states=text).sample


def lora_step(model: Any, generator: torch.Generator) -> Gradients:
    """Of a LoRA's weights only, on linear layers and convolutions."""
    if "lora" not in getattr(model, "peft_config", {}):
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
        model.add_adapter(LoraConfig(r=4, target_modules=targets), "lora")
        values = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = 0.2 * _random(values, *parameter.shape, like=model)
    sample, noise = (_random(generator, 2, 4, 8, 8, like=model) for _ in range(2))
    result = _denoise(model, sample, _random(generator, 2, 77, 32, like=model), generator)
    return _gradients(F.mse_loss(result, noise), _parameters(model, "lora"))


def textual_inversion_step(model: Any, generator: torch.Generator) -> Gradients:
    """Of one token's embedding, all weights frozen."""
    sample, noise = (_random(generator, 2, 4, 8, 8, like=model) for _ in range(2))
    text, token = _random(generator, 2, 77, 32, like=model), _random(generator, 32, like=model).requires_grad_()
    text = torch.cat([text[:, :5], token.expand(2, 1, 32), text[:, 6:]], dim=1)
    return _gradients(F.mse_loss(_denoise(model, sample, text, generator), noise), {"token": token})


def guidance_step(model: Any, generator: torch.Generator) -> Gradients:
    """Of the noisy sample, all weights frozen, as in classifier guidance."""
    sample = _random(generator, 2, 4, 8, 8, like=model).requires_grad_()
    result = _denoise(model, sample, _random(generator, 2, 77, 32, like=model), generator)
    score = F.log_softmax(result.flatten(1), dim=1)[:, 3].sum()
    return _gradients(score, {"sample": sample})


def distillation_step(pipe: Any, generator: torch.Generator) -> Gradients:
    """Of a picture, through the VAE's encoder: score distillation (Poole et al., DreamFusion, 2022)."""
    picture = _random(generator, 2, 3, 16, 16, like=pipe.vae).requires_grad_()
    latents = pipe.vae.encode(picture).latent_dist.mode()
    noise, text = (_random(generator, 2, *size, like=pipe.unet) for size in (latents.shape[1:], (77, 32)))
    with torch.no_grad():  # here the kernels' shortcuts for inference are in use
        noisy = DDPMScheduler().add_noise(latents, noise, torch.tensor([300, 600]))
        direction = _denoise(pipe.unet, noisy, text, generator) - noise
    return _gradients((latents * direction).sum(), {"picture": picture})


OBJECTIVES: dict[str, tuple[Callable[[], Any], Objective]] = {
    "DDPM": (ddpm_unet, ddpm_objective),
    "improved DDPM": (improved_ddpm_unet, ddpm_objective),
    "DiT": (dit, ddpm_objective_of_dit),
    "LoRA": (sd15_unet, lora_step),
    "textual inversion": (sd15_unet, textual_inversion_step),
    "classifier guidance": (sd15_unet, guidance_step),
    "score distillation": (sd_pipeline, distillation_step),
}


def _judge(build: Callable[[], Any], objective: Objective, dtype: torch.dtype) -> Any:
    """Hold the patched model's gradients to the numerics rule; returns its report."""
    _ROUNDED[0] = dtype
    model = build().to(dtype)
    exact, eager = copy.deepcopy(model).to(torch.float64), copy.deepcopy(model)
    fastdiff.patch(model)
    errors = {"ours": 0.0, "eager": 0.0}
    try:
        for seed in range(40):
            truth, ours, theirs = (objective(m, torch.Generator().manual_seed(seed)) for m in (exact, model, eager))
            assert ours.keys() == theirs.keys() == truth.keys()
            # In bf16, the errors of a single gradient differ by up to a third, in either direction, from draw to draw.
            if seed == 10 and (dtype == torch.float32 or len(truth) > 1):
                break
            size = sum(t.square().sum().item() for t in truth.values())
            assert size > 0
            for name, found in (("ours", ours), ("eager", theirs)):
                distance = sum((found[n].double() - t).square().sum().item() for n, t in truth.items())
                errors[name] += distance / size
            for n, t in truth.items():
                # Gradients that are zero but for rounding, as of a key's bias, are compared with all the others.
                limit = 1e-3 if dtype == torch.float32 else 0.3
                assert (ours[n].double() - t).norm() <= limit * t.norm() + 1e-3 * size**0.5, n
    finally:
        _ROUNDED[0] = torch.float32
    factor = 2.0 if dtype == torch.float32 else 1.05
    assert 0 < errors["ours"] ** 0.5 <= factor * errors["eager"] ** 0.5, errors
    return fastdiff.report(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_numerics(name: str, dtype: torch.dtype) -> None:
    """At most twice eager's error in fp32, 1.05 times in bf16, over all gradients and draws."""
    report = _judge(*OBJECTIVES[name], dtype)
    served = [(slot, backend) for row in report.rows for slot, backend in row.served_by.items()]
    own = {"norm", "norm1", "norm2", "norm3", "gate"}
    assert all(backend == "cpu" for slot, backend in served if slot in own), served
    assert sum(slot in own for slot, _ in served) >= 6
    for row in report.rows:
        if "eager" in row.served_by.values():
            assert not row.fused and "a gradient is needed" in row.reason


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("DDPM", False), ("DDPM", True), ("DiT", False), ("DiT", True), ("LoRA", False), ("textual inversion", False)],
)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    build, objective = OBJECTIVES[name]

    def checkpointing(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=reentrant)

    plain, kept = build(), build()
    kept.enable_gradient_checkpointing(checkpointing)
    for model in (plain, kept):
        fastdiff.patch(model).train()
    results = []
    for model in (plain, kept):
        torch.manual_seed(0)  # of DiT's label dropout
        results.append(objective(model, torch.Generator().manual_seed(0)))
    expected, found = results
    # A reentrant checkpoint cuts off what is differentiable by its weights only: the first block.
    assert found.keys() == expected.keys() or (reentrant and len(found) > 0.8 * len(expected))
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, expected[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_more_memory_than_eager(case: Any) -> None:
    """All that the graph of a forward keeps, parameters aside."""

    def kept(model: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in parameters:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = model(**case.inputs(torch.Generator().manual_seed(0), torch.float32), return_dict=False)[0]
        assert result.requires_grad
        return sum(storages.values())

    model = case.build().requires_grad_(True)
    eager = kept(model)
    assert kept(fastdiff.patch(model)) < eager


@pytest.mark.parametrize("build", [sd15_unet, sdxl_unet])
def test_with_and_without_gradients_by_turns(build: Callable[[], Any]) -> None:
    """The shortcuts for inference (an addition in place, SiLU of the time embedding kept) leave no trace."""
    case = next(c for c in CASES if c.build is build)
    model = build().requires_grad_(True)
    inputs = case.inputs(torch.Generator().manual_seed(0), torch.float32)
    embeddings: list[Tensor] = []
    model.mid_block.resnets[0].register_forward_hook(lambda module, args, output: embeddings.append(args[1]))

    def run() -> Gradients:
        return _gradients(model(**inputs).sample.square().mean(), dict(model.named_parameters()))

    expected = run()
    fastdiff.patch(model)
    with torch.no_grad():
        model(**inputs)
    assert any(name.startswith("_fastdiff") for name in vars(embeddings[-1]))
    found = run()
    assert not any(name.startswith("_fastdiff") for name in vars(embeddings[-1]))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_compiled_training_step() -> None:
    """A patched model compiles with its backward: the kernels of both are in the graphs, without breaks."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    fastdiff.patch(model)
    expected = ddpm_objective(model, torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.profiler.profile() as profiled:
        found = ddpm_objective(compiled, torch.Generator().manual_seed(0))
    kernels = {e.key for e in profiled.key_averages()}
    assert {"fastdiff::group_norm_silu", "fastdiff::group_norm_silu_backward"} <= kernels
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-5)


def test_small_tensors_stay_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SMALL", 1 << 18)
    model = fastdiff.patch(ddpm_unet())
    ddpm_objective(model, torch.Generator().manual_seed(0))
    for row in fastdiff.report(model).rows:
        assert not row.fused and "a gradient is needed" in row.reason
    assert any("for this size eager's backward is as fast" in row.reason for row in fastdiff.report(model).rows)

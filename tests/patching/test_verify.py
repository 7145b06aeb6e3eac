"""verify proves what it says: it passes on honest sites, fails on wrong ones, and leaves everything as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from models import CASES, Case, ddpm_pipeline, run_sd, sd15_unet, sd_pipeline
from torch import nn

import fastdiff
from fastdiff import ops
from fastdiff.backends import Choice
from fastdiff.cli import main
from fastdiff.patching import patch_of
from fastdiff.patching._site import Replacement
from fastdiff.patching.blocks.feed_forward import geglu_projection

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
CALL: dict[str, Any] = {
    "prompt_embeds": torch.ones(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32),
    "num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np",
}  # fmt: skip


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model(case: Case, dtype: torch.dtype) -> None:
    model = case.build().to(dtype)
    result = fastdiff.verify(model)
    assert result, str(result)
    assert len(result.sites) == sum(case.sites.values())
    for check in (*result.sites, *result.models):
        assert check.ok, check
        assert 0 < check.error <= check.limit, check
        assert check.eager > 0, check
    assert patch_of(model) is None  # it was not patched before


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pipeline(scheduler: Any, dtype: torch.dtype) -> None:
    pipe = sd_pipeline(scheduler=scheduler(steps_offset=1)).to(dtype)
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in CALL.items()}
    fastdiff.patch(pipe)
    methods = {n: vars(m).get("forward") for n, m in pipe.unet.named_modules()}
    before = run_sd(pipe) if dtype == torch.float32 else None
    result = fastdiff.verify(pipe, **call)
    assert result.ok, str(result)
    reached = {check.path for check in result.sites if check.ok}
    assert "scheduler" in reached
    assert all(c.ok or c.path.startswith("vae.encoder") for c in result.sites), str(result)
    assert {c.path for c in result.models if c.ok} == {"unet", "vae.decoder"}
    assert result.latents is not None
    assert 0 < result.latents < (0.5 if dtype == torch.bfloat16 else 1e-3)
    assert {n: vars(m).get("forward") for n, m in pipe.unet.named_modules()} == methods
    if before is not None:
        assert torch.equal(run_sd(pipe), before)


def test_pipeline_without_arguments_runs_examples() -> None:
    result = fastdiff.verify(sd_pipeline())
    assert result.ok
    assert {c.path for c in result.models} == {"unet", "vae.encoder", "vae.decoder"}
    assert [c.path for c in result.sites if c.ok is None] == ["scheduler"]
    assert result.latents is None


@pytest.mark.parametrize("wrong", ["geglu", "group_norm_silu", "attention", "scheduler_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wrong_kernels_fail(wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by a few roundings, at every site of one op, is found, at these sites."""
    op = getattr(ops, wrong)
    stock = type(op).choose

    def choose(self: Any, *args: Any, **kwargs: Any) -> Choice:
        found = stock(self, *args, **kwargs)
        if self is not op:
            return found

        def run(*args: Any, **kwargs: Any) -> Any:
            result = found.run(*args, **kwargs)
            error = 4 * torch.finfo(dtype).eps
            if isinstance(result, tuple):
                return (result[0] * (1 + error), *result[1:])
            return result * (1 + error)

        return Choice("cpu", run)

    monkeypatch.setattr(type(op), "choose", choose)
    pipe = sd_pipeline().to(dtype)
    call = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in CALL.items()}
    result = fastdiff.verify(pipe, **call)
    assert not result
    assert not result.ok
    failed = {check.cls for check in result.sites if check.ok is False}
    found = {"geglu": "GEGLU", "group_norm_silu": "GroupNorm", "attention": "Attention"}
    assert found.get(wrong, "DDIMScheduler") in failed, str(result)
    assert "FAILED" in str(result)
    if wrong in ("geglu", "scheduler_step"):  # and the blocks that hold them
        assert failed <= {"GEGLU", "BasicTransformerBlock", "DDIMScheduler"} and len(failed) <= 2


def _break(monkeypatch: pytest.MonkeyPatch, op: Any, wrong: Callable[..., Any]) -> None:
    """From now on ``op`` is served by ``wrong(kernel, *args, **kwargs)``."""
    choose = type(op).choose

    def choosing(self: Any, *args: Any, **kwargs: Any) -> Choice:
        found = choose(self, *args, **kwargs)
        return found if self is not op else Choice("cpu", functools.partial(wrong, found.run))

    monkeypatch.setattr(type(op), "choose", choosing)


def test_bisect_finds_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel is wrong, for one of the shapes that the model has: the first site of the run with it is named."""

    def wrong(kernel: Callable[..., Any], x: torch.Tensor, *args: Any, temb: Any = None, **kwargs: Any) -> Any:
        result = kernel(x, *args, temb=temb, **kwargs)
        return result * 1.0001 if temb is not None and x.shape[1] == 48 else result

    _break(monkeypatch, ops.group_norm_silu, wrong)
    model = sd15_unet()
    result = fastdiff.verify(model, bisect=True)
    assert not result.ok
    culprit = result.culprit
    assert culprit is not None
    assert (culprit.path, culprit.cls) == ("down_blocks.1.resnets.0", "ResnetBlock2D")
    assert culprit.function == "fastdiff.patching.blocks.resnet.resnet_block"
    assert (culprit.operation, culprit.op, culprit.backend) == ("norm2", "group_norm_silu", "cpu")
    assert culprit.error is not None and culprit.limit is not None
    assert 0.9e-4 < culprit.error < 1.1e-4 and culprit.limit < 1e-5
    assert "first at down_blocks.1.resnets.0 (ResnetBlock2D)" in str(result)
    assert "norm2: fastdiff.ops.group_norm_silu by cpu" in str(result)
    assert result.to_dict()["culprit"]["op"] == "group_norm_silu"
    sites = [c.path for c in result.sites if c.ok is False]
    assert culprit.path in sites and len(sites) > 1  # later ones are wrong too

    tolerant = fastdiff.verify(model, bisect=True, tolerance=1e-2)
    assert tolerant.ok and tolerant.culprit is None
    strict = fastdiff.verify(model, bisect=True, tolerance=1e-12)
    assert strict.culprit is not None and strict.culprit.path == "down_blocks.0.resnets.0"


def test_bisect_finds_code_around_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return geglu_projection(self, hidden_states) * 1.001

    monkeypatch.setattr(Replacement, "__init__", _replacing(geglu_projection, wrong))
    result = fastdiff.verify(sd15_unet(), bisect=True)
    culprit = result.culprit
    assert culprit is not None and culprit.cls == "GEGLU" and culprit.path.startswith("down_blocks.0.")
    assert culprit.function.endswith("wrong") and not culprit.operation
    assert "its operations hold one by one" in str(culprit)


def _replacing(old: Any, new: Any) -> Callable[..., None]:
    init = Replacement.__init__

    def patched_init(self: Any, owner: Any, name: str, function: Any) -> None:
        init(self, owner, name, new if function is old else function)

    return patched_init


def test_bisect_finds_what_spoils_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that writes over what an earlier site has computed passes by itself; bisection finds it."""
    kept: list[torch.Tensor] = []

    def keep(kernel: Callable[..., Any], x: torch.Tensor, *args: Any, silu: bool = True, **kwargs: Any) -> Any:
        if not silu:  # the entrance of a transformer, whose input is its residual
            kept[:] = [x]
        return kernel(x, *args, silu=silu, **kwargs)

    def spoil(kernel: Callable[..., Any], x: torch.Tensor) -> Any:
        if kept:
            kept.pop().mul_(1.01)
        return kernel(x)

    _break(monkeypatch, ops.group_norm_silu, keep)
    _break(monkeypatch, ops.geglu, spoil)
    result = fastdiff.verify(sd15_unet(), bisect=True)
    assert not any(c.ok is False for c in result.sites if c.cls != "ResnetBlock2D"), str(result)
    assert [c.ok for c in result.models] == [False]
    culprit = result.culprit
    assert culprit is not None and culprit.cls == "GEGLU" and culprit.path.startswith("down_blocks.0.")
    assert "it holds by itself, but with it the model as a whole does not" in str(culprit)


def test_bisect_finds_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        sample, *others = kernel(*args, **kwargs)
        return sample * 1.001, *others

    _break(monkeypatch, ops.scheduler_step, wrong)
    culprit = fastdiff.verify(sd_pipeline(), bisect=True, **CALL).culprit
    assert culprit is not None and (culprit.path, culprit.cls) == ("scheduler", "DDIMScheduler")
    assert culprit.function.startswith("fastdiff.schedulers.")


def test_bisect_of_what_holds() -> None:
    assert fastdiff.verify(sd15_unet(), bisect=True).culprit is None


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = type(ops.geglu).choose

    def choose(self: Any, *args: Any, **kwargs: Any) -> Choice:
        found = stock(self, *args, **kwargs)
        if self is not ops.geglu:
            return found
        return Choice("cpu", lambda *a, **k: found.run(*a, **k).fill_(float("nan")))

    monkeypatch.setattr(type(ops.geglu), "choose", choose)
    result = fastdiff.verify(CASES[0].build())
    assert {c.cls for c in result.sites if c.ok is False} >= {"GEGLU"}


def test_memory_is_bounded_by_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one site is in fp64 at a time."""
    import copy
    import weakref

    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    largest = []
    deepcopy = copy.deepcopy

    def watching(value: Any, *args: Any) -> Any:
        result = deepcopy(value, *args)
        if not args and isinstance(value, nn.Module):
            alive.add(result)
            largest.append(len(alive))
        return result

    model = fastdiff.patch(CASES[-1].build())  # nested sites: a block holds a norm, an attention, an activation
    monkeypatch.setattr(copy, "deepcopy", watching)
    assert fastdiff.verify(model).ok
    assert len(largest) == 13
    assert max(largest) <= 2


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m fastdiff verify --model`` has exit code 0, 1 for a failure, 2 for a model it cannot load."""
    ddpm_pipeline().save_pretrained(tmp_path)
    arguments = ["verify", "--model", str(tmp_path), "--steps", "2"]
    assert main(arguments) == 0
    assert "verified" in capsys.readouterr().out
    assert main([*arguments, "--backend", "cuda"]) == 1
    assert "no site was served by a kernel" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("fastdiff._verify_checks.limit_of", lambda *args: 0.0)
    assert main([*arguments, "--bisect"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED" in printed
    assert "first at unet.down_blocks.0.resnets.0 (ResnetBlock2D), in fastdiff.patching.blocks.resnet" in printed
    assert main([*arguments, "--tolerance", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["culprit"] is None
    assert main(["verify", "--model", str(tmp_path / "none")]) == 2
    assert "fastdiff verify:" in capsys.readouterr().err


def test_nothing_to_verify() -> None:
    with pytest.raises(ValueError, match="no patched model"):
        fastdiff.verify(DDPMScheduler())
    with pytest.raises(TypeError, match="expected a Diffusers pipeline"):
        fastdiff.verify(3)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fastdiff.verify(CASES[0].build(), no_such_argument=1)


def test_as_data() -> None:
    result = fastdiff.verify(CASES[3].build())
    data = json.loads(json.dumps(result.to_dict()))
    assert data["ok"] is True
    assert len(data["sites"]) == len(result.sites)


def test_nothing_finite_is_not_verified() -> None:
    model = CASES[0].build()
    model.conv_in.weight.fill_(float("nan"))
    result = fastdiff.verify(model)
    assert not result.ok
    assert {c.error for c in result.models} == {None}
    assert {c.note for c in result.models} == {"nothing finite to compare"}


def test_eager_sites_do_not_count() -> None:
    with fastdiff.use_backend("eager"):
        result = fastdiff.verify(CASES[0].build())
    assert not result.ok
    assert all(c.ok is None and c.note.startswith("ran eager: ") for c in result.sites), str(result)
    assert "FAILED: no site was served by a kernel" in result.summary()


def test_overridden_site_is_named() -> None:
    model = fastdiff.patch(CASES[0].build())
    block = model.mid_block.resnets[0]
    block.forward = type(block).forward.__get__(block)
    result = fastdiff.verify(model)
    assert result.ok
    notes = {c.path: c.note for c in result.sites if c.note}
    assert notes == {"mid_block.resnets.0": "replaced by somebody else since it was patched"}


def test_failing_fp64_copy_is_noted() -> None:
    model = CASES[0].build()
    model.conv_in.register_forward_pre_hook(lambda module, args: _only_fp32(args[0]))
    result = fastdiff.verify(model)
    assert result.ok
    assert [c.note for c in result.models] == ["no fp64 result: TypeError: fp32 only"]


def _only_fp32(x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError("fp32 only")


@pytest.mark.parametrize(
    "config",
    [
        {"num_class_embeds": 5},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image_hint",
         "in_channels": 8},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_synthetic_inputs_of_every_conditioning(config: dict[str, Any]) -> None:
    model = fastdiff.patch(sd15_unet(**config))
    assert fastdiff.report(model, launches=True).launches
    assert fastdiff.verify(model).ok


def test_unknown_conditioning_asks_for_arguments() -> None:
    model = sd15_unet()
    model.register_to_config(addition_embed_type="sound")
    with pytest.raises(ValueError, match=r"addition_embed_type='sound', .*: pass the arguments of a forward"):
        fastdiff.verify(model)

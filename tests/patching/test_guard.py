"""What is left alone or refused: changed code, unsupported versions, wrong arguments."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import differences
import pytest
import torch
from diffusers import DDIMScheduler
from models import (
    ddpm_pipeline,
    ddpm_unet,
    dit,
    inputs_of,
    is_stock,
    output,
    run_sd,
    sd15_unet,
    sd_pipeline,
)
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import _fingerprint, patch_of


class _OwnForward(type(sd15_unet().mid_block.resnets[0])):  # type: ignore[misc]
    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(input_tensor, temb)


def test_changed_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sd15_unet()
    model.mid_block.resnets[0].__class__ = _OwnForward
    eager = output(model, inputs_of())
    fastdiff.patch(model)
    torch.testing.assert_close(output(model, inputs_of()), eager, rtol=1e-3, atol=1e-4)
    rows = {row.path: row for row in fastdiff.report(model).rows}
    row = rows["mid_block.resnets.0"]
    assert row.backend == "stock"
    assert "_OwnForward is a subclass of ResnetBlock2D" in row.reason
    assert patch_of(model).savings == ["SiLU of the time embedding once instead of 7 times"]  # it makes its own
    assert sum(not r.fused for r in rows.values()) == 1
    fastdiff.unpatch(model)

    # A wrapper that pretends to be the original is seen too.
    stock = type(model.mid_block.resnets[1])
    import functools

    forward = stock.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    monkeypatch.setattr(stock, "forward", wrapper)
    fastdiff.patch(model)
    reasons = {r.reason for r in fastdiff.report(model).rows if r.path == "mid_block.resnets.1"}
    assert reasons == {"the source of ResnetBlock2D.forward is not that of a supported Diffusers version"}
    monkeypatch.undo()
    fastdiff.patch(model)
    assert {r.backend for r in fastdiff.report(model).rows if r.path == "mid_block.resnets.1"} == {"not run yet"}


def test_replaced_forward_is_left_alone() -> None:
    model = sd15_unet()
    block = model.mid_block.resnets[0]
    block.forward = lambda x, temb: x
    mine = block.forward
    eager = output(model, inputs_of())
    fastdiff.patch(model)
    torch.testing.assert_close(output(model, inputs_of()), eager, rtol=1e-3, atol=1e-4)
    reasons = [r.reason for r in fastdiff.report(model).rows if r.path == "mid_block.resnets.0"]
    assert len(reasons) == 1
    assert "forward was already replaced by" in reasons[0]
    fastdiff.unpatch(model)
    assert block.forward is mine


def test_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "0.37.1")
    _fingerprint.why_not_version.cache_clear()
    try:
        pipe = sd_pipeline()
        eager = run_sd(pipe)
        fastdiff.patch(pipe)
        assert torch.equal(run_sd(pipe), eager)
        report = fastdiff.report(pipe)
        assert report.fused == 0
        reasons = {r.reason for r in report.rows}
        assert reasons == {"Diffusers 0.37.1 is outside the supported versions, 0.38 to 0.42"}, reasons
        fastdiff.unpatch(pipe)
    finally:
        _fingerprint.why_not_version.cache_clear()


#: Modules that the oldest supported Diffusers does not have -> the minor version that brought them.
YOUNG = {"diffusers.models.autoencoders.autoencoder_kl_qwenimage21": 41}


def test_fingerprints_cover_the_supported_versions() -> None:
    import diffusers

    from fastdiff.patching._fingerprints import FINGERPRINTS
    from fastdiff.patching.families import all_sources

    assert all_sources() == FINGERPRINTS.keys()
    (major, first), (_, last) = _fingerprint.SUPPORTED
    for name, table in FINGERPRINTS.items():
        versions = {v.rpartition(".")[0] for text in table.values() for v in text.split()}
        since = YOUNG.get(name.partition(":")[0], first)
        assert versions == {f"{major}.{minor}" for minor in range(since, last + 1)}, name
        if diffusers.__version__.rpartition(".")[0] in versions:
            assert diffusers.__version__ in table[_fingerprint.fingerprint(_fingerprint.resolve(name))].split(), name


def test_what_differs_from_the_newest_diffusers_is_tested_in_full() -> None:
    """By the tests of some model, whatever else is skipped as a repetition."""
    assert set().union(*differences.in_full().values()) == differences.differing()


BAD = [
    (lambda: fastdiff.patch(3), TypeError, r"expected a Diffusers pipeline.*model or scheduler, got int"),
    (lambda: fastdiff.patch(nn.Linear(2, 2)), TypeError, "expected .* got Linear"),
    (lambda: fastdiff.patch("runwayml/stable-diffusion"), TypeError, "expected .* got str"),
    (lambda: fastdiff.unpatch(None), TypeError, "expected .* got NoneType"),
    (lambda: fastdiff.report([]), TypeError, "expected .* got list"),
    (lambda: fastdiff.patch(ddpm_unet(), backend="gpu"), ValueError, "backend is 'gpu'; expected None or one of"),
    (lambda: fastdiff.patch(ddpm_unet(), backend=1), ValueError, "backend is 1; expected None or one of"),
    (lambda: fastdiff.patch(ddpm_unet(), only=3), ValueError, "only is 3; expected a pattern"),
    (lambda: fastdiff.patch(ddpm_unet(), skip=[None]), ValueError, "skip is .None.; expected a pattern"),
    (lambda: fastdiff.patch(ddpm_unet(), fast=True), TypeError, "unexpected keyword argument 'fast'"),
    (lambda: fastdiff.unpatch(ddpm_unet()), ValueError, "this UNet2DModel is not patched"),
    (lambda: fastdiff.unpatch(ddpm_pipeline()), ValueError, "this DDPMPipeline is not patched"),
    (lambda: fastdiff.unpatch(DDIMScheduler()), ValueError, "this DDIMScheduler is not patched"),
    (lambda: fastdiff.report(ddpm_unet()), ValueError, "this UNet2DModel is not patched"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_bad_option_leaves_the_object_as_it_was() -> None:
    pipe = ddpm_pipeline()
    with pytest.raises(ValueError, match="gpu"):
        fastdiff.patch(pipe, backend="gpu")
    assert is_stock(pipe.unet)
    assert not any(k.startswith("_fastdiff") for k in vars(pipe))
    fastdiff.patch(pipe, only="unet.mid_block.*")
    with pytest.raises(ValueError, match="gpu"):
        fastdiff.patch(pipe, backend="gpu")
    assert len(patch_of(pipe.unet).sites) == 3


def test_failure_while_patching_leaves_the_object_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdiff.patching import Patch

    model = ddpm_unet()
    install, calls = Patch.install, []

    def failing(self: Patch, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return install(self, *args, **kwargs)

    monkeypatch.setattr(Patch, "install", failing)
    with pytest.raises(MemoryError):
        fastdiff.patch(model)
    assert is_stock(model)


def test_only_that_names_nothing() -> None:
    pipe = sd_pipeline()
    with pytest.raises(ValueError, match=r"only='unte\.\*' names no place in this StableDiffusionPipeline"):
        fastdiff.patch(pipe, only="unte.*")
    assert is_stock(pipe.unet)
    assert not any(k.startswith("_fastdiff") for k in vars(pipe))
    model = fastdiff.patch(dit(), only="*attn1")
    assert patch_of(model).savings == []
    assert "forward" not in vars(model)


def test_import_needs_no_diffusers() -> None:
    code = "import sys, fastdiff; assert 'diffusers' not in sys.modules; print(fastdiff.patch.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "patch", done.stderr

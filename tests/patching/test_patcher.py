"""The patcher's promises that hold for every family: instances only, exact restore, claims, copies, bad input."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from models import CASES, ddpm_pipeline, ddpm_unet, dit, output, run_sd, sd15_unet, sd_pipeline
from torch import Tensor, nn

import fastdiff
from fastdiff.patching import _fingerprint, patch_of
from fastdiff.patching._site import site_of


def _inputs(index: int = 0) -> dict[str, Any]:
    return CASES[index].inputs(torch.Generator().manual_seed(0), torch.float32)


def _is_stock(model: nn.Module) -> bool:
    return not any("forward" in vars(m) or site_of(m) for m in model.modules()) and patch_of(model) is None


def _fused(x: Any) -> bool:
    report = fastdiff.report(x)
    return all(row.fused for row in report.rows if row.backend != "not run yet") and report.fused > 0


def _reason_of_scheduler(pipe: Any) -> str:
    return next(row.reason for row in fastdiff.report(pipe).rows if row.path == "scheduler")


def test_pipeline_there_and_back() -> None:
    """A whole pipeline: same latents but for rounding, full coverage, and bitwise eager after unpatch."""
    pipe = sd_pipeline()
    classes = {name: type(c) for name, c in pipe.components.items()}
    eager = run_sd(pipe)
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    assert fastdiff.patch(pipe) is pipe
    patched = run_sd(pipe)
    assert not torch.equal(patched, eager)
    torch.testing.assert_close(patched, eager, rtol=1e-3, atol=1e-3)
    report = fastdiff.report(pipe)
    ran = [row for row in report.rows if row.backend != "not run yet"]
    assert all(row.fused for row in ran)
    assert {row.path.split(".")[0] for row in ran} == {"unet", "scheduler"}
    assert {name: type(c) for name, c in pipe.components.items()} == classes
    assert fastdiff.unpatch(pipe) is pipe
    assert vars(pipe).keys() == before.keys()
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe)[name] is c for name, c in before.items() if name in pipe.components)
    assert _is_stock(pipe.unet)
    assert _is_stock(pipe.vae)
    assert pipe.scheduler.step.__func__ is DDIMScheduler.step
    assert torch.equal(run_sd(pipe), eager)


def test_patching_twice_is_patching_once() -> None:
    model = fastdiff.patch(sd15_unet())
    once = output(model, _inputs())
    rows = fastdiff.report(model).rows
    fastdiff.patch(fastdiff.patch(model))
    assert torch.equal(output(model, _inputs()), once)
    assert fastdiff.report(model).rows == rows
    for module in model.modules():
        if "forward" in vars(module):
            assert isinstance(vars(module)["forward"].func, types.FunctionType)
    fastdiff.unpatch(model)
    assert _is_stock(model)


def test_patching_again_reconfigures() -> None:
    model = fastdiff.patch(sd15_unet(), only="*attn1")
    output(model, _inputs())
    assert fastdiff.report(model).fused == 4
    fastdiff.patch(model, skip=["*attn?", "mid_block.*"])
    output(model, _inputs())
    left = [row for row in fastdiff.report(model).rows if not row.fused]
    assert all("attn" in row.path or row.path.startswith("mid_block") for row in left)
    assert len(left) == 12
    assert {row.reason for row in left} == {"excluded by skip=..."}
    assert patch_of(model).savings == ["SiLU of the time embedding once instead of 6 times"]
    fastdiff.unpatch(model)
    assert _is_stock(model)


def test_context_manager() -> None:
    model = sd15_unet()
    eager = output(model, _inputs())
    with fastdiff.patched(model) as inside:
        assert inside is model
        assert not torch.equal(output(model, _inputs()), eager)
    assert _is_stock(model)
    assert torch.equal(output(model, _inputs()), eager)
    with pytest.raises(RuntimeError), fastdiff.patched(model):
        raise RuntimeError
    assert _is_stock(model)
    fastdiff.patch(model, only="*attn1")
    with fastdiff.patched(model):
        output(model, _inputs())
        assert fastdiff.report(model).coverage == 1.0
    output(model, _inputs())
    assert fastdiff.report(model).fused == 4


def test_two_pipelines_do_not_see_each_other() -> None:
    patched, other = sd_pipeline(), sd_pipeline()
    eager = run_sd(other)
    fastdiff.patch(patched)
    assert _is_stock(other.unet)
    assert _is_stock(other.vae)
    assert torch.equal(run_sd(other), eager)
    both = run_sd(patched)
    fastdiff.patch(other)
    fastdiff.unpatch(patched)
    assert torch.equal(run_sd(patched), eager)
    assert torch.equal(run_sd(other), both)


def test_shared_components_are_counted() -> None:
    first = sd_pipeline()
    second = sd_pipeline(unet=first.unet)
    fastdiff.patch(first)
    fastdiff.patch(second)
    fastdiff.unpatch(first)
    assert not _is_stock(first.unet)
    assert _is_stock(first.vae)
    fastdiff.unpatch(second)
    assert _is_stock(first.unet)
    assert _is_stock(second.vae)

    fastdiff.patch(first.unet)  # the model has a claim of its own
    fastdiff.patch(first)
    fastdiff.unpatch(first)
    assert not _is_stock(first.unet)
    fastdiff.unpatch(first.unet)
    assert _is_stock(first.unet)

    fastdiff.patch(first)
    fastdiff.patch(second)
    del second
    gc.collect()
    fastdiff.unpatch(first)  # a deleted pipeline has no claim
    assert _is_stock(first.unet)


def test_from_pipe_shares_the_patch() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    other = StableDiffusionPipeline.from_pipe(pipe, requires_safety_checker=False)
    assert other.unet is pipe.unet
    with pytest.raises(ValueError, match="not patched"):
        fastdiff.unpatch(other)
    fastdiff.unpatch(pipe)
    assert _is_stock(other.unet)


def test_replaced_component_is_restored_too() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    old = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(old.config)
    assert "the pipeline's next call patches it" in _reason_of_scheduler(pipe)
    fastdiff.unpatch(pipe)
    assert patch_of(old) is None
    assert "step" not in vars(old)
    assert "progress_bar" not in vars(pipe)


def test_scheduler_set_after_patching() -> None:
    """The next call patches it, with the options of the pipeline, and lets the old one go."""
    pipe = fastdiff.patch(sd_pipeline(), backend="eager")
    run_sd(pipe)
    old = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(old.config)
    assert patch_of(pipe.scheduler) is None
    results = [run_sd(pipe), run_sd(pipe)]
    assert torch.equal(*results)
    found = patch_of(pipe.scheduler)
    assert found is not None
    assert found.sites[0].served["step"].reason == "use_backend('eager') is in effect"
    assert patch_of(old) is None
    fastdiff.unpatch(pipe.scheduler)  # by itself: the pipeline leaves it so
    run_sd(pipe)
    assert patch_of(pipe.scheduler) is None
    pipe.scheduler = old
    copied = copy.deepcopy(pipe)
    for p in (pipe, copied):
        run_sd(p)
        assert patch_of(p.scheduler) is not None
        fastdiff.unpatch(p)
        assert patch_of(p.scheduler) is None
        assert "progress_bar" not in vars(p)
    stock = sd_pipeline()
    stock.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    torch.testing.assert_close(results[0], run_sd(stock), rtol=1e-3, atol=1e-3)


def test_a_shared_scheduler_that_one_pipeline_drops_stays_patched() -> None:
    first = sd_pipeline()
    second = sd_pipeline(scheduler=first.scheduler)
    fastdiff.patch(first)
    fastdiff.patch(second)
    first.scheduler = EulerDiscreteScheduler.from_config(first.scheduler.config)
    run_sd(first)
    assert patch_of(second.scheduler) is not None
    with fastdiff.patched(second, backend="eager"):
        second.scheduler = EulerDiscreteScheduler.from_config(second.scheduler.config)
        run_sd(second)
    fastdiff.unpatch(second)
    assert patch_of(second.scheduler) is None


def test_scheduler_set_within_the_context() -> None:
    pipe = sd_pipeline()
    with fastdiff.patched(pipe):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        run_sd(pipe)
        assert patch_of(pipe.scheduler) is not None
    assert patch_of(pipe.scheduler) is None
    assert "progress_bar" not in vars(pipe)


def test_progress_bar_of_the_user_stays() -> None:
    pipe = sd_pipeline()
    bars: list[Any] = []

    def bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(args)
        return type(pipe).progress_bar(pipe, *args, **kwargs)

    pipe.progress_bar = bar
    fastdiff.patch(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert "patch the pipeline again" in _reason_of_scheduler(pipe)
    run_sd(pipe)
    assert bars
    assert patch_of(pipe.scheduler) is None
    fastdiff.unpatch(pipe)
    assert pipe.progress_bar is bar


def test_deepcopy_is_independent() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    expected = run_sd(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run_sd(twin), expected)
    assert _fused(twin)
    for module in twin.unet.modules():
        if (site := site_of(module)) is not None:
            assert site.owner in set(twin.unet.modules())
    fastdiff.unpatch(pipe)
    assert _is_stock(pipe.unet)
    assert not _is_stock(twin.unet)
    assert torch.equal(run_sd(twin), expected)
    fastdiff.unpatch(twin)
    assert _is_stock(twin.unet)
    assert torch.equal(run_sd(twin), run_sd(pipe))


def test_deepcopy_of_one_model() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    twin = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        twin.conv_in.weight.zero_()  # the copy runs its own weights, not the original's
    assert not torch.equal(output(twin, _inputs()), output(pipe.unet, _inputs()))
    fastdiff.unpatch(twin)
    assert _is_stock(twin)
    assert not _is_stock(pipe.unet)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_serialization(how: str) -> None:
    model = fastdiff.patch(sd15_unet())
    expected = output(model, _inputs())
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(output(twin, _inputs()), expected)
    assert _fused(twin)
    fastdiff.unpatch(twin)
    assert _is_stock(twin)
    fastdiff.unpatch(model)
    assert torch.equal(output(twin, _inputs()), output(model, _inputs()))


def test_save_pretrained_is_stock(tmp_path: Any) -> None:
    model = sd15_unet()
    keys = list(model.state_dict())
    fastdiff.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert _is_stock(loaded)
    fastdiff.unpatch(model)
    assert torch.equal(output(loaded, _inputs()), output(model, _inputs()))


def test_a_saved_pipeline_loads_without_fastdiff(tmp_path: Any) -> None:
    """Also in a process that never imports it: the folder says nothing of it, and the output is the stock one."""
    pipe = fastdiff.patch(ddpm_pipeline())
    output(pipe.unet, _inputs(2))
    pipe.save_pretrained(tmp_path)
    torch.save(_inputs(2), tmp_path / "inputs.pt")
    assert not any(b"fastdiff" in file.read_bytes() for file in tmp_path.rglob("*.json"))
    code = f"""
import sys, torch
from diffusers import DDPMPipeline
pipe, inputs = DDPMPipeline.from_pretrained({str(tmp_path)!r}), torch.load({str(tmp_path / "inputs.pt")!r})
with torch.no_grad():
    torch.save(pipe.unet(**inputs).sample, {str(tmp_path / "output.pt")!r})
assert not any(name.startswith("fastdiff") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fastdiff.unpatch(pipe)
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), output(pipe.unet, _inputs(2)))


def test_memory_is_freed() -> None:
    """After del, a collection frees a patched pipeline; after unpatch no cycle is left and none is needed."""
    pipe = fastdiff.patch(sd_pipeline())
    run_sd(pipe)
    dead = weakref.ref(pipe.unet), weakref.ref(pipe.unet.conv_in.weight)
    del pipe
    gc.collect()
    assert all(ref() is None for ref in dead)

    model = sd15_unet()
    output(fastdiff.patch(model), _inputs())
    fastdiff.unpatch(model)
    gc.collect()
    dead = weakref.ref(model), weakref.ref(model.mid_block.resnets[0])
    gc.disable()
    try:
        del model
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


def test_live_parameters() -> None:
    """Weights are read at every call: in-place updates, replaced parameters and dtype changes are seen."""
    model = fastdiff.patch(sd15_unet())
    first = output(model, _inputs())
    norm = model.mid_block.resnets[0].norm1
    with torch.no_grad():
        norm.weight.mul_(2)
    second = output(model, _inputs())
    norm.weight = nn.Parameter(norm.weight / 2, requires_grad=False)
    assert not torch.equal(first, second)
    assert torch.equal(output(model, _inputs()), first)
    model.to(torch.bfloat16)
    half = output(model, CASES[0].inputs(torch.Generator().manual_seed(0), torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert _fused(model)


class _OwnForward(type(sd15_unet().mid_block.resnets[0])):  # type: ignore[misc]
    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(input_tensor, temb)


def test_changed_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sd15_unet()
    model.mid_block.resnets[0].__class__ = _OwnForward
    eager = output(model, _inputs())
    fastdiff.patch(model)
    torch.testing.assert_close(output(model, _inputs()), eager, rtol=1e-3, atol=1e-4)
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
    eager = output(model, _inputs())
    fastdiff.patch(model)
    torch.testing.assert_close(output(model, _inputs()), eager, rtol=1e-3, atol=1e-4)
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
        assert {r.reason for r in report.rows if "resnets" in r.path} > {
            "Diffusers 0.37.1 is outside the supported versions, 0.38 to 0.42"
        } or all("outside the supported" in r.reason for r in report.rows if r.cls != "GroupNorm")
        fastdiff.unpatch(pipe)
    finally:
        _fingerprint.why_not_version.cache_clear()


def test_fingerprints_cover_the_supported_versions() -> None:
    import diffusers

    from fastdiff.patching._fingerprints import FINGERPRINTS
    from fastdiff.patching.families import all_sources

    assert all_sources() == FINGERPRINTS.keys()
    (major, first), (_, last) = _fingerprint.SUPPORTED
    for name, table in FINGERPRINTS.items():
        versions = {v.rpartition(".")[0] for text in table.values() for v in text.split()}
        assert versions == {f"{major}.{minor}" for minor in range(first, last + 1)}, name
        assert diffusers.__version__ in table[_fingerprint.fingerprint(_fingerprint.resolve(name))].split(), name


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
    assert _is_stock(pipe.unet)
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
    assert _is_stock(model)


def test_import_needs_no_diffusers() -> None:
    code = "import sys, fastdiff; assert 'diffusers' not in sys.modules; print(fastdiff.patch.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "patch", done.stderr


def test_ddpm_pipeline_call() -> None:
    pipe: DDPMPipeline = ddpm_pipeline()

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(generator=generator, num_inference_steps=3, output_type="np").images)

    eager = run()
    fastdiff.patch(pipe)
    torch.testing.assert_close(run(), eager, rtol=1e-3, atol=1e-3)
    assert _fused(pipe)
    fastdiff.unpatch(pipe)
    assert torch.equal(run(), eager)


def _half_way(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> None:
    """``call`` with an error at the scheduler, after the models."""
    from fastdiff import schedulers

    def failing(patch: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as inner:
        inner.setattr(schedulers, "install", failing)
        with pytest.raises(MemoryError):
            call()


def test_failure_half_way_through_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd_pipeline()
    _half_way(monkeypatch, lambda: fastdiff.patch(pipe))
    assert _is_stock(pipe.unet)
    assert _is_stock(pipe.vae)
    assert not any(k.startswith("_fastdiff") for k in [*vars(pipe), *vars(pipe.scheduler)])

    fastdiff.patch(pipe, skip="*attn?")
    earlier = [patch_of(c) for c in (pipe.unet, pipe.vae, pipe.scheduler)]
    expected = run_sd(pipe)
    _half_way(monkeypatch, lambda: fastdiff.patch(pipe, backend="eager"))
    assert [patch_of(c) for c in (pipe.unet, pipe.vae, pipe.scheduler)] == earlier
    assert torch.equal(run_sd(pipe), expected)
    assert "scheduler" in {r.path for r in fastdiff.report(pipe).rows if r.fused}
    fastdiff.unpatch(pipe)
    assert _is_stock(pipe.unet)
    assert "step" not in vars(pipe.scheduler)


def test_a_components_own_options_come_back() -> None:
    pipe = sd_pipeline()
    fastdiff.patch(pipe.unet, skip="mid_block*")
    own = patch_of(pipe.unet)
    with fastdiff.patched(pipe, backend="eager"):
        assert patch_of(pipe.unet).options.backend == "eager"
    assert patch_of(pipe.unet) is own
    assert patch_of(pipe.vae) is None
    fastdiff.patch(pipe, only="unet*")
    fastdiff.unpatch(pipe)
    assert patch_of(pipe.unet).options == own.options
    fastdiff.unpatch(pipe.unet)
    assert _is_stock(pipe.unet)


def test_only_that_names_nothing() -> None:
    pipe = sd_pipeline()
    with pytest.raises(ValueError, match=r"only='unte\.\*' names no place in this StableDiffusionPipeline"):
        fastdiff.patch(pipe, only="unte.*")
    assert _is_stock(pipe.unet)
    assert not any(k.startswith("_fastdiff") for k in vars(pipe))
    model = fastdiff.patch(dit(), only="*attn1")
    assert patch_of(model).savings == []
    assert "forward" not in vars(model)


def test_signature_is_stocks() -> None:
    import inspect

    for case in CASES:
        model = case.build()
        modules = [m for m in model.modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
        stock = [list(inspect.signature(m.forward).parameters) for m in modules]
        fastdiff.patch(model)
        assert [list(inspect.signature(m.forward).parameters) for m in modules] == stock, case.name
        assert isinstance(pickle.loads(pickle.dumps(model)), type(model))


def test_a_displaced_replacement_is_not_fused() -> None:
    model = fastdiff.patch(sd15_unet())
    output(model, _inputs())
    total = fastdiff.report(model).fused
    stock = type(model.mid_block.resnets[0]).forward
    model.mid_block.resnets[0].forward = stock.__get__(model.mid_block.resnets[0])
    output(model, _inputs())
    report = fastdiff.report(model)
    (row,) = (r for r in report.rows if r.path == "mid_block.resnets.0")
    assert (row.backend, row.fused) == ("stock", False)
    assert report.fused == total - 1
    assert report.summary().startswith(f"{total - 1} of {total} places fused")


def test_packed_weights_are_counted_apart() -> None:
    model = fastdiff.patch(sd15_unet().bfloat16(), prepack_weights=True)
    output(model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in _inputs().items()})
    report = fastdiff.report(model)
    packed = [row for row in report.rows if not row.kernel]
    assert {"Conv2d"} <= {row.cls for row in packed} <= {"Conv2d", "Linear"}
    assert not any(row.fused for row in packed)
    assert report.coverage == 1.0
    assert f"{report.fused} of {len(report.rows) - len(packed)} places" in report.summary()
    assert "packed weights:" in report.summary()

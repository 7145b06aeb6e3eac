"""Copies of what is patched: deepcopy, pickle, saving; and what is left when it is deleted."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from models import (
    CASES,
    ddpm_pipeline,
    inputs_of,
    is_fused,
    is_stock,
    output,
    run_sd,
    sd15_unet,
    sd_pipeline,
)

import fastdiff
from fastdiff.patching._site import site_of


def test_deepcopy_is_independent() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    expected = run_sd(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run_sd(twin), expected)
    assert is_fused(twin)
    for module in twin.unet.modules():
        if (site := site_of(module)) is not None:
            assert site.owner in set(twin.unet.modules())
    fastdiff.unpatch(pipe)
    assert is_stock(pipe.unet)
    assert not is_stock(twin.unet)
    assert torch.equal(run_sd(twin), expected)
    fastdiff.unpatch(twin)
    assert is_stock(twin.unet)
    assert torch.equal(run_sd(twin), run_sd(pipe))


def test_deepcopy_of_one_model() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    twin = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        twin.conv_in.weight.zero_()  # the copy runs its own weights, not the original's
    assert not torch.equal(output(twin, inputs_of()), output(pipe.unet, inputs_of()))
    fastdiff.unpatch(twin)
    assert is_stock(twin)
    assert not is_stock(pipe.unet)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_serialization(how: str) -> None:
    model = fastdiff.patch(sd15_unet())
    expected = output(model, inputs_of())
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(output(twin, inputs_of()), expected)
    assert is_fused(twin)
    fastdiff.unpatch(twin)
    assert is_stock(twin)
    fastdiff.unpatch(model)
    assert torch.equal(output(twin, inputs_of()), output(model, inputs_of()))


def test_save_pretrained_is_stock(tmp_path: Any) -> None:
    model = sd15_unet()
    keys = list(model.state_dict())
    fastdiff.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert is_stock(loaded)
    fastdiff.unpatch(model)
    assert torch.equal(output(loaded, inputs_of()), output(model, inputs_of()))


def test_a_saved_pipeline_loads_without_fastdiff(tmp_path: Any) -> None:
    """Also in a process that never imports it: the folder says nothing of it, and the output is the stock one."""
    pipe = fastdiff.patch(ddpm_pipeline())
    output(pipe.unet, inputs_of(CASES[2]))
    pipe.save_pretrained(tmp_path)
    torch.save(inputs_of(CASES[2]), tmp_path / "inputs.pt")
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
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), output(pipe.unet, inputs_of(CASES[2])))


def test_memory_is_freed() -> None:
    """After del, a collection frees a patched pipeline; after unpatch no cycle is left and none is needed."""
    pipe = fastdiff.patch(sd_pipeline())
    run_sd(pipe)
    dead = weakref.ref(pipe.unet), weakref.ref(pipe.unet.conv_in.weight)
    del pipe
    gc.collect()
    assert all(ref() is None for ref in dead)

    model = sd15_unet()
    output(fastdiff.patch(model), inputs_of())
    fastdiff.unpatch(model)
    gc.collect()
    dead = weakref.ref(model), weakref.ref(model.mid_block.resnets[0])
    gc.disable()
    try:
        del model
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()

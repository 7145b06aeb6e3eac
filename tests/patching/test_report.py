"""The report's totals: what counts as fused, of the whole and of each component."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import run_sd, sd_pipeline

import fastdiff


@pytest.mark.kernel
def test_coverage_of_every_component() -> None:
    pipe = fastdiff.patch(sd_pipeline(), skip="vae.decoder.mid_block*")
    assert {p.component: p.fused for p in fastdiff.report(pipe).parts} == {"vae": 0, "unet": 0, "scheduler": 0}
    run_sd(pipe, output_type="pt")
    report = fastdiff.report(pipe)
    parts = {part.component: part for part in report.parts}
    assert {name: part.cls for name, part in parts.items()} == {
        "vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "scheduler": "DDIMScheduler",
    }  # fmt: skip
    assert parts["unet"].coverage == parts["scheduler"].coverage == 1.0
    skipped = [row for row in report.rows if row.path.startswith("vae.decoder.mid_block")]
    assert skipped and all(row.backend == "stock" for row in skipped)
    # The encoder did not run, the middle block was skipped: neither counts.
    assert 0 < parts["vae"].fused < parts["vae"].places - len(skipped)
    assert sum(part.fused for part in parts.values()) == report.fused
    assert sum(part.places for part in parts.values()) == len([row for row in report.rows if row.kernel])
    data: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert {part["component"]: part["coverage"] for part in data["parts"]}["unet"] == 1.0
    assert f"vae (AutoencoderKL): {parts['vae'].fused} of {parts['vae'].places}" in str(report)


@pytest.mark.kernel
def test_eager_does_not_count() -> None:
    pipe = fastdiff.patch(sd_pipeline())
    with fastdiff.use_backend("eager"):
        run_sd(pipe)
    assert all(part.fused == 0 for part in fastdiff.report(pipe).parts)
    run_sd(pipe)
    unet = next(part for part in fastdiff.report(pipe).parts if part.component == "unet")
    assert unet.coverage == 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_sd(pipe)
    unet = next(part for part in fastdiff.report(pipe).parts if part.component == "unet")
    assert unet.fused == 0

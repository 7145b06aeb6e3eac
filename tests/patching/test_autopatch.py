"""The plugin that runs Diffusers' own tests with everything patched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parents[1]
#: Somebody else's tests, who have never heard of fastdiff.
THEIRS = """
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

def test_pipeline():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler())(num_inference_steps=2, output_type="np")
"""


def test_patches_and_counts(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "autopatch", "-p", "no:cacheprovider", "test_theirs.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["patched"] == "1 UNet2DModel, 1 DDPMPipeline"
    assert {"16 ResnetBlock2D", "8 Attention", "2 GroupNorm"} <= set(lines["sites"].split(", "))
    # The ResNet blocks have two norms each, and what attention is made of is counted too.
    assert "16 ResnetBlock2D.norm1, 16 ResnetBlock2D.norm2" in lines["served by cpu"]
    assert lines["declined"] == "0 calls: nothing"
    assert lines["steps fused"] == "2, of classes DDPMScheduler"


@pytest.mark.parametrize(("patched", "status"), [(0, 1), (1, 0)])
def test_a_run_without_patches_fails(patched: int, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    import autopatch

    monkeypatch.setattr(autopatch, "patched", {"UNet2DModel": 1} if patched else {})
    session = SimpleNamespace(exitstatus=0)
    autopatch.pytest_sessionfinish(session, 0)
    assert session.exitstatus == status

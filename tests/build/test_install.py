"""Wheels and source distributions, made the way pip makes them."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_tree import python, run

from fastdiff import _extension

INFO = "import json, fastdiff; print(json.dumps(fastdiff.info().as_dict()))"


def wheel(tree: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel and unpack it; returns the folder and what pip printed."""
    out = tree.parent / "wheel"
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index")
    done = run(*command, "-w", out, ".", cwd=tree, **environment)
    assert done.returncode == 0, done.stdout
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    (out / "name").write_text(file.name)
    return out / "unpacked", done.stdout


def cpu_backend(package_in: Path) -> dict:
    state = json.loads(python(INFO, package_in))
    return next(backend for backend in state["backends"] if backend["name"] == "cpu")


def test_left_out_on_request(tree: Path) -> None:
    (tree / "fastdiff/demo/model/unet").mkdir(parents=True)
    (tree / "fastdiff/demo/model/unet/config.json").write_text("{}")
    unpacked, _ = wheel(tree, FASTDIFF_SKIP_EXT="1")
    assert (unpacked.parent / "name").read_text().endswith("-py3-none-any.whl")
    assert (unpacked / "fastdiff/py.typed").is_file()
    assert (unpacked / "fastdiff/demo/model/unet/config.json").is_file()
    assert not list(unpacked.rglob("*.cpp"))
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    assert "Requires-Dist: torch\n" in metadata.read_text()  # no bound: pip must not replace it
    assert (metadata.parent / "licenses/LICENSE").is_file()
    backend = cpu_backend(unpacked)
    assert not backend["available"]
    assert "left out by FASTDIFF_SKIP_EXT=1" in backend["reason"]
    assert backend["command"].startswith("unset FASTDIFF_SKIP_EXT && pip install")


def test_no_compiler(tree: Path) -> None:
    unpacked, output = wheel(tree, CXX="/nonexistent/g++")
    assert "installed WITHOUT its compiled kernels" in output
    backend = cpu_backend(unpacked)
    assert "CXX=/nonexistent/g++ does not exist" in backend["reason"]
    assert backend["command"].startswith("unset CXX && pip install")
    # Everything works, eagerly.
    used = python(
        "import torch, fastdiff; x = torch.randn(4, 8)\n"
        "choice = fastdiff.ops.gelu_tanh.choose(x); print(choice.backend, choice.reason)\n"
        "eager = torch.nn.functional.gelu(x, approximate='tanh')\n"
        "torch.testing.assert_close(fastdiff.ops.gelu_tanh(x), eager)",
        unpacked,
    )
    assert used.startswith("eager")
    assert "CXX=/nonexistent/g++ does not exist" in used


def test_demanded_but_impossible(tree: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", ".")
    done = run(*command, cwd=tree, FASTDIFF_FORCE_EXT="1", CXX="/nonexistent/g++")
    assert done.returncode != 0
    assert "cannot be built: the C++ compiler CXX=/nonexistent/g++ does not exist" in done.stdout


@pytest.mark.skipif(bool(_extension.why_not_cpu()), reason="needs a compiler")
def test_cuda_demanded_without_nvcc(tree: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", ".")
    done = run(*command, cwd=tree, FASTDIFF_FORCE_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "FASTDIFF_FORCE_CUDA=1, but there is no nvcc under CUDA_HOME=/nonexistent" in done.stdout
    assert "conda install -c nvidia cuda-toolkit" in done.stdout


@pytest.mark.skipif(bool(_extension.why_not_cpu()), reason="needs a compiler")
def test_source_distribution_builds(tree: Path, tmp_path: Path) -> None:
    sources = {str(path.relative_to(tree)) for path in tree.glob("csrc/**/*") if path.is_file()}
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    assert (done := run(sys.executable, "-c", code, cwd=tree)).returncode == 0, done.stdout
    (file,) = (tree / "dist").glob("fastdiff_kernels-*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path / "from sdist", filter="data")
    (unpacked,) = (tmp_path / "from sdist").iterdir()
    packed = {str(path.relative_to(unpacked)) for path in unpacked.glob("csrc/**/*") if path.is_file()}
    assert packed == sources

    # One op stands for all of them, to keep this short; module.cpp itself calls the kernel of scheduler_step.
    kept = {"cpu/isa.cpp", "cpu/gelu_tanh.cpp", "ops/gelu_tanh.cpp", "cpu/scheduler_step.cpp"}
    for path in (*unpacked.glob("csrc/cpu/*.cpp"), *unpacked.glob("csrc/ops/*.cpp")):
        if f"{path.parent.name}/{path.name}" not in kept:
            path.unlink()
    installed, output = wheel(unpacked, FASTDIFF_FORCE_EXT="1")
    assert "WITHOUT" not in output
    backend = cpu_backend(installed)
    assert backend["available"], backend
    assert backend["detail"].startswith("1 of ")
    chosen = "import torch, fastdiff; print(fastdiff.ops.gelu_tanh.choose(torch.ones(4)).backend)"
    assert python(chosen, installed).strip() == "cpu"

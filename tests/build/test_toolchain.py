"""What setup.py finds, and what it does about what it does not find."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from source_tree import ROOT, load_build, needs_sources, run

pytestmark = needs_sources

KNOWN = {"75", "80", "86", "89", "90", "90a", "100", "100a", "120"}


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "FASTDIFF_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return load_build(ROOT)[1]


@pytest.mark.parametrize(
    ("wanted", "visible", "known", "expected"),
    [
        ("", [], KNOWN, (["80", "89", "90a", "100", "120"], "120")),
        ("", [], {"75", "80", "86"}, (["80"], "80")),
        ("", ["90"], KNOWN, (["90a"], "90")),
        ("", ["86", "120"], KNOWN, (["86", "120"], "120")),
        ("", ["120"], {"80", "90"}, ([], "90")),  # a GPU newer than nvcc runs the newest PTX
        ("8.0;9.0a+PTX", ["86"], KNOWN, (["80", "90a"], "90a")),
        ("8.6 12.0", [], KNOWN, (["86", "120"], "")),
    ],
)
def test_cuda_architectures(toolchain, wanted, visible, known, expected) -> None:
    assert toolchain.cuda_architectures(wanted, visible, known) == expected


@pytest.mark.parametrize("wanted", ["Ampere", "8", "8.0;13.0"])
def test_cuda_architectures_refused(toolchain, wanted) -> None:
    with pytest.raises(toolchain.Skip, match=r"TORCH_CUDA_ARCH_LIST has '(Ampere|8|13\.0)'"):
        toolchain.cuda_architectures(wanted, [], KNOWN)


def test_torch_is_found_without_importing_it_and_off_sys_path() -> None:
    # As under pip's build isolation: the target environment's folders are not on sys.path.
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from csrc import toolchain
sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, "torch"))]
assert toolchain.importlib.util.find_spec("torch") is None
print(toolchain.find_torch().version)
assert "torch" not in sys.modules
"""
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.strip() == torch.__version__


def test_old_torch_is_refused(toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch/include").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cu126'\ncuda = '12.6'\n")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "site_packages", lambda: [tmp_path])
    with pytest.raises(toolchain.Skip, match=r"torch 2\.9\.1\+cu126 is older than 2\.10"):
        toolchain.find_torch()


def test_no_torch(toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "site_packages", list)
    with pytest.raises(toolchain.Skip, match="torch was not found"):
        toolchain.find_torch()


def test_no_compiler(toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(toolchain.Skip, match="no C\\+\\+ compiler") as skip:
        toolchain.find_cxx()
    assert skip.value.fix


def test_compiler_without_cxx20(toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", shutil.which("false") or "")
    with pytest.raises(toolchain.Skip, match="does not compile C\\+\\+20"):
        toolchain.find_cxx()


def test_nvcc_is_looked_for_where_the_user_says(toolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(toolchain.Skip, match="no nvcc under CUDA_HOME=/nonexistent"):
        toolchain.find_nvcc()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86-64 CPU")
class TestOldCompiler:
    """A compiler that lacks an instruction set, without ninja, and a source with an error."""

    @pytest.fixture
    def cxx(self, tmp_path: Path) -> Path:
        wrapper = tmp_path / "old-g++"
        wrapper.write_text('#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\nexec g++ "$@"\n')
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        return wrapper

    @pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
    def test_cuda_sources_are_picked_up(
        self, build, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toolchain = sys.modules["csrc.toolchain"]
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        kept = (tree / "csrc/cuda/gelu_tanh.cu").read_text()
        for path in tree.glob("csrc/cuda/*.cu"):
            path.unlink()
        with pytest.raises(build.Skip, match="has no CUDA kernels"):
            toolchain.find_cuda(build.find_torch())
        (tree / "csrc/cuda/gelu_tanh.cu").write_text(kept)
        (tree / "csrc/cuda/probe.cu").write_text(
            "__global__ void probe(float* x) { x[threadIdx.x] *= 2; }\n"
            "void launch_probe(float* x) { probe<<<1, 32>>>(x); }\n"
        )
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        target = tmp_path / "_C.so"
        job = build.Build(target, toolchain.find_cuda(build.find_torch()))
        job.run()
        assert job.info()["cuda"]["built"]
        assert job.info()["cuda"]["architectures"] == ["sm_80", "sm_90", "compute_90"]
        symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        assert "launch_probe(float*)" in symbols
        assert " U cudaLaunchKernel" not in symbols  # the runtime is linked in

    @pytest.fixture
    def build(self, tree: Path, cxx: Path, monkeypatch: pytest.MonkeyPatch):
        for path in (*tree.glob("csrc/cpu/*.cpp"), *tree.glob("csrc/ops/*.cpp")):
            if path.stem not in ("isa", "gelu_tanh"):
                path.unlink()
        monkeypatch.setenv("CXX", str(cxx))
        monkeypatch.delenv("FASTDIFF_FORCE_CUDA", raising=False)
        module, _ = load_build(tree)
        monkeypatch.setattr(module, "find_ninja", lambda: None)
        return module

    def test_builds_what_it_can(self, build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "out" / "_C.so"
        job = build.Build(target, build.Skip("no CUDA in this test"))
        job.run()
        assert "no ninja" in capfd.readouterr().out
        info = job.info()
        assert info["isas"] == ["avx2", "avx512"]
        assert info["isas_missing"].endswith("cannot produce avx512_bf16, amx")
        assert info["cuda"] == {"built": False, "reason": "no CUDA in this test", "fix": ""}
        symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        assert "fastdiff::cpu::avx512::gelu_tanh" in symbols
        assert "fastdiff::cpu::avx512_bf16::gelu_tanh" not in symbols

    def test_error_in_a_source(self, build, tree: Path, tmp_path: Path) -> None:
        (tree / "csrc/cpu/gelu_tanh.cpp").write_text("#error broken on purpose\n")
        with pytest.raises(build.Skip, match=r"failed: csrc/cpu/gelu_tanh\.cpp:1.*broken on purpose"):
            build.Build(tmp_path / "_C.so", build.Skip("")).run()


def test_path_files_are_read_and_not_run(toolchain, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "import os").mkdir()
    named = tmp_path / "a.pth"
    named.write_text("# a comment\nimport os\nreal\nmissing\n\n")
    assert toolchain.pth_folders(named) == [tmp_path / "real"]
    (tmp_path / "binary.pth").write_bytes(b"\xff\xfe\x00real\n")
    assert toolchain.pth_folders(tmp_path / "binary.pth") == []
    (tmp_path / "folder.pth").mkdir()
    assert toolchain.pth_folders(tmp_path / "folder.pth") == []


def test_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    build, toolchain = load_build(ROOT)
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.job_count() == 3
    for wrong in ("abc", "0", "-1", "1.5"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(toolchain.Skip, match=f"MAX_JOBS is '{wrong}'"):
            build.job_count()
    monkeypatch.delenv("MAX_JOBS")
    assert build.job_count() >= 1
    monkeypatch.delattr(os, "sysconf")
    assert build.job_count() >= 1

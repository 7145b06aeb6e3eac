"""Every CUDA source compiles for sm_80, within recorded budgets of registers, memory and spills.

With FASTDIFF_TEST_ALL=1 for all architectures, as an installation compiles it. The record is measured anew, and
written, by ``python tests/build/test_cuda_sources.py``: for all of them too.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(folder) for folder in Path(__file__).resolve().parents[:2]]
from extent import ALL
from source_tree import ROOT, load_build, needs_sources

RECORD = Path(__file__).with_name("cuda_budgets.json")
SOURCES = sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))
#: Another nvcc allocates registers a little differently.
SLACK = 8

pytestmark = [needs_sources, pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")]


def architectures() -> list[str]:
    if not ALL and __name__ != "__main__":
        return ["80"]  # whose instructions are looked at too
    _, toolchain = load_build(ROOT)
    return toolchain.cuda_architectures("", [], toolchain.known_architectures(toolchain.find_nvcc()))[0]


@functools.cache
def compiled(source: str) -> tuple[Path, str]:
    """A file's object for these architectures, and what ptxas says of it."""
    _, toolchain = load_build(ROOT)
    output = Path(_folder()) / f"{source}.o"
    flags = ["-O3", "-std=c++20", "-DFASTDIFF_HAVE_CUDA", "--ptxas-options=-v", "--threads=2"]
    gencode = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in architectures()]
    command = [toolchain.find_nvcc(), *flags, *gencode, "-c", ROOT / "csrc/cuda" / f"{source}.cu", "-o", output]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return output, done.stderr


@functools.cache
def _folder() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return folder


def measure(source: str) -> dict[str, dict[str, int]]:
    """The worst of each of a file's kernels over the architectures: registers, static shared memory, spilled bytes."""
    worst: dict[str, dict[str, int]] = {}
    for part in compiled(source)[1].split("Compiling entry function")[1:]:
        kernel = worst.setdefault(name_of(part.split("'")[1]), {"registers": 0, "shared": 0, "spilled": 0})
        for key, pattern in PATTERNS.items():
            kernel[key] = max(kernel[key], *map(int, re.findall(pattern, part)), 0)
    return worst


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
    "spilled": r"(\d+) bytes spill (?:stores|loads)",
}


def name_of(symbol: str) -> str:
    """Of a mangled kernel, as in ``adaln_kernel half 8``."""
    name = re.search(r"\d+([a-z][a-z_]*_kernel)I(.*?)EEv", symbol)
    assert name, symbol
    names = {"f": "float", "d": "double", "__half": "half", "__nv_bfloat16": "bfloat16"}
    arguments = re.findall(r"__nv_bfloat16|__half|^[fd]|(?<=L[a-z])\d+", name[2])
    return " ".join([name[1], *(names.get(a, a) for a in arguments)])


@pytest.mark.parametrize("source", SOURCES)
def test_budgets(source: str) -> None:
    record: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())[source]
    measured = measure(source)
    assert measured.keys() == record.keys(), "python tests/build/test_cuda_sources.py writes the record anew"
    for name, kernel in measured.items():
        assert kernel["registers"] <= record[name]["registers"] + SLACK, (name, kernel, record[name])
        assert kernel["shared"] <= record[name]["shared"], (name, kernel, record[name])
        assert kernel["spilled"] <= (record[name]["spilled"] if source.startswith("attention") else 0), (name, kernel)


#: What the wrappers of ptx.cuh, and accesses of 16 bytes, are to become on sm_80. The emulation cannot show that.
VECTORS = ("LDG.E.128", "STG.E.128")
MATRICES = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "MUFU.EX2")
INSTRUCTIONS = {
    "attention_bf16": MATRICES,
    "attention_fp16": MATRICES,
    "attention_fp32": ("LDGSTS.E.BYPASS.128", "LDS.128", "MUFU.EX2"),
}


def disassembler() -> str | None:
    """cuobjdump, of the CUDA toolkit or as Triton brings it."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path()
    return shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)


@pytest.mark.skipif(disassembler() is None, reason="there is no cuobjdump, which CUDA's toolkit and Triton have")
@pytest.mark.parametrize("source", SOURCES)
def test_instructions(source: str) -> None:
    command = [str(disassembler()), "-arch", "sm_80", "-sass", str(compiled(source)[0])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in INSTRUCTIONS.get(source, VECTORS):
        assert re.search(rf"\b{re.escape(instruction)}\b", listing), instruction


if __name__ == "__main__":
    budgets = {source: measure(source) for source in SOURCES}
    RECORD.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")

"""Every CUDA source compiles for every architecture, within recorded budgets of registers, memory and spills.

``python tests/build/test_cuda_sources.py`` measures anew and writes the record.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
from source_tree import ROOT, load_build, needs_sources

RECORD = Path(__file__).with_name("cuda_budgets.json")
SOURCES = sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))
#: Another nvcc allocates registers a little differently.
SLACK = 8

pytestmark = [needs_sources, pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")]


def architectures() -> list[str]:
    _, toolchain = load_build(ROOT)
    return toolchain.cuda_architectures("", [], toolchain.known_architectures(toolchain.find_nvcc()))[0]


def measure(source: str, output: Path) -> dict[str, dict[str, int]]:
    """The worst of each of a file's kernels over the architectures: registers, static shared memory, spilled bytes."""
    _, toolchain = load_build(ROOT)
    flags = ["-O3", "-std=c++20", "-DFASTDIFF_HAVE_CUDA", "--ptxas-options=-v", "--threads=2"]
    gencode = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in architectures()]
    command = [
        toolchain.find_nvcc(),
        *flags,
        *gencode,
        "-c",
        str(ROOT / "csrc/cuda" / f"{source}.cu"),
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    worst: dict[str, dict[str, int]] = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
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
def test_budgets(source: str, tmp_path: Path) -> None:
    record: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())[source]
    measured = measure(source, tmp_path / "x.o")
    assert measured.keys() == record.keys(), "python tests/build/test_cuda_sources.py writes the record anew"
    for name, kernel in measured.items():
        assert kernel["registers"] <= record[name]["registers"] + SLACK, (name, kernel, record[name])
        assert kernel["shared"] <= record[name]["shared"], (name, kernel, record[name])
        assert kernel["spilled"] <= (record[name]["spilled"] if source.startswith("attention") else 0), (name, kernel)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        budgets = {source: measure(source, Path(folder, "x.o")) for source in SOURCES}
    RECORD.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")

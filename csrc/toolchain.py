"""What there is to build the extension with: torch, compilers, instruction sets, CUDA architectures.

Used by ``setup.py`` only; needs nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent

#: The oldest torch whose stable ABI has what csrc/ops uses.
TORCH_ABI = (2, 10)

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16"]
#: Each unit of csrc/cpu is compiled once for each of these; units called *_amx only for the last.
ISAS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
DEFAULT_CUDA_ARCHITECTURES = ["80", "89", "90a", "100", "120"]

PROBE = """
#include <concepts>
#ifdef __AVX2__
#include <immintrin.h>
#endif
"""


class Skip(Exception):
    """Why something is not built, and the command that removes the cause (empty: none does)."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix

    def as_dict(self) -> dict[str, str]:
        return {"reason": self.reason, "fix": self.fix}


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says, in English."""
    kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    return subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, **kwargs)


@dataclass(frozen=True)
class Torch:
    path: Path
    version: str
    cuda: str | None


def site_packages() -> Iterator[Path]:
    """Where the environment that fastdiff is installed into keeps its packages.

    pip's build isolation takes these folders off sys.path, but the interpreter and its prefix stay the same.
    """
    folders = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.base_prefix in site.PREFIXES:
        folders.append(site.getusersitepackages())
    for folder in map(Path, dict.fromkeys(folders)):
        yield folder
        for pth in sorted(folder.glob("*.pth")):
            yield from pth_folders(pth)


def pth_folders(pth: Path) -> list[Path]:
    """The folders a .pth file names; its lines of code are not run, and what cannot be read names none."""
    try:
        lines = [line.strip() for line in pth.read_text(encoding="utf-8").splitlines()]
        named = [pth.parent / line for line in lines if line and not line.startswith(("#", "import ", "import\t"))]
        return [folder for folder in named if folder.is_dir()]
    except (OSError, ValueError):
        return []


def find_torch() -> Torch:
    """The torch of the target environment, found without importing it.

    Raises:
        Skip: there is none, or it is too old.
    """
    spec = importlib.util.find_spec("torch")
    paths = [Path(spec.origin).parent] if spec and spec.origin else []
    paths += [folder / "torch" for folder in site_packages()]
    path = next((p for p in paths if (p / "version.py").is_file() and (p / "include").is_dir()), None)
    if path is None:
        raise Skip(
            "torch was not found when fastdiff was built (install it first; where it is, uv needs "
            "--no-build-isolation and `python -m build` needs --no-isolation to see it)"
        )
    version = runpy.run_path(str(path / "version.py"))
    torch = Torch(path, version["__version__"], version.get("cuda"))
    if tuple(map(int, torch.version.split(".")[:2])) < TORCH_ABI:
        raise Skip(
            f"torch {torch.version} is older than {'.'.join(map(str, TORCH_ABI))}, the oldest they serve",
            "pip install --upgrade torch",
        )
    return torch


def pybind11_include() -> Path:
    spec = importlib.util.find_spec("pybind11")
    if spec and spec.origin:
        return Path(spec.origin).parent / "include"
    return find_torch().path / "include"  # torch ships a copy


def find_cxx() -> list[str]:
    """The C++ compiler's command.

    Raises:
        Skip: there is none that knows C++20.
    """
    if sys.platform == "win32":
        raise Skip("the compiled kernels are not built on Windows yet")
    fix = "xcode-select --install" if sys.platform == "darwin" else "apt install g++"
    named = shlex.split(os.environ.get("CXX", ""))
    cxx = named or [c for c in ("g++", "c++", "clang++") if shutil.which(c)][:1]
    if not cxx:
        raise Skip("no C++ compiler (g++, c++ or clang++) is on PATH", fix)
    if not shutil.which(cxx[0]):
        raise Skip(f"the C++ compiler CXX={shlex.join(named)} does not exist", "unset CXX")
    if not compiles(cxx, []):
        raise Skip(f"the C++ compiler {shlex.join(cxx)} does not compile C++20 (GCC 10 or Clang 12 is needed)", fix)
    return cxx


def compiles(cxx: list[str], flags: list[str]) -> bool:
    command = [*cxx, "-std=c++20", *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    try:
        return run(command, input=PROBE).returncode == 0
    except OSError:
        return False


def find_isas(cxx: list[str]) -> tuple[dict[str, list[str]], str]:
    """The instruction sets the compiler can produce, with their flags, and why the others are missing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}, f"the SIMD kernels are for x86-64; this is {platform.machine()}"
    found = {name: flags for name, flags in ISAS.items() if compiles(cxx, flags)}
    missing = [name for name in ISAS if name not in found]
    return found, f"{shlex.join(cxx)} cannot produce {', '.join(missing)}" if missing else ""


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    codes: list[str]
    ptx: str
    libraries: list[str]

    @property
    def gencode(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in self.codes]
        return flags + ([f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}"] if self.ptx else [])

    @property
    def arch_list(self) -> list[str]:
        return [f"sm_{c}" for c in self.codes] + ([f"compute_{self.ptx}"] if self.ptx else [])


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found
    where = f"under CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
    raise Skip(
        f"there is no nvcc {where} (it comes with the CUDA toolkit, https://developer.nvidia.com/cuda-downloads)",
        "conda install -c nvidia cuda-toolkit",
    )


def visible_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs, as in ``["80", "90"]``."""
    try:
        query = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except OSError:
        return []
    return sorted({line.strip().replace(".", "") for line in query.stdout.splitlines() if re.match(r"\d+\.\d", line)})


def cuda_architectures(wanted: str, visible: list[str], known: set[str]) -> tuple[list[str], str]:
    """Which machine code to produce, and for which architecture PTX (which newer GPUs compile on first use).

    Args:
        wanted: TORCH_CUDA_ARCH_LIST, or empty.
        visible: the GPUs of this machine, used when nothing is wanted.
        known: what nvcc can produce, as in ``{"80", "90", "90a"}``.
    """
    if wanted:
        codes, ptx = [], ""
        for entry in re.split(r"[;,\s]+", wanted.strip()):
            match = re.fullmatch(r"(\d+)\.(\d[a-f]?)(\+PTX)?", entry)
            if not match:
                raise Skip(f"TORCH_CUDA_ARCH_LIST has {entry!r}; entries look like 8.0, 9.0a or 12.0+PTX")
            code = match[1] + match[2]
            if code not in known:
                raise Skip(f"TORCH_CUDA_ARCH_LIST has {entry!r}, which this nvcc cannot produce")
            codes.append(code)
            ptx = code if match[3] else ptx
        return codes, ptx
    # Hopper's tensor-core instructions exist only in the architecture-specific variant.
    preferred = ["90a" if c == "90" and "90a" in known else c for c in visible] or DEFAULT_CUDA_ARCHITECTURES
    codes = [c for c in preferred if c in known]
    generic = sorted((c for c in (x.rstrip("abcdef") for x in codes or known) if c in known), key=int)
    return codes, generic[-1] if generic else ""


def known_architectures(nvcc: str) -> set[str]:
    """What nvcc can produce, as in ``{"80", "90", "90a"}``."""
    return set(re.findall(r"\bsm_(\d+[a-f]?)\b", run([nvcc, "--help"]).stdout))


def find_cuda(torch: Torch) -> Cuda:
    """The CUDA compiler and what it shall produce.

    Raises:
        Skip: the CUDA kernels are not to be built.
    """
    forced, wanted = flag("FASTDIFF_FORCE_CUDA"), os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not forced and not any(CSRC.glob("cuda/*.cu")):
        raise Skip("this version of fastdiff has no CUDA kernels")
    if not forced and not torch.cuda and not wanted:
        raise Skip(f"torch {torch.version} has no CUDA", "FASTDIFF_FORCE_CUDA=1")
    nvcc = find_nvcc()
    if not any(CSRC.glob("cuda/*.cu")):
        raise Skip("this version of fastdiff has no CUDA kernels")
    codes, ptx = cuda_architectures(wanted, visible_gpus(), known_architectures(nvcc))
    version = re.search(r"release ([\d.]+)", run([nvcc, "--version"]).stdout)
    dryrun = run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]).stdout
    return Cuda(nvcc, version[1] if version else "", codes, ptx, re.findall(r'"(-L[^"]+)"', dryrun))

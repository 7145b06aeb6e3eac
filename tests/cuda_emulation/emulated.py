"""The CUDA kernels of ``csrc/cuda`` and their fronts, compiled for the host and registered as the ``cuda`` backend."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from source_tree import ROOT, load_build

from fastdiff import _extension, ops
from fastdiff.backends import Kernel, cuda, register, unavailable

HERE = Path(__file__).resolve().parent
#: The oldest torch whose stable ABI has what csrc/ops uses, as the extension is compiled for.
ABI = f"-DTORCH_TARGET_VERSION=0x{_extension.TORCH_MIN[0]:02x}{_extension.TORCH_MIN[1]:02x}000000000000"
LIBRARY = torch.library.Library("fastdiff_emulated", "DEF")


def _included(source: Path) -> set[Path]:
    """A source and the project's files that it includes, directly or not."""
    found: set[Path] = set()
    todo = [source.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^ *#include ["<]([^">]+)[">]', path.read_text(), re.M):
            candidates = (folder / name for folder in (path.parent, HERE / "include", ROOT / "csrc/cuda"))
            todo += [c.resolve() for c in candidates if c.is_file()]
    return found


def compile_objects(sources: list[Path], *extra: str) -> list[Path]:
    """Object files of CUDA sources, fronts and the emulation itself, compiled unless they exist already."""
    build, _ = load_build(ROOT)
    cxx, include = build.find_cxx(), build.find_torch().path / "include"
    native = ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") else []
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *native, "-ffp-contract=fast", *extra]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
    flags += [
        "-DFASTDIFF_CUDA_EMULATION",
        "-DFASTDIFF_HAVE_CUDA",
        ABI,
        f"-I{HERE / 'include'}",
        f"-I{ROOT / 'csrc/cuda'}",
    ]
    flags += ["-isystem", str(include)]
    key = repr([cxx, flags, torch.__version__]).encode()
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        texts = [path.read_bytes() for path in sorted(_included(source))]
        digest = hashlib.sha256(b"".join([key, *texts])).hexdigest()[:16]
        target = folder / f"{source.parent.name}_{source.stem}_{digest}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            command = [*cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            part.rename(target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sources))


def link(name: str, objects: list[Path]) -> Path:
    """A shared library of the object files."""
    build, _ = load_build(ROOT)
    digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    target = objects[0].parent / f"{name}_{digest}.so"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        torch_folder = build.find_torch().path / "lib"
        command = [*build.find_cxx(), "-shared", *map(str, objects), "-o", str(part)]
        command += [f"-L{torch_folder}", "-ltorch", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        part.rename(target)
    return target


def load_ops() -> None:
    """Register the emulated kernels as the ``cuda`` backend, for CPU tensors."""
    sources = [HERE / "emulation.cpp", ROOT / "csrc/cpu/isa.cpp", *ROOT.glob("csrc/cuda/*.cu")]
    # Fronts of ops that have CPU kernels only are left out.
    sources += [path for path in ROOT.glob("csrc/ops/*.cpp") if "FASTDIFF_REGISTER" in path.read_text()]
    library = link("ops", compile_objects(sorted(sources)))
    for op in cuda.OPS:
        LIBRARY.define(op + getattr(ops, op).schema)
    torch.ops.load_library(str(library))
    unavailable.pop("cuda", None)
    for op, refuse in cuda.refuse_table("cpu").items():
        register(Kernel(op, "cuda", getattr(torch.ops.fastdiff_emulated, op).default, refuse))

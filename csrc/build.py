"""Compiling and linking ``fastdiff._C``: which source with which flags, by ninja if there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csrc.toolchain import CSRC, TORCH_ABI, Cuda, Skip, find_cxx, find_isas, find_torch, pybind11_include, run

ROOT = CSRC.parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fastdiff/__init__.py").read_text())[1]  # type: ignore[index]

CXXFLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    # GCC 12 sees uninitialised values inside its own AVX-512 headers.
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]


@dataclass(frozen=True)
class Step:
    """One compiler run."""

    output: Path
    inputs: list[Path]
    command: list[str]


class Build:
    """The commands that make one extension file."""

    def __init__(self, target: Path, cuda: Cuda | Skip) -> None:
        self.target = target
        self.cuda = cuda
        self.folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.torch, self.cxx = find_torch(), find_cxx()
        self.isas, self.isas_missing = find_isas(self.cxx)
        self.defines = [f"-DFASTDIFF_HAVE_{isa.upper()}" for isa in self.isas]
        if isinstance(cuda, Cuda):
            self.defines.append("-DFASTDIFF_HAVE_CUDA")

    def info(self) -> dict[str, Any]:
        """What ``fastdiff._extension.build_info()`` returns."""
        cuda: dict[str, Any] = {"built": isinstance(self.cuda, Cuda)}
        if isinstance(self.cuda, Cuda):
            cuda |= {"architectures": self.cuda.arch_list, "nvcc": self.cuda.version}
        else:
            cuda |= self.cuda.as_dict()
        built = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        return {
            "fastdiff": VERSION,
            "torch": self.torch.version,
            "torch_abi": ".".join(map(str, TORCH_ABI)),
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "compiler": run([*self.cxx, "--version"]).stdout.partition("\n")[0],
            "isas": list(self.isas),
            "isas_missing": self.isas_missing,
            "cuda": cuda,
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(built)),
        }

    def compile_steps(self) -> Iterator[Step]:
        # Objects are linked in this order, baseline first: of an inline function that several units define
        # the linker keeps the first, which must not be one that needs AVX-512.
        python, pybind11 = Path(sysconfig.get_paths()["include"]), pybind11_include()
        info = self.folder / "build_info.h"
        yield self.cxx_step(CSRC / "cpu/isa.cpp", "")
        for source in sorted(CSRC.glob("*.cpp")):
            include = ("-include", str(info)) if source.stem == "module" else ()
            # Otherwise pybind11 looks whether the GIL is held wherever it counts a reference.
            yield self.cxx_step(source, "", "-DNDEBUG", *include, *isystem(pybind11, python))
        abi = f"-DTORCH_TARGET_VERSION=0x{TORCH_ABI[0]:02x}{TORCH_ABI[1]:02x}000000000000"
        for source in sorted(CSRC.glob("ops/*.cpp")):
            yield self.cxx_step(source, "", abi, *isystem(self.torch.path / "include"))
        for isa, flags in self.isas.items():
            for source in sorted(CSRC.glob("cpu/*.cpp")):
                if source.stem != "isa" and source.stem.endswith("_amx") == (isa == "amx"):
                    yield self.cxx_step(source, isa, *flags, f"-DFASTDIFF_ISA={isa}")
        if isinstance(self.cuda, Cuda):
            for source in sorted(CSRC.glob("cuda/*.cu")):
                output = self.folder / f"cuda_{source.stem}.o"
                command = [self.cuda.nvcc, "-O3", "-std=c++20", *self.cuda.gencode, *self.defines]
                command += ["-Xfatbin=-compress-all", "-lineinfo"]
                command += ["-ccbin", self.cxx[0], "-Xcompiler=-fPIC,-fvisibility=hidden"]
                command += ["-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
                yield Step(output, [source], command)

    def cxx_step(self, source: Path, isa: str, *flags: str) -> Step:
        output = self.folder / ("_".join(filter(None, (source.parent.name, source.stem, isa))) + ".o")
        command = [*self.cxx, *CXXFLAGS, *self.defines, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        command += ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        return Step(output, [source], command)

    def link_step(self, objects: list[Path]) -> Step:
        # libtorch stays linked even if nothing refers to it: through it the CUDA library's symbols are found.
        torch = [f"-L{self.torch.path / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
        if sys.platform == "darwin":
            libraries = ["-bundle", "-undefined", "dynamic_lookup", *torch]
        else:
            # libstdc++ comes first: libtorch happens to export copies of some of its functions.
            exports = self.folder / "exports.map"
            exports.write_text("{ global: PyInit__C; local: *; };\n")
            libraries = [
                "-shared",
                f"-Wl,--version-script={exports}",
                "-lstdc++",
                "-Wl,--no-as-needed",
                *torch,
            ]
        if isinstance(self.cuda, Cuda):
            libraries += [
                *self.cuda.libraries,
                "-Wl,--as-needed",
                "-lcudart_static",
                "-lrt",
                "-ldl",
                "-lpthread",
            ]
        command = [*self.cxx, *map(str, objects), "-o", str(self.target), *libraries]
        return Step(self.target, objects, command + shlex.split(os.environ.get("LDFLAGS", "")))

    def run(self) -> None:
        """Compile and link.

        Raises:
            Skip: the compiler reported errors.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        info = json.dumps(self.info())
        header = self.folder / "build_info.h"
        header.write_text(f'#define FASTDIFF_BUILD_INFO R"json({info})json"\n')
        steps = list(self.compile_steps())
        link = self.link_step([step.output for step in steps])
        jobs = job_count()
        ninja = find_ninja()
        print(f"fastdiff: {len(steps)} units, {jobs} jobs, {ninja or 'no ninja'}; {info}", flush=True)
        if ninja:
            write_ninja(self.folder / "build.ninja", steps, link)
            outcomes = [run([ninja, "-C", str(self.folder), "-j", str(jobs)])]
        else:
            with ThreadPoolExecutor(jobs) as pool:
                outcomes = list(pool.map(lambda step: run(step.command), steps))
            if not any(outcome.returncode for outcome in outcomes):
                outcomes.append(run(link.command))
        output = "".join(outcome.stdout for outcome in outcomes)
        print(output, flush=True)
        if any(outcome.returncode for outcome in outcomes):
            error = re.search(r"^.*\b(?:error|undefined reference)\b.*$", output, re.M | re.I)
            message = error[0].strip() if error else output.strip()[-300:]
            raise Skip(f"compiling failed: {message.replace(f'{ROOT}/', '')}")


def job_count() -> int:
    """How many units to compile at once: ``MAX_JOBS``, or one per core and GiB of memory.

    Raises:
        Skip: ``MAX_JOBS`` is not a positive number.
    """
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise Skip(f"MAX_JOBS is {wanted!r}; a positive number is expected", "unset MAX_JOBS")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    except (AttributeError, ValueError, OSError):  # not everywhere
        return cores
    return max(1, min(cores, memory))


def isystem(*folders: Path) -> list[str]:
    return [part for folder in folders for part in ("-isystem", str(folder))]


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def write_ninja(path: Path, steps: list[Step], link: Step) -> None:
    def escape(text: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    lines = ["rule run", "  command = $cmd"]
    lines += ["rule compile", "  command = $cmd", "  depfile = $out.d", "  deps = gcc"]
    for rule, step in [*(("compile", s) for s in steps), ("run", link)]:
        lines.append(f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}")
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
    path.write_text("\n".join(lines) + "\n")

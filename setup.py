"""Builds fastdiff and, wherever it can, its extension module ``fastdiff._C``.

Nothing optional fails an install: without a compiler, CUDA or even torch the package is installed in pure
Python, and the reason goes to ``fastdiff/_build.json``, where ``fastdiff.info()`` finds it. The extension
uses torch's stable ABI, so the file serves torch 2.10 and everything newer, whichever it was built against.

Environment variables:
    FASTDIFF_SKIP_EXT=1    do not build the extension
    FASTDIFF_FORCE_EXT=1   fail instead of installing without the extension
    FASTDIFF_FORCE_CUDA=1  fail instead of building the extension without its CUDA kernels
    TORCH_CUDA_ARCH_LIST   CUDA architectures, for example "8.0;9.0a+PTX" (default: the visible GPUs)
    CUDA_HOME              the CUDA toolkit to use (default: nvcc on PATH, then /usr/local/cuda)
    MAX_JOBS               parallel compilations (default: one per core, and per GB of memory)
    CXX, CXXFLAGS, LDFLAGS as usual
"""

from __future__ import annotations

import functools
import json
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from csrc.build import Build  # noqa: E402
from csrc.toolchain import Cuda, Skip, find_cuda, find_cxx, find_torch, flag  # noqa: E402


@functools.cache
def reason_to_skip() -> Skip | None:
    """Why no extension is attempted; the cheap checks, done before setuptools decides on the wheel's tag."""
    if flag("FASTDIFF_SKIP_EXT"):
        return Skip("they were left out by FASTDIFF_SKIP_EXT=1", "unset FASTDIFF_SKIP_EXT")
    try:
        find_torch()
        find_cxx()
    except Skip as skip:
        return skip
    return None


def record(skip: Skip | None, package: Path) -> None:
    """Leave the reason for a missing extension where ``fastdiff.info()`` looks for it."""
    path = package / "_build.json"
    path.unlink(missing_ok=True)
    if skip is None:
        return
    for stale in package.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
        stale.unlink()
    if flag("FASTDIFF_FORCE_EXT") or flag("FASTDIFF_FORCE_CUDA"):
        raise SystemExit(f"fastdiff: the extension cannot be built: {skip.reason}. {remedy(skip)}")
    path.write_text(json.dumps(skip.as_dict(), indent=1) + "\n")
    bar = "*" * 100
    print(
        f"{bar}\nfastdiff is installed WITHOUT its compiled kernels: {skip.reason}.\n{remedy(skip)}\n{bar}",
        file=sys.stderr,
    )


def remedy(skip: Skip) -> str:
    return f"To change that: {skip.fix}" if skip.fix else ""


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        package = ROOT if self.editable_mode else Path(self.build_lib)
        record(reason_to_skip(), package / "fastdiff")


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.unlink(missing_ok=True)
        cuda = self.cuda()
        try:
            try:
                Build(target, cuda).run()
            except Skip as skip:
                if isinstance(cuda, Skip) or flag("FASTDIFF_FORCE_CUDA"):
                    raise
                Build(target, skip).run()
        except Skip as skip:
            record(skip, target.parent)
            if self.editable_mode:
                record(skip, ROOT / "fastdiff")

    def cuda(self) -> Cuda | Skip:
        try:
            return find_cuda(find_torch())
        except Skip as skip:
            if flag("FASTDIFF_FORCE_CUDA"):
                raise SystemExit(
                    f"fastdiff: FASTDIFF_FORCE_CUDA=1, but {skip.reason}. {remedy(skip)}"
                ) from None
            return skip


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(
            f"fastdiff: setuptools {setuptools.__version__} is too old to build with: "
            "pip install --upgrade setuptools, or leave --no-build-isolation out"
        )
    setup(
        ext_modules=[] if reason_to_skip() else [Extension("fastdiff._C", [], optional=True)],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )

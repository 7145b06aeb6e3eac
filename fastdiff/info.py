"""What is installed, what was built, and which backends can run here: ``fastdiff.info()``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from fastdiff import __version__, _extension
from fastdiff.backends import BACKENDS, cuda, kernels_of, losses, triton
from fastdiff.ops._library import OPS

DISTRIBUTION = "fastdiff-kernels"
_FRESH = "--force-reinstall --no-deps"
_TITLES = {"cuda": "CUDA", "triton": "Triton"}


@dataclass(frozen=True)
class Backend:
    """Whether a backend can run here.

    Attributes:
        name: one of :data:`fastdiff.backends.BACKENDS`.
        available: whether it can.
        detail: what it runs, when available.
        reason: why it cannot, when not.
        command: the shell command that would add it; empty when none would (the hardware, or this version).
    """

    name: str
    available: bool
    detail: str = ""
    reason: str = ""
    command: str = ""


@dataclass(frozen=True)
class Info:
    """The state of this installation; ``str()`` is a table, :meth:`as_dict` is the data.

    Attributes:
        versions: of fastdiff, Python and the libraries that matter; ``None`` for what is not installed.
        extension: file and build of the compiled extension; empty if it is not loaded.
        backends: all backends, in order of preference.
        cuda_graphs: whether ``fastdiff.patch(..., cuda_graphs=True)`` can capture anything here.
        warnings: what deserves attention, each with the command that cures it.
    """

    versions: dict[str, str | None]
    extension: dict[str, Any]
    backends: tuple[Backend, ...]
    cuda_graphs: Backend
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_row(name, version or "not installed") for name, version in self.versions.items()]
        lines += ["", "extension"]
        if self.extension:
            build = self.extension["build"]
            lines.append(_row("file", self.extension["file"]))
            if build:
                lines += [
                    _row("built", f"{build['built']} by {build['compiler']}, against torch {build['torch']}"),
                    _row("runs with", f"torch {build['torch_abi']} and newer"),
                    _row("CPU", ", ".join(build["isas"]) or "no kernels"),
                    _row("CUDA", ", ".join(build["cuda"].get("architectures", ["no kernels"]))),
                ]
            if build.get("isas_missing"):
                lines.append(_row("", build["isas_missing"]))
        else:
            lines.append(_row("", "none"))
        lines += ["", "backends"]
        for backend in (*self.backends, self.cuda_graphs):
            text = f"yes   {backend.detail}" if backend.available else f"no    {backend.reason}"
            lines.append(_row(backend.name, text))
            if backend.command:
                lines.append(_row("", f"      $ {backend.command}"))
        for warning in self.warnings:
            lines += ["", f"warning: {warning}"]
        return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:<13} {text}".rstrip()


def info() -> Info:
    """What is installed, what was built, which backends can run here, and why the others cannot."""
    module = _extension.module
    return Info(
        versions={
            "fastdiff": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", "diffusers", "transformers", "accelerate")},
            "platform": platform.platform(),
        },
        extension={"file": module.__file__, "build": _extension.build_info()} if module else {},
        backends=tuple(_backend(name) for name in BACKENDS),
        cuda_graphs=_cuda_graphs(),
        warnings=tuple(_warnings()),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend(name: str) -> Backend:
    if name == "eager":
        return Backend(name, True, "every op, on every device")
    if importlib.util.find_spec(f"fastdiff.backends.{name}") is None:
        return Backend(name, False, reason=f"this version of fastdiff has no {_TITLES.get(name, name)} kernels")
    missing = {"cpu": _no_cpu, "cuda": _no_cuda, "triton": _no_triton}[name]()
    if missing is not None:
        reason, command = missing
        return Backend(name, False, reason=reason, command=command)
    served = [op for op in OPS if any(kernel.backend == name for kernel in kernels_of(op))]
    if name == "cpu":
        detail = f", with {_extension.cpu_isa()}"
    elif name == "cuda":
        detail = f", for {', '.join(_cuda_architectures())}"
    else:
        detail = ", in the interpreter" if triton.INTERPRETED else ""
    if name in ("cpu", "cuda"):
        detail += f"; {losses.standing(name, torch.device(name))}"
    if any(kernel.on_request for op in served for kernel in kernels_of(op) if kernel.backend == name):
        gpus = {losses.kind(torch.device("cuda", index)) for index in range(torch.cuda.device_count())}
        if not any(losses.is_proven(gpu, op) for gpu in gpus for op in served):
            detail += "; not proven on a GPU yet, so only on request"
    return Backend(name, True, f"{len(served)} of {len(OPS)} ops{detail}")


def _cuda_graphs() -> Backend:
    if not torch.cuda.is_available():
        return Backend("CUDA graphs", False, reason="torch sees no CUDA device")
    return Backend("CUDA graphs", True, "on request: cuda_graphs=True; not run on a GPU yet")


def _cuda_architectures() -> list[str]:
    return _extension.build_info().get("cuda", {}).get("architectures", [])


def _no_extension() -> tuple[str, str]:
    steps = [_extension.fix, install_command() if _extension.rebuild else ""]
    return _extension.error, " && ".join(filter(None, steps))


def _no_cpu() -> tuple[str, str] | None:
    if _extension.module is None:
        return _no_extension()
    reason = _extension.why_not_cpu()
    return (reason, "") if reason else None


def _no_cuda() -> tuple[str, str] | None:
    if _extension.module is None:
        return _no_extension()
    build = _extension.build_info().get("cuda", {})
    if not build.get("built"):
        steps = [build.get("fix", ""), install_command()]
        return build.get("reason", "the extension was built without CUDA"), " && ".join(filter(None, steps))
    if reason := cuda.why_not():
        return reason, ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU", ""
    reasons = [cuda.device_reason(index) for index in range(torch.cuda.device_count())]
    if all(reasons):
        return str(reasons[0]), install_command()
    return None


def _no_triton() -> tuple[str, str] | None:
    reason = triton.why_not()
    if reason is not None:
        return reason, "" if "torch" in reason else "pip install --upgrade triton"
    if triton.INTERPRETED:
        return None
    device = getattr(torch, triton.device_type())
    if not device.is_available():
        return "torch sees no GPU that Triton can use", ""
    reason = triton.why_not_on(0)
    return (reason, "") if reason else None


def install_command() -> str:
    """The shell command that builds and installs fastdiff again, the way it was installed."""
    # Not importlib.util.find_spec: asked for pip, setuptools' finder puts distutils out of order for the whole process,
    # and torch.compile needs it.
    pip = "pip install" if PathFinder.find_spec("pip") else "uv pip install --no-build-isolation"
    root = Path(__file__).resolve().parents[1]
    editable = (root / "setup.py").is_file()
    if not editable:
        url, editable = _installed_from()
        root = Path(unquote(urlparse(url).path))
        if not url.startswith("file:") or not root.is_dir():
            return f"{pip} --no-cache-dir --no-binary={DISTRIBUTION} {DISTRIBUTION}"
    return f"{pip} {'-e ' if editable else ''}{shlex.quote(str(root))}"


def _installed_from() -> tuple[str, bool]:
    """The URL pip installed fastdiff from (empty for an index), and whether that is an editable install."""
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    direct = json.loads(text or "{}")
    return direct.get("url", ""), direct.get("dir_info", {}).get("editable", False)


def _warnings() -> list[str]:
    warnings = []
    if version := _version("fastdiff"):
        warnings.append(
            f"the unrelated distribution 'fastdiff' {version} (a text-diff library) is installed too, and it "
            f"owns the folder fastdiff/ as well: pip uninstall fastdiff && {install_command()} {_FRESH}"
        )
    if _version("diffusers") is None:
        warnings.append("there is nothing to patch without diffusers: pip install diffusers transformers")
    return warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m fastdiff info``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """``python -m fastdiff info``."""
    state = info()
    sys.stdout.write((json.dumps(state.as_dict(), indent=2) if args.json else str(state)) + "\n")
    return 0

"""``python -m fastdiff bench``: the scripts of ``benchmarks/``, which belong to a source checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

#: What is measured -> the script.
SCRIPTS = {
    "kernels": "kernels.py",
    "models": "models.py",
    "cold-start": "cold_start.py",
    "memory": "memory.py",
    "schedulers": "schedulers.py",
    "overhead": "overhead.py",
    "pipelines": "pipelines.py",
    "report": "report.py",
    "compare": "compare.py",
    "gpu": "gpu.py",
}
_PACKAGE = Path(__file__).resolve().parent


def benchmarks_folder() -> Path | None:
    """``benchmarks/`` next to this package: results name the commit of what they measured."""
    folder = _PACKAGE.parent / "benchmarks"
    return folder if (folder / "kernels.py").is_file() else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's own arguments; the rest are the script's."""
    parser.add_argument("what", choices=list(SCRIPTS), help="what to measure, or to do with results")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the script: --help lists them")


def run(args: argparse.Namespace) -> int:
    """Run the script in a process of its own, with this Python and this copy of fastdiff.

    Returns:
        The script's exit code; 2 if there is no script.
    """
    folder = benchmarks_folder()
    if folder is None:
        print(
            "fastdiff bench: an installed package has no benchmarks. Run it in a checkout of fastdiff's repository: "
            "there, either\n  pip install -e .\nor just\n  python -m fastdiff bench ...\nthe latter with the "
            "checkout's own fastdiff, which has no compiled kernels until it is built (make build).",
            file=sys.stderr,
        )
        return 2
    paths = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(folder / SCRIPTS[args.what]), *args.options]
    return subprocess.run(command, env=environment).returncode

"""``python -m fastdiff <command>``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``. It is imported when it is
used, so that none costs another's imports.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "info": Command("fastdiff.info", "what is installed, built and usable, and how to add what is missing"),
    "demo": Command("fastdiff.demo.run", "the same pictures with and without fastdiff, compared and timed"),
    "tune": Command("fastdiff.backends.triton.tune", "launch configurations of the Triton kernels for this GPU"),
    "bench": Command("fastdiff._bench_command", "kernels, models, cold start and memory, measured; tables and plots"),
    "verify": Command("fastdiff._verify_command", "every patched layer against eager and fp64, in a real run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The process's exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overview = argparse.ArgumentParser(
        prog="fastdiff",
        description="Makes Hugging Face Diffusers pipelines faster and changes nothing else.",
        epilog="\n".join(["commands:", *(f"  {name:<10} {c.help}" for name, c in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    overview.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    if not arguments:
        overview.print_help()
        return 2
    name = overview.parse_args(arguments[:1]).command
    command = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(prog=f"fastdiff {name}", description=COMMANDS[name].help)
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments[1:]))

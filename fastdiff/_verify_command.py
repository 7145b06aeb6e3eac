"""``python -m fastdiff verify``: the proof, on the shipped demo or on any other pipeline."""

from __future__ import annotations

import argparse
import json
import sys

import fastdiff
from fastdiff.backends import BACKENDS
from fastdiff.demo import run as demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", default=None, help="a Diffusers pipeline, by name or path (default: shipped demo)")
    parser.add_argument("--prompt", action="append", help="a prompt; repeat it for more pictures")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--backend", default=None, choices=BACKENDS, help="the only one whose kernels may serve; on a "
                        "GPU that was not measured none does unless asked for")  # fmt: skip
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--scheduler", default=None, help="a Diffusers scheduler class, e.g. EulerDiscreteScheduler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=None, help="largest error (default: from eager's)")
    parser.add_argument("--bisect", action="store_true", help="find the first wrong layer, and the function behind it")
    parser.add_argument("--full", action="store_true", help="one line per layer")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns:
        0 if everything holds, 1 if not, 2 if there is nothing to run.
    """
    from rich.console import Console

    try:
        pipe = demo.load(args)
        pipe.set_progress_bar_config(disable=True)
        call = demo.call_arguments(pipe, args)
        fastdiff.patch(pipe, backend=args.backend)
        result = fastdiff.verify(pipe, seed=args.seed, tolerance=args.tolerance, bisect=args.bisect, **call)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        print(f"fastdiff verify: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result.to_dict()))
    else:
        console = Console()
        console.print(result.table(full=args.full))
        console.print(result.summary(), markup=False, highlight=False)
    return 0 if result.ok else 1

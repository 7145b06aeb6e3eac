"""Make ``_fingerprints.py`` from the wheels of the supported Diffusers versions, unpacked into directories::

    python -m fastdiff.patching._make_fingerprints DIRECTORY ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastdiff.patching.families import all_sources

_READ = """
import json, sys, diffusers
from fastdiff.patching._fingerprint import fingerprint, resolve
found = {}
for name in json.load(sys.stdin):
    try:
        found[name] = fingerprint(resolve(name))
    except (ImportError, AttributeError):
        print(f"Diffusers {diffusers.__version__} has no {name}", file=sys.stderr)
print(json.dumps([diffusers.__version__, found]))
"""


def make(directories: list[str]) -> str:
    """The text of the table. Each version is imported in a process of its own."""
    names = sorted(all_sources())
    table: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for directory in directories:
        path = os.pathsep.join([directory, *filter(None, sys.path)])
        run = subprocess.run(
            [sys.executable, "-c", _READ],
            input=json.dumps(names),
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        version, found = json.loads(run.stdout.splitlines()[-1])
        for name, value in found.items():
            table[name].setdefault(value, []).append(version)
    lines = [
        '"""Made by ``python -m fastdiff.patching._make_fingerprints``: function -> hash of its source -> versions."""',
        "",
        "FINGERPRINTS: dict[str, dict[str, str]] = {",
    ]
    for name in names:
        lines.append(f'    "{name}": {{')
        lines += [f'        "{value}": "{" ".join(versions)}",' for value, versions in table[name].items()]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    Path(__file__).with_name("_fingerprints.py").write_text(make(sys.argv[1:]))

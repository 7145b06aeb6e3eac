"""For pytest's ``-p``: the emulated kernels are the ``cuda`` backend of that run."""

from __future__ import annotations

from emulated import load_ops

load_ops()

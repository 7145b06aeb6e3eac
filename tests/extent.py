"""How much is tested: with ``FASTDIFF_TEST_ALL=1`` also what takes minutes."""

from __future__ import annotations

import os

ALL = os.environ.get("FASTDIFF_TEST_ALL") == "1"
#: The tests ran with the newest Diffusers already, and this is another one; see patching/differences.py.
REPEATED = os.environ.get("FASTDIFF_TEST_REPEATED") == "1" and not ALL

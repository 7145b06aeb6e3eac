"""How much is tested: with ``FASTDIFF_TEST_ALL=1`` also what takes minutes."""

from __future__ import annotations

import os

ALL = os.environ.get("FASTDIFF_TEST_ALL") == "1"

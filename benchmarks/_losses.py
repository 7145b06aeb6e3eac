"""The table of losing sizes that the choice of kernels consults, made from the results.

A bucket (device, backend, op, dtype, sizes to a power of two) is in it if the kernel was slower than eager beyond noise
in every row of the bucket, with the stock allocator. Rows without features, or of other sections, do not count.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from layer_cases import cases, gpu_cases

from fastdiff.backends import losses

TABLE = losses.TABLE
Bucket = tuple[str, str, str, str, tuple[tuple[str, int, int], ...]]


def losing_sizes(results: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """The content of ``losses.json``.

    Args:
        results: rows with their environments, by result file and section.
    """
    seen: dict[str, str] = {}
    ratios: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    wrong: set[tuple[str, str, str]] = set()
    rows_in: dict[Bucket, list[tuple[float, float, str]]] = {}
    for sections in results.values():
        for row in sections.get("kernels", []):
            where, extra = row["environment"], row["extra"]
            if row["allocator"] != "stock" or "features" not in extra:
                continue
            seen[where["kind"]] = f"commit {where['commit']}, {where['date']}"
            bounds = losses.bucket(extra["features"])
            wrong |= {(where["kind"], extra["op"], said.partition(":")[0].removeprefix("fastdiff "))
                      for said in extra.get("wrong", ())}  # fmt: skip
            served: dict[str, float] = {}
            ratios.setdefault((where["kind"], extra["op"], row["dtype"]), []).append(served)
            for timing in row["timings"]:
                backend = timing["provider"].removeprefix("fastdiff ")
                if backend == timing["provider"]:
                    continue
                key = where["kind"], backend, extra["op"], row["dtype"], bounds
                # A size that it loses is left to eager.
                served[backend] = 1.0 if timing["ratio_high"] < 1.0 else timing["ratio"]
                rows_in.setdefault(key, []).append((timing["ratio_high"], timing["ratio"], row["name"]))
    lost = []
    for (device, backend, op, dtype, bounds), found in sorted(rows_in.items()):
        if any(high >= 1.0 for high, _, _ in found):
            continue
        _, ratio, name = min(found, key=lambda entry: entry[1])
        reason = f"measured at {ratio:.2f} of eager's speed on {device} ({name})"
        lost.append({"device": device, "backend": backend, "op": op, "dtype": dtype,
                     "bounds": [list(b) for b in bounds], "reason": reason})  # fmt: skip
    return {"measured": dict(sorted(seen.items())), "fastest": _fastest(ratios, wrong), "losses": lost}


def _fastest(
    ratios: dict[tuple[str, str, str], list[dict[str, float]]], wrong: set[tuple[str, str, str]]
) -> losses.Fastest:
    """By kind of device, op and dtype, the backends that are faster than eager, in the geometric mean of their ratios
    to it; see :data:`fastdiff.backends.losses.Fastest`.

    An op of which less than half of the cases are there in a dtype, as after a run for some names or one that was cut,
    is left undecided: one size must not choose for all.

    Args:
        ratios: of every row, by backend; a backend that is not in a row did not take it, and eager serves that.
        wrong: (kind, op, backend) that gave a wrong result somewhere, which are never chosen, in whatever dtype.
    """
    on_gpu = Counter(case.op for case in gpu_cases())
    on_cpu = Counter(case.op for case in cases() if case.fits_cpu())
    found: losses.Fastest = {}
    for (kind, op, dtype), rows in sorted(ratios.items(), key=lambda entry: entry[0]):
        if 2 * len(rows) < (on_gpu if kind.startswith("cuda") else on_cpu)[op]:
            continue
        backends = sorted({b for row in rows for b in row if (kind, op, b) not in wrong})
        means = {b: statistics.geometric_mean(row.get(b, 1.0) for row in rows) for b in backends}
        if means:
            faster = sorted((b for b in backends if means[b] > 1.0), key=lambda b: -means[b])
            found.setdefault(kind, {}).setdefault(op, {})[dtype] = ", ".join(faster or ["eager"])
    return found

"""What the project set itself, and what is said of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import cold_start
import layer_cases
import model_cases
import pytest
from _results import Row, Timing
from _targets import Target, as_extra, text, verdicts

#: Denoiser or decoder on an H200 in bf16: speed over eager, and over the better of torch.compile's modes.
H200 = {
    "SD1.5 U-Net 512x512 batch 2": (3.5, 1.15),
    "SDXL U-Net 1024x1024 batch 2": (1.35, 1.1),
    "DiT-XL/2 256x256 batch 2": (8.0, 1.1),
    "SD3-medium 1024x1024 batch 2": (1.2, 1.05),
    "Flux-dev 1024x1024 batch 1": (1.3, 1.05),
    "SD VAE decode 1024x1024": (2.0, 1.3),
}


def _timing(provider: str, ratio: float, noise: float = 0.0) -> Timing:
    return Timing(provider, 12.0 / ratio, ratio, ratio * (1 - noise), ratio * (1 + noise), 9)


def _row(*timings: Timing, target: float | None = None, **extra: Any) -> dict[str, Any]:
    moved = extra.pop("bytes_moved", 0)
    return asdict(Row("case", "bf16", "stock", list(timings), moved, target=target, extra=extra))


EAGER = _timing("eager", 1.0)


def test_models_have_the_targets_of_an_h200() -> None:
    found = {}
    for case in model_cases.cases():
        (further,) = case.further_targets("cuda") or [None]
        if case.target("cuda", "bf16") or further:
            found[case.name] = case.target("cuda", "bf16"), further and further["value"]
            assert further["about"] == "torch.compile" and case.further_targets("cpu") == []
    assert found == H200


def test_speed_is_judged_by_our_fastest_side() -> None:
    """Packed weights apart, which cost memory; of torch.compile the better mode counts."""
    compiled = _timing("torch.compile", 1.8), _timing("torch.compile max-autotune", 2.5)
    ours = _timing("fastdiff cuda", 1.5), _timing("fastdiff cuda, CUDA graphs", 3.0)
    packed = _timing("fastdiff, packed weights", 9.0)
    row = _row(EAGER, *ours, packed, *compiled, target=3.5, targets=as_extra(Target("speed", 1.15, "torch.compile")))
    eager, compile_ = verdicts(row)
    assert (eager.what, eager.reached, eager.said) == ("speed over eager", 3.0, "missed")
    assert (compile_.what, compile_.said) == ("speed over torch.compile", "reached")
    assert compile_.reached == pytest.approx(1.2)
    assert text(row) == "3.5 (missed); 1.15 speed over torch.compile"
    del row["timings"][-2:]
    assert text(row) == "3.5 (missed); 1.15 speed over torch.compile (not measured)"
    assert [v.said for v in verdicts(row | {"timings": []})] == ["not measured", "not measured"]


@pytest.mark.parametrize(("ratio", "said"), [(1.98, "reached"), (1.9, "missed")])
def test_no_slower_allows_for_noise(ratio: float, said: str) -> None:
    target = Target("speed", 1.0, "fastdiff triton", of="fastdiff cuda")
    row = _row(EAGER, _timing("fastdiff cuda", ratio, 0.01), _timing("fastdiff triton", 2.0, 0.01),
               targets=as_extra(target))  # fmt: skip
    (verdict,) = verdicts(row)
    assert (verdict.of, verdict.said) == ("fastdiff cuda", said)
    assert text(row, brief=True) == ("" if said == "reached" else "1 speed over fastdiff triton fastdiff cuda (missed)")


def test_share_of_bandwidth_counts_the_second_read() -> None:
    """6 ms at 1 GB/s are 6 MB; 5 of them are read or written once, and one again."""
    target = as_extra(Target("bandwidth", 0.85, of="fastdiff cuda"), Target("bandwidth", 0.8, of="fastdiff triton"))
    row = _row(EAGER, _timing("fastdiff cuda", 2.0), bytes_moved=5_000_000, bandwidth=1e9, targets=target)
    once, absent = verdicts(row)
    assert (once.said, absent.said) == ("missed", "not measured") and once.reached == pytest.approx(5 / 6)
    row["extra"]["second_read"] = 1_000_000
    assert verdicts(row)[0].said == "reached"


def test_kernels_have_targets_on_a_gpu() -> None:
    of_attention = {c.name: c.targets for c in layer_cases.gpu_cases() if c.op == "attention"}
    for name, target in {
        "attention [2,8,4096,40] x 77 keys": 1.5,
        "attention [2,8,4096,40] x 4096 keys": 1.15,
        "attention [2,16,1024,72] x 1024 keys": 1.15,
        "attention [2,8,1024,80] x 1024 keys": 1.15,
        "attention [2,16,4096,88] x 4096 keys": 1.0,
        "attention [2,8,256,160] x 256 keys": 1.0,
        "attention [1,1,16384,512] x 16384 keys": 2.0,
        "attention [1,24,4608,128] x 4608 keys": None,  # torch's own serves where it is faster
    }.items():
        assert of_attention[name].get("bf16") == target, name
    large, small = (layer_cases.modulate("t", (2, tokens, 1536)) for tokens in (4096, 64))
    both = ("cuda", "triton", "cpu")
    shares = {t.of: t.value for t in layer_cases.memory_targets(large, 2, both) if t.measure == "bandwidth"}
    assert shares == {"fastdiff cuda": 0.85, "fastdiff triton": 0.8}
    speeds = [(t.of, t.about, t.value) for t in layer_cases.memory_targets(small, 2, both)]
    assert speeds == [("fastdiff cuda", "torch.compile", 1.0), ("fastdiff triton", "torch.compile", 1.0),
                      ("fastdiff cuda", "fastdiff triton", 1.0)]  # fmt: skip
    assert layer_cases.memory_targets(layer_cases.attention("t", 1, 1, 4096, 64, 77), 2, both) == []


def test_cold_start_is_judged_side_by_side() -> None:
    phases = {"fastdiff": {"new size": [0.2, 0.1, 0.3], "other LoRA": [0.7, 0.6, 0.8]}}
    eager, ours = Timing("eager", 5000, 1, 1, 1, 3), Timing("fastdiff", 7500, 0.6, 0.6, 0.6, 3)
    row = _row(eager, ours, phases=phases, targets=cold_start.gpu_targets("cuda"))
    assert [(v.value, v.reached, v.said) for v in verdicts(row)] == [
        (3.0, 2.5, "reached"), (0.5, 0.2, "reached"), (0.5, 0.7, "missed"),
    ]  # fmt: skip
    assert text(row, "fastdiff").endswith("0.5 seconds of other LoRA (missed)") and text(row, "eager") == ""
    assert cold_start.gpu_targets("cpu") == []


def test_overhead_has_a_limit() -> None:
    assert text(_row(overhead_us=12.0, target=15.0)) == "15"
    assert text(_row(overhead_us=17.0, target=15.0)) == "15 (missed)"


def test_raised_thresholds_have_targets_of_their_own() -> None:
    case = next(c for c in layer_cases.cases() if "[1, 128, 512, 512] NHWC" in c.name)
    assert case.targets == {"fp32": 2.0, "bf16": 2.0, "fp32 tuned": 2.5, "bf16 tuned": 2.5}

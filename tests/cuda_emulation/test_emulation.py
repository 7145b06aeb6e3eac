"""The emulation is tested too: it must run correct kernels, and notice what would break on a GPU."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from emulated import HERE, compile_objects, link
from source_tree import ROOT
from torch import Tensor

SEEDS = range(5)
#: Kernels without a mistake.
RIGHT = (
    *("copy", "reverse", "reverse twice", "packs", "asynchronous copy"),
    "32 KB of dynamic and 16 of static shared memory",
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(link("broken", compile_objects([HERE / "emulation.cpp", HERE / "broken.cu"]))))


def run(library: ctypes.CDLL, name: str, seed: int) -> tuple[Tensor, Tensor, str]:
    """x, what the kernel makes of it under this order of threads, and the error."""
    x, out = torch.arange(1.0, 65.0), torch.full((64,), torch.nan)
    message = ctypes.create_string_buffer(1000)
    library.fastdiff_emulation_seed(seed)
    library.run_kernel(name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), message, 1000)
    return x, out, message.value.decode()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_correct_kernels(library: ctypes.CDLL, name: str, seed: int) -> None:
    x, out, error = run(library, name, seed)
    expected = {
        "copy": x,
        "32 KB of dynamic and 16 of static shared memory": x,
        "reverse twice": 2 * x.flip(0) + 1,
        "packs": torch.cat([x[:60], torch.full((4,), torch.nan)]),
    }
    assert error == ""
    torch.testing.assert_close(out, expected.get(name, x.flip(0)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("copy beyond the end", r"block \(0, 0, 0\), thread \(63, 0, 0\): reads 4 bytes out of bounds: at byte 256 of"),
        (
            "copy from before the start",
            r"thread \(0, 0, 0\): reads 4 bytes out of bounds: at byte -4 of a tensor of 256",
        ),
        ("copy to beyond the end", "writes 4 bytes out of bounds"),
        ("write the input", "writes 4 bytes of an input"),
        ("packs, misaligned", "reads 16 bytes at an address that is not a multiple of 16"),
        ("packs, written misaligned", "writes 16 bytes at an address that is not a multiple of 16"),
        ("packs, written beyond the end", r"writes 16 bytes out of bounds: at byte \d+ of a tensor"),
        ("packs over the end", r"reads 8 bytes out of bounds: at byte \d+ of a tensor"),
        ("asynchronous copy, misaligned", "reads 16 bytes at an address that is not a multiple of 16"),
        ("asynchronous copy to a misaligned place", "writes 16 bytes at an address that is not a multiple of 16"),
        ("asynchronous copy beyond the end", r"reads 16 bytes out of bounds: at byte \d+ of a tensor"),
        ("matrices, misaligned", "reads 16 bytes at an address that is not a multiple of 16"),
        ("matrices past shared memory", "reads 16 bytes out of bounds"),
        ("past shared memory", "written behind the 256 bytes of shared memory"),
        ("32 KB of dynamic and more of static shared memory", "needs 16388 bytes of static and 32768 of dynamic"),
        ("barrier of some", "__shfl_xor_sync|threads wait for ever"),
        ("masks differ", "different masks"),
    ],
)
def test_errors(library: ctypes.CDLL, name: str, message: str) -> None:

    for seed in SEEDS:
        assert re.search(message, error := run(library, name, seed)[2]), error
    assert run(library, "copy", 0)[2] == run(library, "matrices", 0)[2] == ""  # an error leaves nothing behind


@pytest.mark.parametrize(
    "name",
    [
        "reverse, no barrier",
        "reverse twice, no barrier after reading",
        "shared memory half written",
        "asynchronous copy, not waited for",
        "asynchronous copy, no barrier",
    ],
)
def test_wrong_results(library: ctypes.CDLL, name: str) -> None:
    """Mistakes without an error of their own change the result, under every seed."""
    for seed in SEEDS:
        x, out, error = run(library, name, seed)
        right = 2 * x.flip(0) + 1 if "twice" in name else x if "half" in name else x.flip(0)
        assert error == ""
        assert not torch.equal(out, right)


def test_inline_ptx_lies_in_one_header_and_has_twins() -> None:
    assert [p.name for p in ROOT.glob("csrc/cuda/*") if re.search(r"\basm\b", p.read_text())] == ["ptx.cuh"]
    text = (ROOT / "csrc/cuda/ptx.cuh").read_text().partition("#ifdef FASTDIFF_CUDA_EMULATION")[2]
    twins, wrappers = (
        set(re.findall(r"^(?:__device__ __forceinline__ |inline )?(?:void|float) (\w+)\(", part, re.M))
        for part in text.split("#else")
    )
    assert twins == wrappers and len(twins) == 6

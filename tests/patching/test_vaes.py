"""VAEs in tiles and slices, and those with nothing to fuse or with noise of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import ConsistencyDecoderVAE
from models import Case, assert_no_further, output, randomized, vae
from published import PLAIN, Plain
from torch import Tensor
from zoo import ALL_CASES, model_class

import fastdiff
from fastdiff._launches import count_launches
from fastdiff.ops import qk_norm_rope
from fastdiff.ops._library import OPS
from fastdiff.patching.families.video_autoencoders import MOCHI_EPS


def _tiled() -> Any:
    model = vae()
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 16, 8
    return model


def _sliced() -> Any:
    model = vae()
    model.enable_slicing()
    return model


def _there_and_back(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(model.encode(x).latent_dist.mean, return_dict=False)[0]


def test_checkpoints_of_ltx2() -> None:
    """Gradient checkpointing passes all arguments by position."""
    model = _case("LTX-2").build().requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    x = torch.randn(1, 3, 9, 32, 32)
    expected = model.encode(x).latent_dist.mean
    fastdiff.patch(model)
    ours = model.encode(x).latent_dist.mean
    assert (ours - expected).norm() <= 1e-4 * expected.norm()
    ours.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_gradient_at_zero_queries() -> None:
    """Of Mochi's VAE: queries of length 0, as of black frames, have a finite gradient."""
    q = torch.zeros(1, 2, 1, 8, requires_grad=True)
    ours, _ = qk_norm_rope(q, q, eps=MOCHI_EPS)
    ours.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("build", [_tiled, _sliced])
def test_tiling_and_slicing(build: Any, dtype: torch.dtype) -> None:
    """Tiles of several sizes (48 = 16 + 16 + 16, with overlap and a rest) and batches of 3, one by one."""
    model = build().to(dtype)
    exact = copy.deepcopy(model).double()
    pictures = [torch.randn(3, 3, 40, 48, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(4)]
    reference = torch.stack([_there_and_back(exact, x.double()) for x in pictures])
    eager = torch.stack([_there_and_back(model, x) for x in pictures]).double()
    calls: list[int] = []
    model.decoder.conv_in.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    fastdiff.patch(model)
    ours = torch.stack([_there_and_back(model, x) for x in pictures]).double()
    assert len(calls) > len(pictures), "neither tiles nor slices"
    assert_no_further(ours, eager, reference)
    assert fastdiff.report(model).coverage == 1.0


def _case(name: str) -> Case:
    return next(case for case in ALL_CASES if case.name == f"VAE of {name}")


def _name(case: Case) -> str:
    return case.name.removeprefix("VAE of ")


def _by_name(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", map(_case, names), ids=_name)


def _tiles(height: int, frames: int = 0) -> dict[str, Any]:
    """What tiles are made of: pixels, and frames where there are tiles in time."""
    sizes = {f"tile_sample_{what}": height for what in ("min_height", "min_width")}
    sizes |= {f"tile_sample_stride_{what}": 3 * height // 4 for what in ("height", "width")}
    if frames:
        sizes |= {"tile_sample_min_num_frames": frames, "tile_sample_stride_num_frames": frames // 2}
    return sizes


#: VAE -> size of the clips or pictures, attributes that make tiles and chunks small.
_VIDEOS = {
    "Wan 2.1": ((5, 24, 16), _tiles(16)),
    "Wan 2.2": ((5, 32, 16), _tiles(16)),
    "Qwen-Image": ((1, 24, 16), _tiles(16)),
    "HunyuanVideo": ((13, 40, 32), _tiles(32, 8)),
    "CogVideoX": ((17, 48, 48), {"tile_sample_min_height": 32, "tile_sample_min_width": 32,
                                 "tile_latent_min_height": 4, "tile_latent_min_width": 4}),
    "Mochi": ((13, 48, 32), _tiles(32) | {"use_framewise_decoding": True}),
    "LTX 0.9": ((17, 96, 64), _tiles(64, 16) | {"use_framewise_encoding": True, "use_framewise_decoding": True}),
    "Sana (DC-AE)": ((24, 16), _tiles(16) | {"tile_latent_min_height": 8, "tile_latent_min_width": 8}),
}  # fmt: skip


@_by_name(*_VIDEOS)
def test_video_tiles_chunks_and_slices(case: Case) -> None:
    """Batches one by one, in tiles, and frames in chunks, whose convolutions remember the chunk before."""
    size, tiles = _VIDEOS[_name(case)]
    model = case.build()
    model.enable_tiling()
    model.enable_slicing()
    for key, value in tiles.items():
        assert hasattr(model, key), key
        setattr(model, key, value)
    exact = copy.deepcopy(model).double()
    clips = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    eager = torch.stack([output(model, {"sample": x}) for x in clips]).double()
    reference = torch.stack([output(exact, {"sample": x.double()}) for x in clips])
    calls: list[int] = []
    model.decoder.conv_in.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    fastdiff.patch(model)
    ours = torch.stack([output(model, {"sample": x}) for x in clips]).double()
    assert len(calls) >= 4 * len(clips) and set(calls) == {1}, "neither tiles nor slices"
    assert_no_further(ours, eager, reference)
    left = {row.reason for row in fastdiff.report(model).rows if not row.fused}
    assert not left
    fastdiff.unpatch(model)
    assert torch.equal(output(model, {"sample": clips[0]}).double(), eager[0])


@_by_name("Wan 2.1", "CogVideoX", "Mochi")
def test_hook_on_a_norm_or_an_activation(case: Case) -> None:
    """A norm with a hook, and the norms before an activation with one, are computed by themselves; others are not."""
    model, found = case.build(), []
    block = next(m for _, m in model.decoder.named_modules() if hasattr(m, "norm2") and hasattr(m, "nonlinearity"))
    frames = 7 if _name(case) == "Mochi" else 5  # of which its attention sees a few
    inputs = {"sample": torch.randn(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0))}
    eager = output(model, inputs)
    fastdiff.patch(model)
    for hooked, separate in ((block.norm1, {"norm1"}), (block.nonlinearity, {"norm1", "norm2"})):
        handle = hooked.register_forward_hook(lambda module, args, out: found.append(out))
        ours = output(model, inputs)
        handle.remove()
        assert found and (ours - eager).norm() <= 1e-4 * eager.norm()
        rows = {row.path: row for row in fastdiff.report(model).rows}
        own = {name: rows[path] for path, m in model.named_modules() for name in ("norm1", "norm2")
               if m is getattr(block, name)}  # fmt: skip
        assert {name for name, row in own.items() if not row.fused} == separate
        assert all(own[name].reason == "the norm or the activation has hooks" for name in separate)
        assert sum(not row.fused for row in rows.values()) == len(separate)
        found.clear()
    output(model, inputs)
    assert all(row.fused for row in fastdiff.report(model).rows if row.path.startswith("decoder"))


def test_one_norm_of_two() -> None:
    """They share their activation, which stays as long as one of them needs it."""
    model = _case("Qwen-Image").build()
    inputs = {"sample": torch.randn(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    eager = output(model, inputs)
    fastdiff.patch(model, skip="*norm2")
    ours = output(model, inputs)
    assert not torch.equal(ours, eager) and (ours - eager).norm() <= 1e-4 * eager.norm()
    rows = fastdiff.report(model).rows
    assert {row.path.rpartition(".")[2] for row in rows if not row.fused} == {"norm2"}
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, inputs), ours)
    for patched in (model, copied):
        fastdiff.unpatch(patched)
        assert torch.equal(output(patched, inputs), eager)
        assert not any("forward" in vars(module) for module in patched.modules())


@_by_name("Wan 2.1", "HunyuanVideo")
def test_compiled_decoder_is_one_graph(case: Case) -> None:
    model = case.build()
    z = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager = model.decoder(z)
        fastdiff.patch(model)
        seen: list[str] = []

        def watching(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
            seen.extend(str(node.target) for node in module.graph.nodes)
            return module.forward

        torch._dynamo.reset()
        ours = torch.compile(model.decoder, fullgraph=True, backend=watching)(z)
    fused = count_launches(lambda: model.decoder(z))
    assert sum("fastdiff." in target for target in seen) == sum(fused[op] for op in OPS) > 10
    assert (ours - eager).norm() <= 1e-4 * eager.norm()


def test_consistency_decoder() -> None:
    """It draws its noise from the global generator."""
    model = randomized(
        ConsistencyDecoderVAE(
            encoder_block_out_channels=(32, 64), encoder_down_block_types=("DownEncoderBlock2D",) * 2,
            encoder_layers_per_block=1, encoder_norm_num_groups=8, decoder_block_out_channels=(32, 64),
            decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2, decoder_layers_per_block=1,
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_norm_num_groups=8,
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(x, return_dict=False)[0]

    eager = run()
    fastdiff.patch(model)
    ours = run()
    assert not torch.equal(ours, eager)
    assert (ours - eager).norm() <= 1e-5 * eager.norm()
    assert fastdiff.report(model).coverage == 1.0
    fastdiff.unpatch(model)
    assert torch.equal(run(), eager)


@pytest.mark.parametrize("entry", PLAIN, ids=lambda entry: entry.cls)
def test_nothing_to_fuse(entry: Plain) -> None:
    """Convolutions and ReLUs: the report says so, the result is bitwise eager's."""
    model = randomized(model_class(entry.cls)(**entry.tiny))
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run() -> Any:
        with torch.no_grad():
            found = model(x)
        return found.sample if hasattr(found, "sample") else found[-1]

    eager = run()
    fastdiff.patch(model)
    assert torch.equal(run(), eager)
    (row,) = fastdiff.report(model).rows
    assert (row.backend, row.reason) == ("stock", "no block that fastdiff knows")
    with pytest.raises(ValueError, match=r"no synthetic inputs for .*: pass the arguments of a forward"):
        fastdiff.report(model, launches=True)
    fastdiff.unpatch(model)

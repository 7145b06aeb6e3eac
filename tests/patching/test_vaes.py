"""VAEs in tiles and slices, and those with nothing to fuse or with noise of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import ConsistencyDecoderVAE
from models import randomized, vae
from published import PLAIN, Plain
from torch import Tensor
from zoo import model_class

import fastdiff


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
    assert not torch.equal(ours, eager)
    assert (ours - reference).norm() <= 1.05 * (eager - reference).norm()
    assert fastdiff.report(model).coverage == 1.0


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

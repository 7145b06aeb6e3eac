"""Models without a family of their own: their known blocks are patched, the report names the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, PriorTransformer, StableCascadeUNet
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from models import ddpm_unet, flat, output, randomized
from torch import Tensor, nn
from zoo import ZOO

import fastdiff
from fastdiff._launches import count_launches


class ResearchModel(ModelMixin, ConfigMixin):
    """Somebody's model, of blocks that Diffusers has, and a norm of its own."""

    @register_to_config
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.block = ResnetBlock2D(in_channels=channels, out_channels=channels, temb_channels=16, groups=8)
        self.attention = Attention(channels, heads=2, dim_head=16, norm_num_groups=8, residual_connection=True)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, sample: Tensor, temb: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.norm(self.attention(self.block(sample, temb))),)


class ResearchPipeline(DiffusionPipeline):
    """A U-Net, and something else."""

    def __init__(self, unet: Any, extra: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, extra=extra)


def _prior() -> tuple[Any, dict[str, Any]]:
    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=16, num_layers=2, num_embeddings=8
    )
    return model, {
        "hidden_states": torch.randn(2, 16), "timestep": torch.tensor([5, 5]), "proj_embedding": torch.randn(2, 16),
        "encoder_hidden_states": torch.randn(2, 8, 16),
    }  # fmt: skip


def _cascade() -> tuple[Any, dict[str, Any]]:
    model = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=1, conditioning_dim=32,
        block_out_channels=(32, 64), num_attention_heads=(2, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_pooled_in_channels=16, clip_seq=4, kernel_size=3, self_attn=True, switch_level=(False,),
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 8, 8), "timestep_ratio": torch.tensor([0.5, 0.5]),
        "clip_text_pooled": torch.randn(2, 1, 16),
    }  # fmt: skip


def _research() -> tuple[Any, dict[str, Any]]:
    return ResearchModel(), {"sample": torch.randn(2, 32, 8, 8), "temb": torch.randn(2, 16)}


CASES = {
    "research": (_research, {"ResnetBlock2D": 1, "Attention": 1}, {"GroupNorm"}),
    "prior": (_prior, {"Attention": 2, "BasicTransformerBlock": 2}, {"GELU"}),
    "Stable Cascade": (_cascade, {"Attention": 4}, set()),
}


@pytest.mark.parametrize("name", CASES)
def test_known_blocks_are_patched(name: str) -> None:
    build, sites, left = CASES[name]
    torch.manual_seed(0)
    model, inputs = build()
    model = randomized(model)
    eager = output(model, inputs)
    with fastdiff.patched(model):
        ours = output(model, inputs)
        report = fastdiff.report(model, launches=inputs)
        assert Counter(row.cls for row in report.rows if row.fused) == sites
        assert {row.cls for row in report.rows if not row.fused} == left
        assert all(row.reason for row in report.rows if not row.fused)
        assert report.launches[0].after < report.launches[0].before
        assert fastdiff.verify(model, **inputs).ok
        with pytest.raises(ValueError, match="pass the arguments of a forward"):
            fastdiff.verify(model)
    assert not torch.equal(ours, eager)
    assert (ours - eager).norm() <= 1e-5 * eager.norm()
    assert torch.equal(output(model, inputs), eager)


def test_component_without_family_in_a_pipeline() -> None:
    """It is patched with the pipeline, and skipped where synthetic inputs are wanted."""
    pipe = fastdiff.patch(ResearchPipeline(ddpm_unet(), ResearchModel().eval()))
    assert {row.path for row in fastdiff.report(pipe).rows} >= {"extra.block", "extra.attention", "extra.norm"}
    assert fastdiff.verify(pipe).ok
    fastdiff.unpatch(pipe)
    assert not any("forward" in vars(module) for module in pipe.extra.modules())


def test_temporal_blocks_share_the_activation_of_the_time_embedding() -> None:
    """Their time embedding is a view per frame of the one that the spatial blocks get."""
    case = next(entry.case for entry in ZOO if entry.case.name == "Stable Video Diffusion")
    model, inputs = case.build(), case.inputs(torch.Generator().manual_seed(0), torch.float32)
    counts = {}
    for name in ("eager", "patched"):
        if name == "patched":
            fastdiff.patch(model)
        counts[name] = count_launches(lambda: flat(model(**inputs, return_dict=False)))["silu"]
    blocks = case.sites["ResnetBlock2D"] + case.sites["TemporalResnetBlock"]
    norms = 2 * blocks + 1
    # One is left for the spatial blocks and one for the temporal, whose time embedding is a view of another tensor.
    assert counts["eager"] - counts["patched"] == norms + blocks - 2

"""Diffusers' caches, which skip some of a step's work, on every family: before patching and after, against stock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CacheMixin,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layer_skip,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from torch import Tensor
from transformer_case import Transformer, outputs
from transformer_models import OWN_BLOCKS, TRANSFORMERS

import fastdiff

pytestmark = pytest.mark.kernel

#: The first model of each class.
CLASSES = list({case.cls: case for case in reversed(OWN_BLOCKS)}.values())[::-1]
#: What the caches take for the time of each step; FasterCache starts with one out of its range.
TIMES = [900, 500, 400]
_BLOCKS = r"(.*\.)?\w*(blocks|layers|refiner|block)\.\d+\."


class _Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


def _first_block(model: Any, clock: _Clock) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e9))


def _pyramid(model: Any, clock: _Clock) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=(_BLOCKS,),
        current_timestep_callback=clock,
    )
    apply_pyramid_attention_broadcast(model, config)


def _faster(model: Any, clock: _Clock) -> None:
    config = FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 681),
        spatial_attention_block_identifiers=(_BLOCKS,),
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
        current_timestep_callback=clock,
    )
    apply_faster_cache(model, config)


def _taylor_seer(model: Any, clock: _Clock) -> None:
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[_BLOCKS + r"(block\.)?((self_)?attn\d?|attention)"],
    )
    apply_taylorseer_cache(model, config)


def _mag(model: Any, clock: _Clock) -> None:
    config = MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4, retention_ratio=0.0, threshold=1e9)
    apply_mag_cache(model, config)


def _layer_skip(model: Any, clock: _Clock) -> None:
    apply_layer_skip(model, LayerSkipConfig(indices=[1]))


CACHES: dict[str, Callable[[Any, _Clock], None]] = {
    "FirstBlockCache": _first_block,
    "PyramidAttentionBroadcast": _pyramid,
    "FasterCache": _faster,
    "TaylorSeer": _taylor_seer,
    "MagCache": _mag,
    "layer skip": _layer_skip,
}
_BY_BLOCK = ("FirstBlockCache", "MagCache", "layer skip")
_UNREGISTERED = (
    "Chroma", "AuraFlow", "Lumina2", "Sana", "Stable Audio", "HunyuanDiT", "HunyuanDiT ControlNet", "ChronoEdit",
    "SkyReels V2", "HunyuanVideo 1.5", "LTX-2", "Sana ControlNet", "Cosmos", "LongCat-Image", "Ovis-Image", "ConsisID",
    "CogView3 Plus", "Bria", "Bria Fibo", "HiDream-I1", "OmniGen", "Allegro",
)  # fmt: skip
#: (model, cache) -> why Diffusers' newest version fails without patching, or skips nothing.
STOCK_FAILS = {
    **{(name, cache): "its blocks are in no registry" for name in _UNREGISTERED for cache in _BY_BLOCK},
    **{("Z-Image", cache): "its blocks have no argument named hidden_states" for cache in _BY_BLOCK},
    **{("Latte", cache): "spatial and temporal blocks differ in shape" for cache in ("FirstBlockCache", "MagCache")},
    **{
        (name, "FasterCache"): "it looks for attention under other names"
        for name in ("Z-Image", "Lumina2", "HiDream-I1", "OmniGen")
    },
    ("OmniGen", "PyramidAttentionBroadcast"): "its self-attention counts as cross-attention",
    **{
        (name, "layer skip"): "a skipped block's two results are exchanged"
        for name in ("Flux dev", "Flux ControlNet", "SD3", "SD3 ControlNet", "Qwen-Image", "Qwen-Image ControlNet")
    },
    ("SD3", "FirstBlockCache"): "its last block returns no text",
    ("Flux2", "FirstBlockCache"): "its two kinds of blocks return different things",
}


def _run(model: Any, calls: list[dict[str, Any]], clock: _Clock) -> Tensor:
    results = []
    with CacheMixin.cache_context(model, "cond"):
        for clock.now, inputs in zip(TIMES, calls, strict=True):
            results.append(outputs(model, inputs))
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
    return torch.stack(results)


@pytest.mark.parametrize("case", CLASSES, ids=lambda c: c.name)
@pytest.mark.parametrize("cache", CACHES)
def test_caches(case: Transformer, cache: str) -> None:
    """Three steps, in one of which the cache skips work."""
    stock, apply, clock = case.build(), CACHES[cache], _Clock()
    models = {order: copy.deepcopy(stock) for order in ("cache, patch", "patch, cache")}
    calls = [case.inputs(seed, model=stock) for seed in range(3)]
    plain = [outputs(stock, inputs) for inputs in calls]
    reason, newest = STOCK_FAILS.get((case.name, cache)), diffusers.__version__ >= "0.42"
    try:
        apply(stock, clock)
        expected = _run(stock, calls, clock)
        changed = [(e - p).norm() > 1e-3 * p.norm() for e, p in zip(expected, plain, strict=True)]
        assert any(changed), "nothing was skipped"
    except Exception as error:
        if newest and reason is None:
            raise
        pytest.skip(f"stock {case.cls.__name__} fails with this cache: {reason or error}")
    assert not newest or reason is None, "stock works by now"
    for order, model in models.items():
        for step in order.split(", "):
            fastdiff.patch(model) if step == "patch" else apply(model, clock)
        ours = _run(model, calls, clock)
        assert (ours - expected).norm() <= 1e-4 * expected.norm(), order
        assert fastdiff.report(model).fused, order
        fastdiff.unpatch(model)
        assert torch.equal(_run(model, calls, clock), expected), order


def test_skipped_attention_scores() -> None:
    """Diffusers replaces scaled_dot_product_attention for a while; the fused attention steps aside."""
    case = next(c for c in TRANSFORMERS if c.name == "Qwen-Image")
    stock = case.build()
    inputs = case.inputs(0, model=stock)
    plain = outputs(stock, inputs)
    model = fastdiff.patch(copy.deepcopy(stock))
    config = LayerSkipConfig(indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    for m in (stock, model):
        apply_layer_skip(m, copy.deepcopy(config))
    expected = outputs(stock, inputs)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    assert (outputs(model, inputs) - expected).norm() <= 1e-4 * expected.norm()

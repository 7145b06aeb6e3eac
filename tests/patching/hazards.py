"""What Diffusers, PEFT, accelerate and users do to a model, as one table: how it is done, undone, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import accelerate
import actions
import torch
from diffusers import (
    CacheMixin,
    DiTTransformer2DModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_processor import SlicedAttnProcessor
from models import CASES, Case, output
from torch import Tensor, nn

SD, SDXL, DIT = CASES[0], CASES[1], CASES[-1]


@dataclass(frozen=True)
class Hazard:
    """One thing that is done to a model.

    Attributes:
        apply: does it.
        undo: undoes it; ``None`` where that is impossible.
        case: the model it is done to.
        changes: whether the output differs then.
        exact: whether the stock model's output is bitwise the same at every call, and the old one after ``undo``.
        eager: class of a place -> pattern of the reason why it is not fused then; all other places are fused.
        stays: classes whose places are fused again only after patching once more, if this came before patching.
        calls: forwards in a row, for what counts them.
    """

    apply: Callable[[Any], Any]
    undo: Callable[[Any], Any] | None
    case: Case = SD
    changes: bool = False
    exact: bool = True
    eager: Mapping[str, str] = field(default_factory=dict)
    stays: tuple[str, ...] = ()
    calls: int = 1

    def run(self, model: nn.Module) -> Tensor:
        """The outputs of some forwards, with timesteps going down from 900."""
        generator, outputs = torch.Generator().manual_seed(0), []
        cached = isinstance(model, CacheMixin) and model.is_cache_enabled
        context = model.cache_context("run") if cached else contextlib.nullcontext()
        with context:
            for i in range(self.calls):
                model.__dict__["_timestep"] = 900 - 150 * i
                outputs.append(output(model, self.case.inputs(generator, torch.float32)))
        return torch.stack(outputs)


class CachedDiT(DiTTransformer2DModel, CacheMixin):
    """A transformer for which Diffusers' caches can be enabled."""


def _cached_dit() -> CachedDiT:
    model = DIT.build()
    model.__class__ = CachedDiT
    return model


CACHED_DIT = dataclasses.replace(DIT, build=_cached_dit)


def _processor(name: str) -> dict[str, str]:
    return {"Attention": f"^its processor is {name}$"}


NEEDS_NORMS = {
    "ResnetBlock2D": "^a norm has hooks$",
    "GroupNorm": "hooks$",
    "Transformer2DModel": "^a norm has hooks$",
    "BasicTransformerBlock": "^a norm has hooks$",
}

HAZARDS: dict[str, Hazard] = {
    "LoRA": Hazard(actions.add_lora, lambda m: m.delete_adapters("default"), changes=True),
    "LoRA, SDXL": Hazard(actions.add_lora, lambda m: m.delete_adapters("default"), SDXL, changes=True),
    "LoRA scaled": Hazard(actions.add_scaled_lora, lambda m: m.delete_adapters("default"), changes=True),
    "two LoRAs": Hazard(actions.add_two_loras, lambda m: m.delete_adapters(["default", "other"]), changes=True),
    "LoRA disabled": Hazard(actions.add_disabled_lora, actions.enable_and_delete_lora),
    "LoRA fused": Hazard(actions.add_fused_lora, actions.unfuse_and_delete_lora, changes=True, exact=False),
    "DoRA": Hazard(
        functools.partial(actions.add_lora, use_dora=True), lambda m: m.delete_adapters("default"), changes=True
    ),
    "Diffusers hook": Hazard(
        functools.partial(actions.register_hook, hook=actions.Double), actions.remove_hook, changes=True
    ),
    "Diffusers hook with a forward": Hazard(
        functools.partial(actions.register_hook, hook=actions.Replacing), actions.remove_hook, changes=True
    ),
    "accelerate hook": Hazard(
        lambda m: accelerate.hooks.add_hook_to_module(m.mid_block.resnets[1], accelerate.hooks.ModelHook()),
        lambda m: accelerate.hooks.remove_hook_from_module(m.mid_block.resnets[1]),
    ),
    "model offload": Hazard(
        lambda m: accelerate.cpu_offload_with_hook(m, execution_device="cpu"),
        accelerate.hooks.remove_hook_from_module,
    ),
    "model offload, DiT": Hazard(
        lambda m: accelerate.cpu_offload_with_hook(m, execution_device="cpu"),
        accelerate.hooks.remove_hook_from_module, DIT,
    ),
    "sequential offload": Hazard(
        actions.offload_layers, accelerate.hooks.remove_hook_from_submodules, eager=NEEDS_NORMS
    ),
    "device_map": Hazard(actions.dispatch, accelerate.hooks.remove_hook_from_submodules, eager=NEEDS_NORMS),
    "device_map, blocks brought as a whole": Hazard(
        actions.dispatch_blocks, accelerate.hooks.remove_hook_from_submodules
    ),
    "group offload, leafs": Hazard(
        functools.partial(actions.offload_groups, level="leaf_level"), actions.remove_all_hooks, eager=NEEDS_NORMS
    ),
    "group offload, blocks": Hazard(
        functools.partial(actions.offload_groups, level="block_level"), actions.remove_all_hooks
    ),
    "layerwise casting": Hazard(actions.cast_layers, None, changes=True),
    "weights in bytes": Hazard(lambda m: actions.replace_linears(m, actions.pack), None, SDXL, changes=True),
    "weights in bytes, DiT": Hazard(lambda m: actions.replace_linears(m, actions.pack), None, DIT, changes=True),
    "GGUF": Hazard(lambda m: actions.replace_linears(m, actions.to_gguf), None, SDXL, changes=True),
    "torchao": Hazard(actions.to_torchao, None, SDXL, changes=True),
    "torchao, DiT": Hazard(actions.to_torchao, None, DIT, changes=True),
    "bitsandbytes, int8": Hazard(functools.partial(actions.to_bitsandbytes, bits=8), None, SDXL, changes=True),
    "bitsandbytes, NF4": Hazard(functools.partial(actions.to_bitsandbytes, bits=4), None, SDXL, changes=True),
    "bitsandbytes, NF4, DiT": Hazard(functools.partial(actions.to_bitsandbytes, bits=4), None, DIT, changes=True),
    "fused projections": Hazard(
        lambda m: m.fuse_qkv_projections(), lambda m: m.unfuse_qkv_projections(),
        eager=_processor("FusedAttnProcessor2_0"), exact=False,
    ),
    "attention slicing": Hazard(
        lambda m: m.set_attention_slice(1), lambda m: m.set_attention_slice(None),
        eager=_processor("SlicedAttnProcessor"), exact=False,
    ),
    "default processors": Hazard(
        lambda m: m.set_default_attn_processor(), actions.set_default_processors,
        eager=_processor("AttnProcessor"), exact=False,
    ),
    "sliced processors": Hazard(
        actions.set_processors(SlicedAttnProcessor(1)), actions.set_default_processors,
        eager=_processor("SlicedAttnProcessor"), exact=False,
    ),
    "xformers-like processors": Hazard(
        actions.set_processors(actions.MemoryEfficientProcessor()), actions.set_default_processors,
        eager=_processor("MemoryEfficientProcessor"), exact=False,
    ),
    "a user's processors": Hazard(
        actions.set_processors(actions.OwnProcessor()), actions.set_default_processors,
        eager=_processor("OwnProcessor"), changes=True, exact=False,
    ),
    "attention scores skipped, DiT": Hazard(
        actions.skip_scores, actions.remove_all_hooks, DIT, changes=True,
        eager={"Attention": "^a AttentionScoreSkipFunctionMode is active$"},
    ),
    "FreeU": Hazard(actions.enable_freeu, lambda m: m.disable_freeu(), changes=True),
    "wrapped forwards": Hazard(
        actions.wrap_forwards, actions.unwrap_forwards, eager={"ResnetBlock2D": "replaced"}, stays=("ResnetBlock2D",),
    ),
    "blocks skipped at every second step": Hazard(
        actions.skip_every_second, actions.unwrap_forwards, changes=True, calls=4
    ),
    "first block cache": Hazard(
        lambda m: m.enable_cache(FirstBlockCacheConfig(threshold=10.0)), lambda m: m.disable_cache(),
        CACHED_DIT, changes=True, exact=False, calls=3,
    ),
    "pyramid attention broadcast": Hazard(
        lambda m: m.enable_cache(PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: m.__dict__["_timestep"],
        )),
        lambda m: m.disable_cache(), CACHED_DIT, changes=True, exact=False, calls=5,
    ),
    "FasterCache": Hazard(
        lambda m: m.enable_cache(FasterCacheConfig(
            current_timestep_callback=lambda: m.__dict__["_timestep"], attention_weight_callback=lambda _: 0.5,
            is_guidance_distilled=True, tensor_format="BCHW",
        )),
        lambda m: m.disable_cache(), CACHED_DIT, changes=True, exact=False, calls=5,
    ),
}  # fmt: skip

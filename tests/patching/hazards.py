"""What Diffusers, PEFT, accelerate and users do to a model, as one table: how it is done, undone, and what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    CacheMixin,
    DiTTransformer2DModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    ModelHook,
    apply_group_offloading,
    apply_layer_skip,
    apply_layerwise_casting,
)
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from models import CASES, Case, output
from peft import LoraConfig
from torch import Tensor, nn

SD, SDXL, DIT = CASES[0], CASES[1], CASES[-1]
CPU = torch.device("cpu")


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


LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]


def add_lora(model: Any, name: str = "default", **options: Any) -> None:
    """An adapter with a B that is not zero, on linear layers and convolutions."""
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "target_modules": LINEARS + CONVOLUTIONS} | options
    model.add_adapter(LoraConfig(init_lora_weights=False, **options), adapter_name=name)


def _scaled(model: Any) -> None:
    add_lora(model)
    model.set_adapters(["default"], weights=[0.5])


def _two(model: Any) -> None:
    add_lora(model)
    add_lora(model, "other", r=3, target_modules=["to_q", "conv1"])
    model.set_adapters(["default", "other"], weights=[0.7, 0.4])


def _disabled(model: Any) -> None:
    add_lora(model)
    model.disable_adapters()


def _enabled(model: Any) -> None:
    model.enable_adapters()
    model.delete_adapters("default")


def _fused(model: Any) -> None:
    add_lora(model)
    model.fuse_lora()


def _unfused(model: Any) -> None:
    model.unfuse_lora()
    model.delete_adapters("default")


# hooks


class Double(ModelHook):
    """Doubles the output."""

    calls = 0

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.calls += 1
        return 2 * output


class Replacing(Double):
    """A hook with a forward of its own, as Diffusers' caches have."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.fn_ref.original_forward(*args, **kwargs)


def _register(model: Any, hook: type[Double]) -> None:
    HookRegistry.check_if_exists_or_initialize(model.mid_block.resnets[1]).register_hook(hook(), "double")


def _remove(model: Any) -> None:
    model.mid_block.resnets[1]._diffusers_hook.remove_hook("double")


def remove_all_hooks(model: nn.Module) -> None:
    """Remove the hooks of Diffusers."""
    for module in model.modules():
        registry = vars(module).get("_diffusers_hook")
        for name in [] if registry is None else list(registry.hooks):
            registry.remove_hook(name, recurse=False)


def skip_scores(model: nn.Module, blocks: str = "transformer_blocks") -> None:
    """As PAG does in modular pipelines: self-attention's result are the values, by way of a mode of torch."""
    config = LayerSkipConfig([0, 1, 2], fqn=blocks, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(model, config)


@contextlib.contextmanager
def skip_without_accelerator() -> Iterator[None]:
    """Older versions of Diffusers offload groups from accelerators only."""
    try:
        yield
    except AttributeError:
        if torch.accelerator.current_accelerator() is not None:
            raise
        pytest.skip("group offload of this Diffusers needs an accelerator")


def _group(model: nn.Module, level: str) -> None:
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    with skip_without_accelerator():
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=level, **options)


def _cast(model: nn.Module) -> None:
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=("norm",))


def _sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU, offload_buffers=True)


def _dispatch(model: nn.Module) -> None:
    """As ``device_map`` does: some children's weights wait elsewhere, and come for each call."""
    device_map = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)


def _dispatch_blocks(model: Any) -> None:
    """Whole blocks are brought at once: their weights are there when the block runs."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for block in [*model.down_blocks, *model.up_blocks]:
        add_hook_to_module(block, AlignDevicesHook(CPU, offload=True, place_submodules=True), append=True)


# code of users that wraps forwards


def wrap_forwards(model: Any) -> None:
    """As DeepCache does: every block's forward, and the model's, replaced by a closure around what it was."""
    kept = model.__dict__["_kept"] = {}
    for block in [model, *model.down_blocks, *model.up_blocks, *_resnets(model), *_attentions(model)]:
        kept[block] = original = block.forward

        def forward(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            model.__dict__["_calls"] = model.__dict__.get("_calls", 0) + 1
            return original(*args, **kwargs)

        block.forward = forward


def unwrap_forwards(model: Any) -> None:
    """Sets back what it replaced, as an attribute of the block."""
    assert model.__dict__.pop("_calls", 1) > 0
    for block, original in model.__dict__.pop("_kept").items():
        block.forward = original


def _resnets(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "ResnetBlock2D"]


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Transformer2DModel"]


class OwnProcessor:
    """A user's attention, with arguments and a result of its own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        strength: float = 0.5,
    ) -> Tensor:
        return hidden_states + strength * AttnProcessor2_0()(
            attn, hidden_states, encoder_hidden_states, attention_mask
        )


class MemoryEfficientProcessor(AttnProcessor2_0):
    """Like the one of xformers: a subclass with another kernel, that takes the heads in another layout."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2).contiguous() for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _processors(processor: Any) -> Callable[[Any], None]:
    return lambda model: model.set_attn_processor(processor)


_default_processors = _processors(AttnProcessor2_0())


def _freeu(model: Any) -> None:
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)


# quantized weights


class PackedLinear(nn.Linear):
    """As in bitsandbytes: the weight is one column of bytes, and only the layer's own forward can read it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(input.dtype) * self.scale
        return F.linear(input, weight, self.bias)


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % 32 == 0:
                setattr(module, name, make(child))


def _packed(linear: nn.Linear) -> nn.Module:
    new: Any = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    new.scale = linear.weight.abs().max() / 127
    new.weight = nn.Parameter((linear.weight / new.scale).round().to(torch.int8).view(-1, 1), requires_grad=False)
    new.bias = linear.bias
    return new


def _gguf(linear: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    data = torch.from_numpy(gguf.quantize(linear.weight.numpy(), kind))
    new = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
    new.weight = GGUFParameter(data, quant_type=kind)
    new.bias = linear.bias
    return new


def _torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def _processor(name: str) -> dict[str, str]:
    return {"Attention": f"^its processor is {name}$"}


NEEDS_NORMS = {
    "ResnetBlock2D": "^a norm has hooks$",
    "GroupNorm": "hooks$",
    "Transformer2DModel": "^a norm has hooks$",
}

HAZARDS: dict[str, Hazard] = {
    "LoRA": Hazard(add_lora, lambda m: m.delete_adapters("default"), changes=True),
    "LoRA, SDXL": Hazard(add_lora, lambda m: m.delete_adapters("default"), SDXL, changes=True),
    "LoRA scaled": Hazard(_scaled, lambda m: m.delete_adapters("default"), changes=True),
    "two LoRAs": Hazard(_two, lambda m: m.delete_adapters(["default", "other"]), changes=True),
    "LoRA disabled": Hazard(_disabled, _enabled),
    "LoRA fused": Hazard(_fused, _unfused, changes=True, exact=False),
    "DoRA": Hazard(
        functools.partial(add_lora, use_dora=True), lambda m: m.delete_adapters("default"), changes=True
    ),
    "Diffusers hook": Hazard(functools.partial(_register, hook=Double), _remove, changes=True),
    "Diffusers hook with a forward": Hazard(functools.partial(_register, hook=Replacing), _remove, changes=True),
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
        _sequential, accelerate.hooks.remove_hook_from_submodules, eager=NEEDS_NORMS
    ),
    "device_map": Hazard(_dispatch, accelerate.hooks.remove_hook_from_submodules, eager=NEEDS_NORMS),
    "device_map, blocks brought as a whole": Hazard(
        _dispatch_blocks, accelerate.hooks.remove_hook_from_submodules
    ),
    "group offload, leafs": Hazard(
        functools.partial(_group, level="leaf_level"), remove_all_hooks, eager=NEEDS_NORMS
    ),
    "group offload, blocks": Hazard(functools.partial(_group, level="block_level"), remove_all_hooks),
    "layerwise casting": Hazard(_cast, None, changes=True),
    "weights in bytes": Hazard(lambda m: _replace_linears(m, _packed), None, SDXL, changes=True),
    "weights in bytes, DiT": Hazard(lambda m: _replace_linears(m, _packed), None, DIT, changes=True),
    "GGUF": Hazard(lambda m: _replace_linears(m, _gguf), None, SDXL, changes=True),
    "torchao": Hazard(_torchao, None, SDXL, changes=True),
    "torchao, DiT": Hazard(_torchao, None, DIT, changes=True),
    "fused projections": Hazard(
        lambda m: m.fuse_qkv_projections(), lambda m: m.unfuse_qkv_projections(),
        eager=_processor("FusedAttnProcessor2_0"), exact=False,
    ),
    "attention slicing": Hazard(
        lambda m: m.set_attention_slice(1), lambda m: m.set_attention_slice(None),
        eager=_processor("SlicedAttnProcessor"), exact=False,
    ),
    "default processors": Hazard(
        lambda m: m.set_default_attn_processor(), _default_processors, eager=_processor("AttnProcessor"), exact=False
    ),
    "sliced processors": Hazard(
        _processors(SlicedAttnProcessor(1)), _default_processors, eager=_processor("SlicedAttnProcessor"), exact=False
    ),
    "xformers-like processors": Hazard(
        _processors(MemoryEfficientProcessor()), _default_processors,
        eager=_processor("MemoryEfficientProcessor"), exact=False,
    ),
    "a user's processors": Hazard(
        _processors(OwnProcessor()), _default_processors, eager=_processor("OwnProcessor"), changes=True, exact=False
    ),
    "attention scores skipped, DiT": Hazard(
        skip_scores, remove_all_hooks, DIT, changes=True,
        eager={"Attention": "^a AttentionScoreSkipFunctionMode is active$"},
    ),
    "FreeU": Hazard(_freeu, lambda m: m.disable_freeu(), changes=True),
    "wrapped forwards": Hazard(
        wrap_forwards, unwrap_forwards, eager={"ResnetBlock2D": "replaced"}, stays=("ResnetBlock2D",),
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

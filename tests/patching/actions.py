"""What is done to models by Diffusers, PEFT, accelerate and users: the rows of ``hazards.py`` call it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    ModelHook,
    apply_group_offloading,
    apply_layer_skip,
    apply_layerwise_casting,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn

CPU = torch.device("cpu")
LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]


def add_lora(model: Any, name: str = "default", **options: Any) -> None:
    """An adapter with a B that is not zero, on linear layers and convolutions."""
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "target_modules": LINEARS + CONVOLUTIONS} | options
    model.add_adapter(LoraConfig(init_lora_weights=False, **options), adapter_name=name)


def add_scaled_lora(model: Any) -> None:
    add_lora(model)
    model.set_adapters(["default"], weights=[0.5])


def add_two_loras(model: Any) -> None:
    add_lora(model)
    add_lora(model, "other", r=3, target_modules=["to_q", "conv1"])
    model.set_adapters(["default", "other"], weights=[0.7, 0.4])


def add_disabled_lora(model: Any) -> None:
    add_lora(model)
    model.disable_adapters()


def enable_and_delete_lora(model: Any) -> None:
    model.enable_adapters()
    model.delete_adapters("default")


def add_fused_lora(model: Any) -> None:
    add_lora(model)
    model.fuse_lora()


def unfuse_and_delete_lora(model: Any) -> None:
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


def register_hook(model: Any, hook: type[Double]) -> None:
    HookRegistry.check_if_exists_or_initialize(model.mid_block.resnets[1]).register_hook(hook(), "double")


def remove_hook(model: Any) -> None:
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


def offload_groups(model: nn.Module, level: str) -> None:
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    with skip_without_accelerator():
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=level, **options)


def cast_layers(model: nn.Module) -> None:
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=("norm",))


def offload_layers(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU, offload_buffers=True)


def dispatch(model: nn.Module) -> None:
    """As ``device_map`` does: some children's weights wait elsewhere, and come for each call."""
    device_map = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)


def dispatch_blocks(model: Any) -> None:
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


def skip_every_second(model: Any) -> None:
    """As DeepCache does at a step that computes the outermost blocks only: the inner ones return what they had."""
    kept = model.__dict__["_kept"] = {}
    for block in [model.down_blocks[1], model.mid_block, model.up_blocks[0]]:
        kept[block] = original = block.forward

        def forward(*args: Any, original: Any = original, held: list[Any], **kwargs: Any) -> Any:
            if not held:
                held.append(original(*args, **kwargs))
                return held[0]
            return held.pop()

        block.forward = functools.partial(forward, held=[])


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


def set_processors(processor: Any) -> Callable[[Any], None]:
    return lambda model: model.set_attn_processor(processor)


set_default_processors = set_processors(AttnProcessor2_0())


def enable_freeu(model: Any) -> None:
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)


# quantized weights


class PackedLinear(nn.Linear):
    """As in bitsandbytes: the weight is one column of bytes, and only the layer's own forward can read it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features).to(input.dtype) * self.scale
        return F.linear(input, weight, self.bias)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.in_features % 32 == 0:
                setattr(module, name, make(child))


def pack(linear: nn.Linear) -> nn.Module:
    new: Any = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None)
    new.scale = linear.weight.abs().max() / 127
    new.weight = nn.Parameter((linear.weight / new.scale).round().to(torch.int8).view(-1, 1), requires_grad=False)
    new.bias = linear.bias
    return new


def to_gguf(linear: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    data = torch.from_numpy(gguf.quantize(linear.weight.numpy(), kind))
    new = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32)
    new.weight = GGUFParameter(data, quant_type=kind)
    new.bias = linear.bias
    return new


def to_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def to_bitsandbytes(model: nn.Module, bits: int) -> None:
    """Its layers quantize their weights when they are moved to a device, a CPU too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layers = bitsandbytes.nn

    def make(linear: nn.Linear) -> nn.Module:
        size = linear.in_features, linear.out_features, linear.bias is not None
        if bits == 8:
            new = layers.Linear8bitLt(*size, has_fp16_weights=False)
            new.weight = layers.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = layers.Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = layers.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to("cpu")

    replace_linears(model, make)

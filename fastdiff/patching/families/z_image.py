"""``ZImageTransformer2DModel``: Z-Image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.patching.blocks.adaln import MODULATED, block_row, guarded, sandwich
from fastdiff.patching.blocks.feed_forward import silu_feed_forward_row
from fastdiff.patching.blocks.joint_attention import LEGACY, AttentionRow, attention_block, complex_table
from fastdiff.patching.blocks.token_norms import modulated
from fastdiff.patching.families import Family
from fastdiff.patching.families._example import Inputs

_FILE = "diffusers.models.transformers.transformer_z_image"


@guarded("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
def z_image_block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """Replaces ``ZImageTransformerBlock.forward``."""
    site = self._fastdiff_site
    if noise_mask is not None:
        return site.stock(
            "noisy and clean tokens have modulations of their own", self, x, attn_mask, freqs_cis, adaln_input,
            noise_mask, adaln_noisy, adaln_clean,
        )  # fmt: skip
    modulation = (None,) * 4
    if self.modulation:
        modulation = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
    scale, *rest = modulation
    h = modulated(site, "norm before attention", self.attention_norm1, x, scale)
    h = self.attention(h, attention_mask=attn_mask, freqs_cis=freqs_cis)
    gate, scale, gate_mlp = rest
    norms = self.attention_norm2, self.ffn_norm1, self.ffn_norm2
    return sandwich(site, x, h, norms, self.feed_forward, gate, scale, gate_mlp)


@guarded("norm_final")
def final_layer(
    self: Any,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Tensor:
    """Replaces ``FinalLayer.forward``."""
    site = self._fastdiff_site
    if noise_mask is not None or c is None:
        reason = "noisy and clean tokens have modulations of their own"
        return site.stock(reason, self, x, c, noise_mask, c_noisy, c_clean)
    return self.linear(modulated(site, "norm", self.norm_final, x, self.adaLN_modulation(c)))


def example(model: Any) -> dict[str, Any]:
    """One small latent and 7 text tokens, as the lists that the model takes."""
    config, inputs = model.config, Inputs(model)
    return {
        "x": [inputs.noise(config.in_channels, 1, 8, 12)],
        "t": inputs.timestep(),
        "cap_feats": [inputs.noise(7, config.cap_feat_dim)],
    }


Z_IMAGE = Family(
    model=f"{_FILE}:ZImageTransformer2DModel",
    blocks=(
        block_row(f"{_FILE}:ZImageTransformerBlock", f"{MODULATED}; gate + residual + norm", z_image_block),
        block_row(f"{_FILE}:FinalLayer", MODULATED, final_layer),
        attention_block(
            LEGACY,
            AttentionRow(
                processor=f"{_FILE}:ZSingleStreamAttnProcessor", rope="freqs_cis", tables=complex_table, sources=()
            ),
        ),
        silu_feed_forward_row(f"{_FILE}:FeedForward", "w1", "w3", "w2", "_forward_silu_gating"),
    ),
    example=example,
)  # fmt: skip

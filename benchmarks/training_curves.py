"""The demo's training, a short piece of it, stock and patched: loss curves overlaid in docs/training-curves.png.

    python benchmarks/training_curves.py

Both runs start from the same weights and draw the same batches, in fp32 (under autocast patched layers run eager). The
shipped VAE gives the latents. What the patched run's layers were served by is printed: a run without kernels of its
own in forward and backward would show nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL
from train_demo import build_pipeline, digits, train_unet

import fastdiff
from fastdiff.demo import MODEL_DIR

PLOT = Path(__file__).parent.parent / "docs" / "training-curves.png"


def losses(args: argparse.Namespace, *, patch: bool) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(args.seed)
    images, labels, _, _ = digits()
    pipe = build_pipeline()
    pipe.register_modules(vae=AutoencoderKL.from_pretrained(MODEL_DIR, subfolder="vae"))
    if patch:
        fastdiff.patch(pipe.unet)
        seen = _watch(pipe.unet)
    found = train_unet(pipe, images, labels, args)
    if patch:
        print("served with gradients:", ", ".join(sorted(seen)))
        assert any("cpu" in entry for entry in seen), "no kernel had a part in the training"
    return found


def _watch(unet: torch.nn.Module) -> set[str]:
    """What served the sites during training, filled at every forward."""
    seen: set[str] = set()

    def note(*_: object) -> None:
        if torch.is_grad_enabled():
            for row in fastdiff.report(unet).rows:
                seen.update(f"{row.cls} {slot}: {backend}" for slot, backend in row.served_by.items())

    unet.register_forward_hook(note)
    return seen


def plot(stock: list[float], patched: list[float], path: Path) -> None:
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained")
    above.plot(stock, label="stock Diffusers", linewidth=3, color="0.7")
    above.plot(patched, label="fastdiff.patch", linewidth=1, color="C0")
    above.set(ylabel="loss", title="Training the demo's U-Net and text encoder, fp32", yscale="log")
    above.legend()
    below.semilogy([max(abs(a / b - 1), 1e-9) for a, b in zip(patched, stock, strict=True)], color="C3")
    below.set(xlabel="step", ylabel="relative difference")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unet-steps", type=int, default=120, help="(default: %(default)s)")
    parser.add_argument("--unet-batch", type=int, default=32)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=PLOT)
    args = parser.parse_args()
    args.precision = "fp32"
    stock, patched = (losses(args, patch=patch) for patch in (False, True))
    worst = max(abs(a / b - 1) for a, b in zip(patched, stock, strict=True))
    print(f"last losses: stock {stock[-1]:.6f}, patched {patched[-1]:.6f}; largest relative difference {worst:.2e}")
    plot(stock, patched, args.out)


if __name__ == "__main__":
    main()

"""Train and evaluate the demo pipeline on scikit-learn's handwritten digits.

    python benchmarks/train_demo.py                         # train, save, evaluate
    python benchmarks/train_demo.py --eval-only             # evaluate what --out holds

The 8x8 digits are upsampled to 32x32 and become a text-to-image data set with the ten prompts of
``fastdiff.demo.PROMPTS``. The VAE is trained first, then U-Net and text encoder together, with 10% of the
prompts dropped for classifier-free guidance. The U-Net is built as in Stable Diffusion 1.x and predicts v as
in 2.x. Samples are judged by an SVM trained on the real digits. The held-out fifth of the digits is seen by
neither.
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastdiff.demo import GUIDANCE_SCALE, MODEL_DIR, NUM_INFERENCE_STEPS, PROMPTS

EVAL_SEED = 10_000  # sample i is drawn from seed EVAL_SEED + i; training uses --seed only
KL_WEIGHT = 1e-4
EMA_DECAY = 0.995

console = Console()


# Data and judge


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train and held-out digits: images (N, 1, 32, 32) in [0, 1], labels (N,)."""
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(small, size=32, mode="bicubic").clamp(0, 1)
    labels = torch.from_numpy(data.target).long()
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def features(images: torch.Tensor) -> np.ndarray:
    """What the SVM reads: 8x8 block means, (N, 64), of images (N, 1, 32, 32) in [0, 1]."""
    return F.avg_pool2d(images, 4).flatten(1).numpy()


def nearest(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over images of the distance, in the SVM's features, to the nearest of reference."""
    distances = torch.cdist(torch.from_numpy(features(images)), torch.from_numpy(features(reference)))
    return distances.amin(1).mean().item()


# Models


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes, as in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(len(others))]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the prompts one token; other text becomes bytes."""
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(" ".join(PROMPTS).split()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        # Apply the merges learned so far, in their order, exactly as the tokenizer will; then close the gaps.
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda p: merges.index(p) if p in merges else len(merges))
            if pair not in merges:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
            i = pairs.index(pair)
            pieces[i : i + 2] = [pair[0] + pair[1]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def build_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x with two resolutions instead of four, untrained."""
    tokenizer = build_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=64,
        attention_head_dim=2,  # in SD 1.x configs this is the number of heads
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
    )
    scheduler = DPMSolverMultistepScheduler.from_config(
        {
            "beta_start": 0.00085,
            # A digit is so redundant at 16x16x4 that SD's 0.012 leaves it readable at the noisiest step, and
            # the U-Net learns to read it there instead of the prompt. At more noise, v is the stable target.
            "beta_end": 0.02,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "steps_offset": 1,
            # Not used by this scheduler, but handed on by DDIMScheduler.from_config(pipe.scheduler.config).
            "clip_sample": False,
            "set_alpha_to_one": False,
        }
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


# Training


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, args: argparse.Namespace) -> None:
    """Fit the VAE to images (N, 1, 32, 32) in [0, 1] and set its scaling factor to unit-variance latents."""
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.vae_lr, args.vae_steps, pct_start=0.05)
    pixels = (images * 2 - 1).repeat(1, 3, 1, 1)
    vae.train().to(memory_format=torch.channels_last)
    with progress() as bar:
        task = bar.add_task("VAE  ", total=args.vae_steps, loss=float("nan"))
        for step in range(args.vae_steps):
            batch = pixels[torch.randint(len(pixels), (args.vae_batch,))]
            with autocast(args):
                posterior = vae.encode(batch).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            reconstruction = F.mse_loss(decoded.float(), batch)
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            update(reconstruction + KL_WEIGHT * kl, vae, optimizer, schedule)
            report(bar, task, step, args.vae_steps, reconstruction)
    vae.eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=1 / encode(vae, images).std().item())


def train_unet(
    pipe: StableDiffusionPipeline, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace
) -> list[float]:
    """Fit U-Net and text encoder to images (N, 1, 32, 32) in [0, 1] with labels (N,); leaves EMA weights.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(args.seed)
    unet, text_encoder = pipe.unet, pipe.text_encoder
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    latents = encode(pipe.vae, images) * pipe.vae.config.scaling_factor
    # The last prompt is the empty one of classifier-free guidance.
    prompts = pipe.tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=EMA_DECAY)
    optimizer = torch.optim.AdamW(parameters, lr=args.unet_lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.unet_lr, args.unet_steps, pct_start=0.05)
    both = torch.nn.ModuleList([unet, text_encoder]).train()
    unet.to(memory_format=torch.channels_last)
    losses: list[float] = []
    with progress() as bar:
        task = bar.add_task("U-Net", total=args.unet_steps, loss=float("nan"))
        for step in range(args.unet_steps):
            index = torch.randint(len(latents), (args.unet_batch,))
            clean, noise = latents[index], torch.randn(args.unet_batch, *latents.shape[1:])
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (args.unet_batch,))
            noisy = scheduler.add_noise(clean, noise, timesteps)
            chosen = labels[index].where(torch.rand(args.unet_batch) >= 0.1, len(PROMPTS))
            with autocast(args):
                text = text_encoder(prompts).last_hidden_state[chosen]
                predicted = unet(noisy, timesteps, text).sample
            loss = F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timesteps))
            update(loss, both, optimizer, schedule)
            ema.step(parameters)
            losses.append(loss.item())
            report(bar, task, step, args.unet_steps, loss)
    ema.copy_to(parameters)
    both.eval()
    unet.to(memory_format=torch.contiguous_format)
    return losses


def autocast(args: argparse.Namespace) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else nullcontext()


def update(
    loss: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def report(bar: Progress, task: TaskID, step: int, steps: int, loss: torch.Tensor) -> None:
    bar.update(task, advance=1, loss=loss.item())
    if not console.is_terminal and (step % 50 == 0 or step == steps - 1):
        print(f"{bar.tasks[task].description} {step + 1}/{steps} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean latents (N, 4, 16, 16), not scaled, of images (N, 1, 32, 32) in [0, 1]."""
    pixels = (images * 2 - 1).repeat(1, 3, 1, 1)
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pixels.split(100)])


# Saving and evaluation


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write fp16 files that ``from_pretrained`` loads as fp32; the pipeline is rounded to fp16 on the way."""
    pipe.to(torch.float16).save_pretrained(folder)
    # The hub's layout, which transformers 4 and 5 both read: 5 itself drops this prefix when it saves, and
    # then 4 finds no weights.
    state = pipe.text_encoder.state_dict()
    weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    # transformers reads a missing torch_dtype as the one of this configuration; Diffusers as fp32.
    pipe.to(torch.float32)
    pipe.text_encoder.config.dtype = torch.float32
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    # transformers 5 writes tokenizer.json only, the slow tokenizer of 4 reads vocab.json and merges.txt.
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def backends(pipe: StableDiffusionPipeline) -> dict[str, int]:
    """How many patched places each backend served when the samples were drawn; eager means stock arithmetic."""
    import fastdiff

    return fastdiff.report(pipe).backends


def evaluate(pipe: StableDiffusionPipeline, args: argparse.Namespace) -> dict:
    """Draw ``--eval-samples`` pictures, let the SVM read them, and return what evaluation.json holds."""
    train_images, train_labels, test_images, test_labels = digits()
    svm = SVC(gamma="scale", C=10).fit(features(train_images), train_labels)
    with torch.no_grad():
        decoded = pipe.vae.decode(encode(pipe.vae, test_images)).sample
    reconstruction = (decoded.mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1)

    networks = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    wanted = np.arange(args.eval_samples) % 10
    pictures = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, args.eval_samples, 50):
        batch = range(start, min(start + 50, args.eval_samples))
        out = pipe(
            [PROMPTS[wanted[i]] for i in batch],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(EVAL_SEED + i) for i in batch],
            output_type="pt",
        )
        pictures.append(out.images.mean(1, keepdim=True))
    images = torch.cat(pictures)
    correct = svm.predict(features(images)) == wanted
    rows = images[: args.eval_samples // 10 * 10].reshape(-1, 10, 32, 32)
    grid = rows.transpose(1, 2).reshape(-1, 320)  # one column per prompt
    Image.fromarray((grid * 255).round().byte().numpy()).save(args.grid)
    return {
        "accuracy": float(correct.mean()),
        "accuracy_per_digit": {PROMPTS[d]: float(correct[wanted == d].mean()) for d in range(10)},
        "samples": args.eval_samples,
        "seeds": [EVAL_SEED, EVAL_SEED + args.eval_samples - 1],
        "scheduler": type(pipe.scheduler).__name__,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "svm_accuracy_held_out_digits": float(svm.score(features(test_images), test_labels)),
        "svm_accuracy_vae_reconstructions": float(svm.score(features(reconstruction), test_labels)),
        "vae_rms_error_held_out_digits": F.mse_loss(reconstruction, test_images).sqrt().item(),
        # Samples much nearer to the training digits than held-out ones are would be copies.
        "mean_distance_to_nearest_training_digit": {
            "samples": nearest(images, train_images),
            "held_out_digits": nearest(test_images, train_images),
        },
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()},
        "places_served_by": backends(pipe) if args.patch else {},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder of the pipeline (%(default)s)")
    parser.add_argument("--grid", type=Path, default=Path("demo_samples.png"), help="picture of the samples")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the pipeline in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast")
    parser.add_argument("--no-patch", dest="patch", action="store_false", help="run stock Diffusers")
    parser.add_argument("--vae", type=Path, help="folder of a trained VAE to use")
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--unet-steps", type=int, default=1500)
    parser.add_argument("--unet-batch", type=int, default=32)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--eval-samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=NUM_INFERENCE_STEPS, help="of the evaluation")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels, _, _ = digits()

    pipe = StableDiffusionPipeline.from_pretrained(args.out) if args.eval_only else build_pipeline()
    if args.vae:
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(args.vae))
    if args.patch:
        import fastdiff

        fastdiff.patch(pipe)
    if not args.eval_only:
        if args.vae is None:
            train_vae(pipe.vae, images, args)
        train_unet(pipe, images, labels, args)
        save(pipe, args.out)
    evaluation = evaluate(pipe, args)
    (args.out / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    console.print_json(data=evaluation)


if __name__ == "__main__":
    main()

"""A complete Stable Diffusion pipeline of a few megabytes, trained on real handwritten digits.

``model/`` is an ordinary Diffusers folder (tokenizer, CLIP text encoder, U-Net with cross-attention,
VAE, DPM-Solver++ 2M) that draws 32x32 pictures. ``benchmarks/train_demo.py`` trains it and writes
``model/evaluation.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

__all__ = ["GUIDANCE_SCALE", "MODEL_DIR", "NUM_INFERENCE_STEPS", "PROMPTS", "load_pipeline"]

MODEL_DIR = Path(__file__).resolve().parent / "model"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {digit}" for digit in DIGITS)

# The settings under which model/evaluation.json was measured.
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 2.0


def load_pipeline(
    torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Load the shipped pipeline; no network is used.

    Args:
        torch_dtype: dtype of all weights; None: ``torch.float32``, although the files hold fp16.
        device: where to put the pipeline.

    Raises:
        ImportError: diffusers or transformers is not installed.
        FileNotFoundError: the weights are not part of this installation.
    """
    try:
        import transformers  # noqa: F401  (without it diffusers hands out a placeholder class)
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise ImportError(
            f"the demo pipeline needs two more packages ({error}): pip install diffusers transformers"
        ) from error
    if not (MODEL_DIR / "model_index.json").is_file():
        raise FileNotFoundError(f"no demo weights in {MODEL_DIR}: python benchmarks/train_demo.py trains them")
    dtype = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
    return StableDiffusionPipeline.from_pretrained(MODEL_DIR, local_files_only=True, **dtype).to(device)

"""The shipped demo pipeline: it loads as any other, draws what the prompt says, and survives a round trip."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
safe_open = pytest.importorskip("safetensors").safe_open

from fastdiff.demo import (  # noqa: E402
    GUIDANCE_SCALE,
    MODEL_DIR,
    NUM_INFERENCE_STEPS,
    PROMPTS,
    load_pipeline,
)


def sample(pipe, prompts, seeds, **kwargs) -> np.ndarray:
    """Pictures (N, 32, 32, 3) in [0, 1], one per prompt and seed."""
    settings = {"num_inference_steps": NUM_INFERENCE_STEPS, "guidance_scale": GUIDANCE_SCALE} | kwargs
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(list(prompts), generator=generators, output_type="np", **settings).images


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures(pipe) -> np.ndarray:
    return sample(pipe, PROMPTS, seeds=range(10))


@pytest.fixture(scope="module")
def read():
    """A reader of digits that knows the real ones only: pictures (N, 32, 32, 3) to labels (N,)."""
    svm = pytest.importorskip("sklearn.svm")
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    classifier = svm.SVC(C=10).fit(digits.data / 16, digits.target)

    def predict(images: np.ndarray) -> np.ndarray:
        blocks = images.mean(-1).reshape(-1, 8, 4, 8, 4).mean((2, 4))  # back to the data set's 8x8
        return classifier.predict(blocks.reshape(-1, 64))

    return predict


def test_is_a_complete_stable_diffusion_pipeline(pipe):
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert pipe.safety_checker is None
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {p.dtype for net in networks for p in net.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in MODEL_DIR.rglob("*.safetensors")) < 6_000_000
    assert not any(net.training for net in networks)


def test_dtype_and_plain_from_pretrained():
    half = load_pipeline(torch_dtype=torch.bfloat16)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    plain = diffusers.StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    assert {plain.unet.dtype, plain.vae.dtype, plain.text_encoder.dtype} == {torch.float32}


def test_tokenizer_knows_the_prompts_and_takes_any_text(pipe):
    tokenizer = pipe.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [word + "</w>" for word in prompt.split()]
        assert (ids[0], ids[-1]) == (start, end)
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    other = tokenizer("Zwölf 12, naïve 数字!").input_ids
    assert end not in other[1:-1]  # the end token is also the unknown token
    padded = tokenizer("", padding="max_length").input_ids
    assert padded == [start] + [end] * 76


def test_text_encoder_has_the_hub_layout():
    # transformers 5 reads both layouts, 4 only this one; with the other it would draw random digits.
    with safe_open(MODEL_DIR / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(key.startswith("text_model.") for key in weights.keys())  # noqa: SIM118


def test_slow_tokenizer_files_agree_with_the_fast_one():
    model = json.loads((MODEL_DIR / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((MODEL_DIR / "tokenizer" / "vocab.json").read_text()) == model["vocab"]
    merges = (MODEL_DIR / "tokenizer" / "merges.txt").read_text().splitlines()
    assert [tuple(line.split()) for line in merges[1:]] == [tuple(pair) for pair in model["merges"]]


def test_draws_the_digit_of_the_prompt(pictures, read):
    assert pictures.shape == (10, 32, 32, 3)
    right = read(pictures) == np.arange(10)
    assert right.sum() >= 9, f"read as {read(pictures)}"


def test_the_prompt_decides_the_digit(pipe, read):
    # Everything but the prompt is the same for all ten, so noise cannot be what tells them apart.
    images = sample(pipe, PROMPTS, seeds=[123] * 10)
    assert (read(images) == np.arange(10)).sum() >= 9
    assert len({image.tobytes() for image in images}) == 10


def test_the_seed_decides_the_handwriting(pipe, read):
    images = sample(pipe, [PROMPTS[3]] * 4, seeds=range(4))
    assert (read(images) == 3).all()
    distances = [np.sqrt(np.mean((a - b) ** 2)) for i, a in enumerate(images) for b in images[:i]]
    assert min(distances) > 0.02


def test_white_on_black(pictures):
    assert np.median(pictures[..., :4, :].mean((1, 2, 3))) < 0.2  # the left edge is background
    assert (pictures.max((1, 2, 3)) > 0.9).all()
    assert np.abs(pictures - pictures.mean(-1, keepdims=True)).max() < 0.1  # grey


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_other_schedulers_from_config(pipe, read, name):
    stock = pipe.scheduler
    try:
        pipe.scheduler = getattr(diffusers, name).from_config(stock.config)
        images = sample(pipe, PROMPTS, seeds=range(10))
    finally:
        pipe.scheduler = stock
    assert (read(images) == np.arange(10)).sum() >= 9


def test_save_and_load_round_trip_is_bitwise(pipe, pictures, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert np.array_equal(sample(again, PROMPTS, seeds=range(10)), pictures)


def test_evaluation_reached_the_bar():
    evaluation = json.loads((MODEL_DIR / "evaluation.json").read_text())
    assert evaluation["samples"] >= 200
    assert evaluation["accuracy"] >= 0.95
    assert evaluation["svm_accuracy_held_out_digits"] >= 0.98
    assert (evaluation["steps"], evaluation["guidance_scale"]) == (NUM_INFERENCE_STEPS, GUIDANCE_SCALE)


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"{missing}.*pip install diffusers transformers"):
        load_pipeline()


def test_missing_weights_are_named(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("fastdiff.demo.MODEL_DIR", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train_demo\.py"):
        load_pipeline()

"""One step of a linear sampler in one pass."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.ops._library import fused_op


@fused_op(
    "(Tensor sample, Tensor model_output, Tensor[] history, Tensor? noise, float[] prev, float[] entry, "
    "float? clip=None, ScalarType? prev_dtype=None, ScalarType? entry_dtype=None, float[] kept=[], "
    "ScalarType? kept_dtype=None) -> (Tensor, Tensor, Tensor)"
)
def scheduler_step(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    prev: Sequence[float],
    entry: Sequence[float],
    clip: float | None = None,
    prev_dtype: torch.dtype | None = None,
    entry_dtype: torch.dtype | None = None,
    kept: Sequence[float] = (),
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next sample, and what a multistep sampler keeps of this step::

        new  = clamp(entry[0] * sample + entry[1] * model_output, -clip, clip)
        next = prev[0] * sample + prev[1] * model_output + prev[2] * new + prev[3] * noise
               + sum(prev[4 + i] * history[i])

    and a third combination, of the same tensors as ``next`` with the coefficients ``kept``. ``new`` mostly is the
    predicted clean sample; predictor-corrector samplers keep the corrected sample besides, Heun's and linear
    multistep the derivative. Computed at least in float32, each result rounded once; ``next`` and the third use
    ``new`` unrounded. The terms of an fp32 step cancel, so kernels sum those in fp64.

    Args:
        sample, model_output: of one shape.
        history: earlier entries, newest first or as the caller likes, of sample's shape.
        noise: of sample's shape; ``None`` counts as zero.
        prev: 4 + len(history) coefficients.
        entry: 2 coefficients, or none: then ``new`` is zero and the second result an empty tensor.
        clip: bound of the new entry's absolute value; ``None`` for no bound.
        prev_dtype: of the next sample; sample's by default.
        entry_dtype: of the new entry; model_output's by default.
        kept: as many coefficients as ``prev``, or none: then the third result is an empty tensor.
        kept_dtype: of the third result; sample's by default.

    Returns:
        (next, new, third), laid out like sample.

    Raises:
        ValueError: if the shapes differ or the coefficients are not as many as stated.
    """
    wide = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
    for t in history:
        wide = torch.promote_types(wide, t.dtype)
    operands = [sample, model_output, None, noise, *history]
    new = None
    if entry:
        new = _combination(entry, operands[:2], wide)
        operands[2] = new = new if clip is None else new.clamp(-clip, clip)
    kept_dtype = kept_dtype or sample.dtype
    return (
        _laid_out_like(sample, _combination(prev, operands, wide).to(prev_dtype or sample.dtype)),
        sample.new_empty(0, dtype=entry_dtype or model_output.dtype)
        if new is None
        else _laid_out_like(sample, new.to(entry_dtype or model_output.dtype)),
        _laid_out_like(sample, _combination(kept, operands, wide).to(kept_dtype))
        if kept
        else sample.new_empty(0, dtype=kept_dtype),
    )


def _combination(coefficients: Sequence[float], tensors: Sequence[Tensor | None], wide: torch.dtype) -> Tensor:
    """Their sum. A tensor with coefficient 0 is not in it, be it infinite."""
    present = [(c, t) for c, t in zip(coefficients, tensors, strict=True) if t is not None]
    terms = [c * t.to(wide) for c, t in present if c] or [torch.zeros_like(present[0][1], dtype=wide)]
    return functools.reduce(operator.add, terms)


def _laid_out_like(like: Tensor, t: Tensor) -> Tensor:
    out = torch.empty_like(like, dtype=t.dtype)
    return t if out.stride() == t.stride() else out.copy_(t)


@scheduler_step.check
def _check(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    prev: Sequence[float],
    entry: Sequence[float],
    clip: float | None = None,
    prev_dtype: torch.dtype | None = None,
    entry_dtype: torch.dtype | None = None,
    kept: Sequence[float] = (),
    kept_dtype: torch.dtype | None = None,
) -> None:
    shape = sample.shape
    if not (sample.is_floating_point() and model_output.is_floating_point()):
        raise ValueError(
            f"scheduler_step: sample is {str(sample.dtype)[6:]} and model_output {str(model_output.dtype)[6:]}, "
            "expected floating point"
        )
    if model_output.shape != shape:
        raise _shape_error("model_output", model_output, sample)
    if noise is not None and noise.shape != shape:
        raise _shape_error("noise", noise, sample)
    for t in history:
        if t.shape != shape:
            raise _shape_error("a history tensor", t, sample)
    if len(prev) != 4 + len(history):
        raise ValueError(f"prev has {len(prev)} coefficients, expected 4 and {len(history)} for the history")
    if len(entry) not in (0, 2):
        raise ValueError(f"entry has {len(entry)} coefficients, expected 2 or none")
    if len(kept) not in (0, len(prev)):
        raise ValueError(f"kept has {len(kept)} coefficients, expected none or as many as prev, {len(prev)}")
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip is {clip}, expected a bound that is not negative")


def _shape_error(name: str, t: Tensor, sample: Tensor) -> ValueError:
    return ValueError(f"{name} has shape {tuple(t.shape)}, expected sample's {tuple(sample.shape)}")


@scheduler_step.fake
def _fake(
    sample: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    noise: Tensor | None,
    prev: Sequence[float],
    entry: Sequence[float],
    clip: float | None = None,
    prev_dtype: torch.dtype | None = None,
    entry_dtype: torch.dtype | None = None,
    kept: Sequence[float] = (),
    kept_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def result(wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(sample, dtype=dtype) if wanted else sample.new_empty(0, dtype=dtype)

    return (
        result(True, prev_dtype or sample.dtype),
        result(bool(entry), entry_dtype or model_output.dtype),
        result(bool(kept), kept_dtype or sample.dtype),
    )

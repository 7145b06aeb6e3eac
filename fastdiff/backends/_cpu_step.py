"""``scheduler_step`` on small CPU tensors without torch's dispatcher, which takes ten times as long as the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastdiff import _extension
from fastdiff.backends import is_plain

#: Values up to which the kernel runs on the calling thread alone. For larger ones the call's own time is nothing, and
#: torch's dispatcher lets other Python threads run meanwhile.
SMALL = 1 << 16

#: Takes sample, model output, history and noise; gives next, new entry and third result, ``None`` where not wanted.
Prepared = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_address, _is_contiguous, _is_neg = Tensor.data_ptr, Tensor.is_contiguous, Tensor.is_neg


def _empty(dtype: torch.dtype | None, own: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """What makes a result of that type, given the sample, of type ``own``."""
    if dtype is None:
        return None
    return torch.empty_like if dtype is own else functools.partial(torch.empty_like, dtype=dtype)


def directly(run: Callable[..., Any]) -> Callable[..., Any]:
    """What serves the op: on small tensors the extension itself, else, and where anybody watches, ``run``.

    It knows of no gradients, forward mode or autocast: the backend has refused such calls.
    """
    compiled = getattr(_extension.module, "scheduler_step", None)  # an extension from before has none
    if compiled is None:
        return run

    def step(
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
    ) -> Any:
        arguments = (sample, model_output, history, noise, prev, entry, clip, prev_dtype, entry_dtype, kept, kept_dtype)
        if not is_dynamo_compiling() and sample.numel() <= SMALL and is_plain():
            results = compiled(*arguments)
            if results is not NotImplemented:
                return results
        return run(*arguments)

    return step


def prepare(
    run: Callable[..., Any],
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
) -> Prepared | None:
    """See :attr:`fastdiff.backends.Kernel.prepare`; ``run`` serves what needs the dispatcher after all."""
    bind = getattr(_extension.module, "bind_scheduler_step", None)  # an extension from before has none
    numel = sample.numel()
    if bind is None or not 0 < numel <= SMALL:
        return None
    results = (
        prev_dtype or sample.dtype,
        (entry_dtype or model_output.dtype) if entry else None,
        (kept_dtype or sample.dtype) if kept else None,
    )
    operands = (sample, model_output, noise, *history)
    types = [-1 if d is None else _TYPES[d] for d in (*results, *(None if t is None else t.dtype for t in operands))]
    call = bind(numel, types, prev, entry, clip, kept)
    arguments = prev, entry, clip, prev_dtype, entry_dtype, kept, kept_dtype
    first, second, third = [_empty(dtype, sample.dtype) for dtype in results]
    assert first is not None

    def step(
        sample: Tensor, model_output: Tensor, history: Sequence[Tensor], noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tensors = [sample, model_output, *history] if noise is None else [sample, model_output, *history, noise]
        try:
            fits = is_plain() and all(map(_is_contiguous, tensors)) and not any(map(_is_neg, tensors))
            addresses = [*map(_address, tensors)] if fits else [0]
        except RuntimeError:  # sparse and MKL-DNN tensors have none
            addresses = [0]
        if not all(addresses):  # that of zeros without memory, and of wrappers, is 0
            found: tuple[Tensor, Tensor, Tensor] = run(sample, model_output, history, noise, *arguments)
            return found
        sample_at, model_output_at, *history_at = addresses
        noise_at = 0 if noise is None else history_at.pop()
        following = first(sample)
        new = None if second is None else second(sample)
        other = None if third is None else third(sample)
        call(
            following.data_ptr(), 0 if new is None else new.data_ptr(), 0 if other is None else other.data_ptr(),
            sample_at, model_output_at, noise_at, *history_at,
        )  # fmt: skip
        return following, new, other

    # For `known_step`, which does the same without Python.
    vars(step).update(bound=call, results=results)
    return step

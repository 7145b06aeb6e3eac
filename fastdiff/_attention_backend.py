"""The attention backend ``"fastdiff"`` of Diffusers' own dispatcher.

It is there as soon as both packages are imported, in whichever order, for ``model.set_attention_backend("fastdiff")``,
``with attention_backend("fastdiff")`` and context parallelism. ``fastdiff.patch`` does not need it and never sets it:
Diffusers' setter switches the whole process. The environment variable ``DIFFUSERS_ATTN_BACKEND`` is read before the
backend can exist, so it cannot name it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.attention import attention

NAME = "fastdiff"
_DISPATCH = "diffusers.models.attention_dispatch"


def dispatched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """What Diffusers calls: queries, keys and values (B, S, H, D), a mask as in ``dispatch_attention_fn``.

    Returns:
        (B, Sq, H, D), and with ``return_lse`` the log-sum-exp (B, Sq, H) too.

    Raises:
        ValueError: for dropout together with ``return_lse``, and what :func:`fastdiff.ops.attention` raises.
    """
    if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]
    if _parallel_config is not None:
        return _parallel(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
                         _parallel_config)  # fmt: skip
    if dropout_p:
        if return_lse:
            raise ValueError(f"dropout_p is {dropout_p}: there is no log-sum-exp with dropout")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)
    groups = query.shape[2] // key.shape[2] if enable_gqa and key.shape[2] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    return attention(query, key, value, attn_mask, scale=scale, is_causal=is_causal, return_lse=return_lse)


def _parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    config: Any,
) -> Any:
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    return _templated_context_parallel_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
        forward_op=_forward_op, backward_op=_backward_op, _parallel_config=config,
    )  # fmt: skip


def _forward_op(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    return dispatched_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)


def _backward_op(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the attention backend 'fastdiff' has no backward under context parallelism")


def register(dispatch: ModuleType) -> None:
    """Add the backend to Diffusers' enumeration and registry; a warning where this Diffusers has others."""
    try:
        names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
        if NAME in names._value2member_map_:
            return
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        # Everything that may fail comes before anything that changes Diffusers' state.
        checks = [dispatch._check_device, dispatch._check_shape]
        add = registry.register(member, constraints=checks, supports_context_parallel=True)
        names._member_names_.append(NAME.upper())
        names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
        type.__setattr__(names, NAME.upper(), member)
        add(dispatched_attention)
    except Exception as error:
        warnings.warn(
            f"this version of Diffusers does not take the attention backend {NAME!r} ({error}); "
            "everything else of fastdiff works",
            RuntimeWarning,
            stacklevel=2,
        )


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the backend when Diffusers is imported, and finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DISPATCH:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now or when Diffusers comes to be imported."""
    if _DISPATCH in sys.modules:
        register(sys.modules[_DISPATCH])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())

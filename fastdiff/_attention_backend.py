"""The attention backend ``"fastdiff"`` of Diffusers' own dispatcher.

It is there as soon as both packages are imported, in whichever order, for ``model.set_attention_backend("fastdiff")``,
``with attention_backend("fastdiff")`` and context parallelism. Diffusers' setter switches the whole process, so
``fastdiff.patch`` sets a second one by itself, on the processors of the patched model: :func:`patched_attention`. The
environment variable ``DIFFUSERS_ATTN_BACKEND`` is read before the backend can exist, so it cannot name it.
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.attention import attention

NAME = "fastdiff"
#: Of the member of Diffusers' enumeration that ``patch`` sets. It is not among those that a user can choose.
PATCHED = "FASTDIFF_PATCHED"
_DISPATCH = "diffusers.models.attention_dispatch"

# A plain threading.local: torch.compile guards on its attributes.
_calling = threading.local()
_calling.site = None


@contextlib.contextmanager
def attention_of(site: Any) -> Iterator[None]:
    """Within the block, and in this thread, attention is dispatched for a patched module, and served by its site."""
    outer = getattr(_calling, "site", None)
    _calling.site = site
    try:
        yield
    finally:
        _calling.site = outer


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
    site = getattr(_calling, "site", None)
    if site is None:
        return attention(query, key, value, attn_mask, scale=scale, is_causal=is_causal, return_lse=return_lse)
    count = 0 if torch.compiler.is_compiling() else len(site.served)  # a processor may attend to several things
    out, lse = site.serve(
        f"attention {count + 1}" if count else "attention", attention, query, key, value, attn_mask, scale=scale,
        is_causal=is_causal, return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def patched_attention(
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
    **others: Any,
) -> Any:
    """:func:`dispatched_attention` in the calls of patched modules; elsewhere as if no backend were set.

    So a processor that another model has, too, or that was kept when it was replaced, is nowhere else than before.

    Raises:
        ValueError: if context parallelism is on, and the backend in effect is not made for it.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    active = _AttentionBackendRegistry._active_backend
    if active is registered(PATCHED):  # whoever saves a processor's backend may also make it the active one
        active = AttentionBackendName.NATIVE
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    broadcast = not key.shape[0] == value.shape[0] == query.shape[0] or not (
        enable_gqa or key.shape[2] == value.shape[2] == query.shape[2]
    )  # which torch's attention takes
    patched = getattr(_calling, "site", None) is not None and _parallel_config is None and active in DEFAULTS
    if patched and not broadcast:
        return dispatched_attention(*arguments, return_lse)
    if _parallel_config is not None and not _AttentionBackendRegistry._is_context_parallel_available(active):
        raise ValueError(f"the attention backend {active.value!r} does not support context parallelism")
    others["return_lse"] = return_lse
    return dispatch_attention_fn(
        *arguments, attention_kwargs=others, backend=active, parallel_config=_parallel_config
    )


#: The backends in effect in a process with which patched modules have fused attention: nobody chose another one.
DEFAULTS = ["native", NAME]


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
    """Add the backends to Diffusers' enumeration and registry; a warning where this Diffusers has others."""
    try:
        names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
        if NAME in names._value2member_map_:
            return
        member, patched = _member(names, NAME.upper()), _member(names, PATCHED)
        arguments = set().union(*registry._supported_arg_names.values())
        # Everything that may fail comes before anything that changes Diffusers' state.
        checks = [dispatch._check_device, dispatch._check_shape]
        add = registry.register(member, constraints=checks, supports_context_parallel=True)
        add_patched = registry.register(patched, supports_context_parallel=True)
        names._member_names_.append(member._name_)
        names._member_map_[member._name_] = names._value2member_map_[NAME] = member
        type.__setattr__(names, member._name_, member)
        type.__setattr__(names, PATCHED, patched)
        copyreg.pickle(names, _reduce)
        add(dispatched_attention)
        add_patched(patched_attention)
        registry._supported_arg_names[patched] = arguments  # all that some backend takes, to be passed on
    except Exception as error:
        warnings.warn(
            f"this version of Diffusers does not take the attention backend {NAME!r} ({error}); "
            "everything else of fastdiff works",
            RuntimeWarning,
            stacklevel=2,
        )


def _member(names: Any, name: str) -> Any:
    member = str.__new__(names, name.lower())  # by which the registry tells them apart
    member._name_, member._value_ = name, NAME
    return member


def _reduce(member: Any) -> Any:
    """How members are pickled: ours so that fastdiff is imported first."""
    return (registered, (member._name_,)) if member._value_ == NAME else (type(member), (member._value_,))


def registered(name: str) -> Any:
    """The member of that name of Diffusers' enumeration; ``None`` where :func:`register` failed."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return getattr(AttentionBackendName, name, None)


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

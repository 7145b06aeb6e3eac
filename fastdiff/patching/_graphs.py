"""CUDA graphs of a denoiser: captured per kind of input, replayed instead of launching every kernel from Python.

A call goes through :func:`graphed_forward`, which takes the place of the model's ``forward``. What a graph cannot
stand for runs the ordinary patched forward, and the reason is counted. A graph is captured when a kind of input comes
for the second time, so that inputs seen once cost nothing. It holds for one state of the model (``_graph_state.py``):
another one drops all graphs.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from fastdiff.backends import overridden
from fastdiff.patching._graph_calls import Call, HostWatch, NotCapturable, StaticArguments, StaticResult
from fastdiff.patching._graph_recorder import CudaRecorder, Recorder, Recording
from fastdiff.patching._graph_state import State

#: Graphs kept per model; the one that was used least recently goes first.
MAX_GRAPHS = 8
#: A capture costs about this many forwards. Where graphs go before they were replayed as often, captures get rarer.
_PAYS = 3
#: The most calls of a kind of input that are waited for before a capture.
MOST_PATIENT = 8
#: Kinds of input that were seen and not captured, and reasons, that are remembered.
_REMEMBERED = 64

#: A denoiser's forward takes one of these.
_STEPS = frozenset({"timestep", "timesteps", "timestep_ratio", "t", "r"})

#: Makes the recorder of a model.
recorder_of: Callable[[], Recorder] = CudaRecorder


@dataclass(frozen=True)
class GraphStats:
    """What became of the calls of one model.

    Attributes:
        graphs: held now.
        captures: made so far.
        replays: calls that were replays.
        ordinary: reason -> calls that ran the ordinary forward.
        evicted: graphs that made room for others.
        dropped: what changed in the model -> how many graphs went with it.
        unavailable: why nothing can be captured in the model's present state, or empty.
    """

    graphs: int
    captures: int
    replays: int
    ordinary: dict[str, int]
    evicted: int
    dropped: dict[str, int]
    unavailable: str


class _Graph:
    """One captured forward."""

    def __init__(
        self, arguments: StaticArguments, recording: Recording, result: StaticResult, kept: list[Tensor]
    ) -> None:
        self.kept = kept  # what the forward reads and only a cache of somebody's may hold
        self.arguments = arguments
        self.recording = recording
        self.result = result
        self.replays = 0


class ModelGraphs:
    """The graphs of one model, and who runs the calls that have none.

    A copy, and what is unpickled, has the same ``inner`` and no graphs. Calls from several threads are replayed one
    after another.

    Attributes:
        inner: (model, ...) -> the ordinary forward.
    """

    def __init__(self, model: nn.Module, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self._model = model
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._recorder = recorder_of()
        self._unavailable = self._recorder.why_not() or ""
        self._capturing = False
        self._state: State | None = None
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._patience = 1  # how often a kind of input must have been seen before it is captured
        self._futile = self._rest = 0  # changes in a row without a replay between them, calls to sit out
        self._captures = self._replays = self._evicted = 0
        self._ordinary: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "_model": self._model, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward, from a graph if there is one or can be one now."""
        reason = self._why_not_now()
        if reason is None:
            try:
                call = Call(self._names, args, kwargs, self._recorder.device_type)
                with self._lock:
                    graph = self._graph(call)
                    return self._replay(graph, call)
            except NotCapturable as found:
                reason = str(found)
        self._note(reason)
        return self.inner(self._model, *args, **kwargs)

    def stats(self) -> GraphStats:
        """The counts so far."""
        with self._lock:
            unavailable = self._unavailable or self._present_state().reason or ""
            return GraphStats(
                len(self._graphs), self._captures, self._replays, dict(self._ordinary), self._evicted,
                dict(self._dropped), unavailable,
            )  # fmt: skip

    def release(self) -> None:
        """Give back all graphs and their memory."""
        with self._lock:
            self._drop(list(self._graphs))
            self._state = None
            self._seen.clear()
            self._refused.clear()
            self._patience, self._futile, self._rest = 1, 0, 0

    def _why_not_now(self) -> str | None:
        """Why this call, whatever its arguments, needs Python: as far as that does not depend on the model."""
        if torch.is_grad_enabled():
            return "gradients are enabled; call it under torch.no_grad() or inference_mode()"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return "within a transform of torch.func, or forward-mode differentiation"
        if torch.jit.is_tracing():
            return "it is being traced"
        if torch._C._len_torch_dispatch_stack() or _function_modes():
            return "a dispatch mode wants to see every operation"
        if _has_any_global_hook():
            return "hooks for all modules have to see every call"
        if self._unavailable:
            return self._unavailable
        return "within another capture" if self._capturing or self._recorder.busy() else None

    def _note(self, reason: str) -> None:
        with self._lock:
            if reason not in self._ordinary and len(self._ordinary) >= _REMEMBERED:
                reason = "other reasons"
            self._ordinary[reason] += 1

    def _present_state(self) -> State:
        """The model's state; drops the graphs that were made in another one."""
        changed = self._state.changed() if self._state is not None else None
        if changed is not None:
            if self._graphs:
                self._dropped[changed] += len(self._graphs)
            self._drop(list(self._graphs))
            self._seen.clear()
            self._refused.clear()
            self._futile += 1
            self._rest = min(2 ** (self._futile - 1), _REMEMBERED) - 1
        if self._state is None or changed is not None:
            self._state = State(self._model, self._recorder.device_type)
        return self._state

    def _graph(self, call: Call) -> _Graph:
        """The graph for a call, captured now if it is time.

        Raises:
            NotCapturable: if there is none.
        """
        if self._rest:  # there are no graphs, and to look at a model that always changes costs more than it gives
            self._rest -= 1
            raise NotCapturable("the model keeps changing between calls")
        state = self._present_state()
        if state.reason is not None:
            raise NotCapturable(state.reason)
        key = (call.key, _settings())
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        if key in self._refused:
            raise NotCapturable(self._refused[key])
        seen = self._seen.get(key, 0)
        if seen < self._patience:
            _remember(self._seen, key, seen + 1)
            raise NotCapturable("its first calls with such inputs are ordinary ones")
        try:
            graph = self._capture(call, state)
        except NotCapturable as found:
            self._patience = min(2 * self._patience, MOST_PATIENT)
            _remember(self._refused, key, str(found))
            raise
        self._captures += 1
        self._graphs[key] = graph
        self._seen.pop(key)
        if len(self._graphs) > MAX_GRAPHS:
            self._evicted += 1
            self._drop([next(iter(self._graphs))])
        return graph

    def _replay(self, graph: _Graph, call: Call) -> Any:
        self._recorder.follow(self._device())
        graph.arguments.write(call)
        graph.recording.replay()
        graph.replays += 1
        self._replays += 1
        self._futile = 0
        return graph.result.copy()

    def _device(self) -> torch.device:
        assert self._state is not None
        return self._state.device

    def _drop(self, keys: list[Hashable]) -> None:
        if not keys:
            return
        self._recorder.settle()
        for key in keys:
            graph = self._graphs.pop(key)
            graph.recording.drop()
            paid = graph.replays >= _PAYS
            self._patience = max(1, self._patience // 2) if paid else min(2 * self._patience, MOST_PATIENT)
        if not self._graphs:
            self._recorder.release()

    def _capture(self, call: Call, state: State) -> _Graph:
        """
        Raises:
            NotCapturable: if that is impossible.
        """
        self._capturing, handled = True, sys.exc_info()[1]
        try:
            arguments = StaticArguments(call, state.device)
            self._recorder.follow(state.device)
            arguments.write(call)
            versions = arguments.versions()
            watch = HostWatch(state.device, state.foreign, state.owned)
            with self._recorder.side_stream(state.device), watch:
                self._forward(arguments)
            if arguments.versions() != versions:
                raise NotCapturable("it writes into its arguments")
            if (changed := state.changed()) is not None:
                raise NotCapturable(f"a forward changes the model: {changed}")
            recording, result = self._recorder.record(lambda: self._forward(arguments), state.device)
            try:
                return _Graph(arguments, recording, StaticResult(result, state.device), watch.outside())
            except NotCapturable:
                recording.drop()
                raise
        except NotCapturable:
            raise
        except Exception as error:  # what is wrong with the call itself, the ordinary forward raises again
            raise NotCapturable(f"the capture failed: {_first_cause(error, handled)}") from None
        finally:
            self._capturing = False

    def _forward(self, arguments: StaticArguments) -> Any:
        args, kwargs = arguments.arguments()
        return self.inner(self._model, *args, **kwargs)


def graphed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces the forward of a denoiser, patched or stock, which is called from here."""
    graphs = self._fastdiff_patch.graphs
    if torch.compiler.is_compiling():  # it makes graphs of its own
        return graphs.inner(self, *args, **kwargs)
    return graphs.call(args, kwargs)


def why_no_denoiser(model: nn.Module) -> str | None:
    """Why a model is not one that is called at every step, or ``None``."""
    if _STEPS.isdisjoint(inspect.signature(type(model).forward).parameters):
        return "only denoisers are captured, which are called at every step"
    return None


def _remember(known: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


def _function_modes() -> bool:
    """Whether a torch function mode is on, other than that of ``torch.set_default_device``."""
    depth = torch._C._len_torch_function_stack()
    return any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(depth))


def _settings() -> Hashable:
    """The process's and thread's settings that decide which kernels a forward launches."""
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    return overridden(), getattr(registry, "_active_backend", None), *(read() for read in _SETTINGS)


def _precision() -> Hashable:
    return tuple(torch._C._get_fp32_precision_getter("cuda", kind) for kind in ("matmul", "conv"))


#: Those of them that this version of torch has.
_SETTINGS: tuple[Callable[[], Hashable], ...] = (
    torch.get_float32_matmul_precision,
    _precision if hasattr(torch._C, "_get_fp32_precision_getter") else torch._C._get_cublas_allow_tf32,
    *(
        getattr(torch._C, name)
        for name in (
            "_get_deterministic_algorithms", "_get_cudnn_enabled", "_get_cudnn_benchmark", "_get_cudnn_deterministic",
            "_get_flash_sdp_enabled", "_get_mem_efficient_sdp_enabled", "_get_math_sdp_enabled",
            "_get_cudnn_sdp_enabled", "_get_cublas_allow_fp16_accumulation",
            "_get_cublas_allow_fp16_reduced_precision_reduction", "_get_cublas_allow_bf16_reduced_precision_reduction",
        )
        if hasattr(torch._C, name)
    ),
)  # fmt: skip


def _first_cause(error: BaseException, handled: BaseException | None) -> str:
    """The first line of the error that was raised first, since ``handled``: a failed capture's end raises another."""
    while error.__context__ not in (None, handled):
        assert error.__context__ is not None
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

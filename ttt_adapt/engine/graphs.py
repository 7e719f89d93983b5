"""The CUDA graph engine: a step is recorded once and then replayed, without Python and without waiting.

What is recorded reads and writes the same memory at every replay, so whatever changes from frame to frame lies in
tensors: the frame is copied into a fixed place, the window's position is a number on the device, and the random source
is registered with the graph, which moves it on at every replay. What Python decides (shapes, how many frames the window
holds while it fills) is part of the key under which a recording is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.errors import ConfigError

KEPT = 4  # recordings, each with the memory of its own intermediate results
WARM_UP = 2  # ordinary runs before a recording: libraries choose their kernels, the optimizer makes its state


class Recorder(Protocol):
    """Records what a call launches."""

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that repeats the call's work, and the call's result, which every repetition overwrites.

        The work itself is not done while it is recorded.
        """
        ...

    def forget(self) -> None:
        """All recordings were dropped: the memory that they shared is gone."""
        ...


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`, on a stream of its own.

    `torch.cuda.graph` is not used: it has one stream for all devices, and leaves it in place where a recording fails.

    Args:
        generator: the random source that recorded calls draw from.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._device = generator, generator.device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`. After a call that cannot be recorded, everything is as before."""
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream(self._device)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # while it records, memory that is kept for later is not given back
            graph, before = torch.cuda.CUDAGraph(), self._generator.clone_state()
            graph.register_generator_state(self._generator)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                try:
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    result = call()
                    graph.capture_end()
                except BaseException:
                    self._give_up(graph, before)
                    raise
            torch.cuda.current_stream().wait_stream(self._stream)
        self._pool = graph.pool()
        return graph.replay, result

    def _give_up(self, graph: torch.cuda.CUDAGraph, before: torch.Generator) -> None:
        """End a recording that failed: a stream and a random source that are still recording are of no use."""
        with suppress(RuntimeError):  # it may have ended, or be invalid
            graph.capture_end()
        self._generator.graphsafe_set_state(before)
        self._stream = self._pool = None

    def forget(self) -> None:
        """See `Recorder`: a pool without a graph cannot be recorded into again."""
        self._pool = None


@dataclass
class _Recording:
    """One key's recording, or how often its call has run without one.

    `holds` are tensors that the recording may read and that their owner may replace: their memory has to stay.
    """

    runs: int = 0
    inputs: tuple[Tensor, ...] = ()
    replay: Callable[[], None] | None = None
    result: Any = None
    holds: Sequence[Tensor] = ()


class GraphEngine(EagerEngine):
    """Runs a call as it is a few times, then records it and replays the recording.

    Args:
        recorder: how to record.
        reason: why this engine was picked.
        falls_back: run updates as they are where they cannot be recorded, instead of raising. Predictions always do so:
            what a model does to its outputs is its own business.
        cached: the tensors, beside weights and inputs, that modules keep from call to call: tables of positions, say.
    """

    name = "cudagraph"
    records = True

    def __init__(
        self,
        recorder: Recorder,
        reason: str = "asked for",
        falls_back: bool = False,
        cached: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        super().__init__(reason)
        self._recorder, self.strict, self._cached = recorder, not falls_back, cached
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._eager: set[str] = set()

    def run(self, what: str, call: Callable[..., Any], *inputs: Tensor, key: Hashable = ()) -> Any:
        """As in `EagerEngine`; the result is a copy that the next replay leaves alone.

        Raises:
            ConfigError: the call cannot be recorded; nothing of it was done.
        """
        if what in self._eager:
            return call(*inputs)
        kinds = {x.device.type for x in inputs}
        casts = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]  # the caller's
        entry = self._entry((what, key, *casts, *((tuple(x.shape), x.dtype) for x in inputs)))
        if entry.runs < WARM_UP:
            entry.runs += 1
            return call(*inputs)
        if entry.replay is None and not self._record(what, entry, call, inputs):
            return call(*inputs)
        assert entry.replay is not None
        for place, value in zip(entry.inputs, inputs, strict=True):
            place.copy_(value)
        entry.replay()
        return tree_map_only(Tensor, Tensor.clone, entry.result)

    def _entry(self, key: Hashable) -> _Recording:
        entry = self._recordings.setdefault(key, _Recording())
        self._recordings.move_to_end(key)
        while len(self._recordings) > KEPT:
            self._recordings.popitem(last=False)
            if not any(kept.replay for kept in self._recordings.values()):
                self._recorder.forget()
        return entry

    def _record(self, what: str, entry: _Recording, call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a recording now."""
        try:
            with torch.inference_mode(False), torch.no_grad(), _no_kept_casts():  # which a recording would outlive
                entry.inputs = tuple(x.clone() for x in inputs)
                entry.replay, entry.result = self._recorder.record(lambda: call(*entry.inputs))
            entry.holds = self._cached()
            if strange := {type(x).__name__ for x in tree_leaves(entry.result) if not _repeats(x)}:
                raise TypeError(f"it returns {', '.join(sorted(strange))}, not tensors in lists, tuples and dicts")
            return True
        except Exception as error:
            self.forget()  # a recording that failed may have cost the others their random source
            if what != "predict" and self.strict:
                if isinstance(error, MemoryError | torch.OutOfMemoryError):
                    raise
                raise ConfigError(
                    f"the {what} pass of this model cannot be recorded into a CUDA graph ({type(error).__name__}: "
                    f'{error}): use engine="eager" or "compile"'
                ) from error
            self._eager.add(what)
            self.reason += f"; the {what} pass runs eagerly, it cannot be recorded ({type(error).__name__}: {error})"
            return False

    def predict(self, predict: Callable[[Tensor], Any], x: Tensor, key: Hashable = ()) -> Any:
        """`predict(x)`, replayed."""
        return self.run("predict", predict, x, key=key)

    def forget(self) -> None:
        """Drop all recordings: they hold the addresses of the weights, the optimizer's state and the window."""
        self._recordings.clear()
        self._recorder.forget()


def cached_tensors(objective: Any) -> list[Tensor]:
    """What the modules of a model and its objective keep beside parameters and buffers."""
    roots = [root for root in (objective.model, objective) if isinstance(root, nn.Module)]
    kept = (value for root in roots for m in root.modules() for name, value in vars(m).items() if name not in _OWN)
    return [leaf for value in kept for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


_OWN = vars(nn.Module()).keys()
"""Attributes of every module: parameters, buffers, children, hooks."""


@contextmanager
def _no_kept_casts() -> Iterator[None]:
    """Inside a caller's autocast: casts of the weights are made anew, and recorded with what reads them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _repeats(leaf: Any) -> bool:
    """Whether a leaf of a result is the same in every repetition, or a tensor, which is copied."""
    return leaf is None or isinstance(leaf, Tensor | int | float | str)

"""The CUDA graph engine: a step is recorded once and then replayed, without Python and without waiting.

What is recorded reads and writes the same memory at every replay, so whatever changes from frame to frame lies in
tensors: the frame is copied into a fixed place, the window's position is a number on the device, and the random source
is registered with the graph, which moves it on at every replay. What Python decides (shapes, how many frames the window
holds while it fills) is part of the key under which a recording is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.errors import ConfigError, MemoryLimitError

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
        """All recordings were dropped: what they shared is free."""
        ...


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`.

    Args:
        generator: the random source that recorded calls draw from.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool: Any = None

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.device(self._generator.device), torch.cuda.graph(graph, pool=self._pool):
            result = call()
        self._pool = graph.pool()
        return graph.replay, result

    def forget(self) -> None:
        """See `Recorder`: a pool without a graph cannot be recorded into again."""
        self._pool = None


@dataclass
class _Recording:
    """One key's recording, or how often its call has run without one."""

    runs: int = 0
    inputs: tuple[Tensor, ...] = ()
    replay: Callable[[], None] | None = None
    result: Any = None
    holds: list[Any] = field(default_factory=list)


class GraphEngine(EagerEngine):
    """Runs a call as it is a few times, then records it and replays the recording.

    Args:
        recorder: how to record.
        reason: why this engine was picked.
        falls_back: run updates as they are where they cannot be recorded, instead of raising. Predictions always do so:
            what a model does to its outputs is its own business.
    """

    name = "cudagraph"
    records = True

    def __init__(self, recorder: Recorder, reason: str = "asked for", falls_back: bool = False) -> None:
        super().__init__(reason)
        self._recorder, self._falls_back = recorder, falls_back
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._eager: set[str] = set()

    def run(self, what: str, call: Callable[..., Any], *inputs: Tensor, key: Hashable = ()) -> Any:
        """As in `EagerEngine`; the result is a copy that the next replay leaves alone.

        Raises:
            ConfigError: the call cannot be recorded; nothing of it was done.
        """
        if what in self._eager:
            return call(*inputs)
        entry = self._entry((what, key, *((tuple(x.shape), x.dtype) for x in inputs)))
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
        return entry

    def _record(self, what: str, entry: _Recording, call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a recording now."""
        try:
            with torch.inference_mode(False), torch.no_grad():  # a recording outlives the caller's inference mode
                entry.inputs = tuple(x.clone() for x in inputs)
                entry.replay, entry.result = self._recorder.record(lambda: call(*entry.inputs))
            if strange := {type(x).__name__ for x in tree_leaves(entry.result) if not _repeats(x)}:
                raise TypeError(f"it returns {', '.join(sorted(strange))}, not tensors in lists, tuples and dicts")
            return True
        except (MemoryError, torch.OutOfMemoryError, MemoryLimitError):
            raise
        except Exception as error:
            entry.replay = None
            if what != "predict" and not self._falls_back:
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


def _repeats(leaf: Any) -> bool:
    """Whether a leaf of a result is the same in every repetition, or a tensor, which is copied."""
    return leaf is None or isinstance(leaf, Tensor | int | float | str)

"""The CUDA graph engine: a step is recorded once and then replayed, without Python and without waiting.

A recording reads and writes the same memory at every replay, so whatever changes from frame to frame is in tensors: the
frame is copied into a fixed place, the window's position is a number on the device, and the random source is registered
with the graph, which moves it on at every replay. What Python decides (shapes, which video it is, how many frames the
window holds while it fills) is part of the key under which a recording is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.objectives.base import SplitLoss
from ttt_adapt.stream.optimizer import StreamOptimizer, step_if
from ttt_adapt.stream.state import StreamState

KEPT = 4  # recordings, each with the memory of its own intermediate results; more videos in turns record nothing
WARM_UP = 2  # ordinary runs before a recording: libraries choose their kernels, the optimizer makes its state


class Recorder(Protocol):
    """Records what a call launches."""

    def record(
        self, call: Callable[[], Any], generator: torch.Generator | None = None
    ) -> tuple[Callable[[], None], Any]:
        """Record a call; the work itself is not done.

        Args:
            call: what to record.
            generator: the random source that the call draws from; None: it draws nothing.

        Returns:
            A function that repeats the call's work, and the call's result, which every repetition overwrites.
        """
        ...

    def forget(self) -> None:
        """All recordings were dropped: the memory that they shared is gone."""
        ...


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`, on a stream of its own.

    `torch.cuda.graph` is not used: it has one stream for all devices, and leaves it in place where a recording fails.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def record(
        self, call: Callable[[], Any], generator: torch.Generator | None = None
    ) -> tuple[Callable[[], None], Any]:
        """See `Recorder`. After a call that cannot be recorded, everything is as before."""
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream(self._device)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # while it records, memory that is kept for later is not given back
            graph, before = torch.cuda.CUDAGraph(), None if generator is None else generator.clone_state()
            if generator is not None:
                graph.register_generator_state(generator)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                try:
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    result = call()
                    graph.capture_end()
                except BaseException:
                    self._give_up(graph)
                    if generator is not None and before is not None:
                        generator.graphsafe_set_state(before)
                    raise
            torch.cuda.current_stream().wait_stream(self._stream)
        self._pool = graph.pool()
        return graph.replay, result

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording that failed: a stream that is still recording cannot be used."""
        with suppress(RuntimeError):  # it may have ended, or be invalid
            graph.capture_end()
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

    An update that cannot be recorded is refused. A prediction that cannot be recorded runs as it is: what a model does
    to its outputs is its own business.

    Args:
        step: what is differentiated.
        recorder: how to record.
        reason: why this engine was picked.
    """

    name = "cudagraph"
    recorded = written_down = True

    def __init__(self, step: GradientStep, recorder: Recorder, reason: str = "asked for") -> None:
        super().__init__(step, reason)
        self.recorder, self._predicts_eagerly = recorder, False
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    @property
    def kept(self) -> int:
        """How many recordings are kept, those included that wait for their first run."""
        return len(self._recordings)

    def update(self, call: Callable[[TakenFrame], Any], state: StreamState, taken: TakenFrame) -> Any:
        """As in `EagerEngine`, replayed.

        Raises:
            ConfigError: the call cannot be recorded; nothing of it was done.
        """
        if taken.context:
            self.note("it runs eagerly: the frames come with a context, which is another object for every frame")
            return call(taken)
        objective, buffer = self.gradient_step.objective, state.window.buffer
        settings = objective.settings() if isinstance(objective, SplitLoss) else ()
        place = None if buffer is None else buffer.data_ptr()
        # the optimizer stands for the video: each video has one, and a reset or a load makes another
        video = (state.optimizer.optimizer, state.window.known(state.window_length), place)
        key = (*video, settings, self.gradient_step.replacements())
        return self._run("update", lambda x: call(TakenFrame(x)), (taken.x,), key, state.random.generator)

    def restart(self, optimizer: StreamOptimizer) -> None:
        """Zero the optimizer's state where it is: recordings read and write that memory."""
        held = [value for values in optimizer.optimizer.state.values() for value in values.values()]
        if tensors := [value for value in held if isinstance(value, Tensor)]:
            torch._foreach_zero_(tensors)
        optimizer.restore_settings()

    def take_step(self, optimizer: StreamOptimizer, finite: Tensor) -> None:
        """As in `EagerEngine`, without looking at `finite` on the host."""
        step_if(optimizer.optimizer, finite)
        self.gradient_step.after_step()

    def predict(self, predict: Callable[..., Any], taken: TakenFrame, around: AbstractContextManager[None]) -> Any:
        """As in `EagerEngine`, replayed."""
        # counted here: inside of `around`, statistics of the frame replace those of the model
        key = self.gradient_step.replacements()
        if self.memory is not None and self.memory.changes:
            self.note("predictions run eagerly: the model keeps something of the frame before, in Python")
            return super().predict(predict, taken, around)
        if self._predicts_eagerly or taken.context:
            return super().predict(predict, taken, around)
        with around:
            return self._run("predict", predict, (taken.x,), key)

    def _run(
        self,
        what: str,
        call: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        key: Hashable,
        generator: torch.Generator | None = None,
    ) -> Any:
        """`call(*inputs)`; a replayed result is a copy that the next replay leaves alone.

        Args:
            what: a name for the call.
            call: returns tensors, nested in lists, tuples and dicts.
            inputs: tensors that differ from call to call.
            key: all else that the result depends on and that Python decides.
            generator: the random source that it draws from.
        """
        kinds = {x.device.type for x in inputs}
        casts = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]  # the caller's
        entry = self._entry((what, key, *casts, *((tuple(x.shape), x.dtype) for x in inputs)))
        if entry.runs < WARM_UP:
            entry.runs += 1
            return call(*inputs)
        if entry.replay is None and not self._record(what, entry, call, inputs, generator):
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
                self.recorder.forget()
        return entry

    def _record(
        self,
        what: str,
        entry: _Recording,
        call: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        generator: torch.Generator | None,
    ) -> bool:
        """Whether there is a recording now."""
        try:
            with torch.inference_mode(False), torch.no_grad(), _no_kept_casts():  # which a recording would outlive
                entry.inputs = tuple(x.clone() for x in inputs)
                entry.replay, entry.result = self.recorder.record(lambda: call(*entry.inputs), generator)
            entry.holds = cached_tensors(self.gradient_step.objective)
            if strange := {type(x).__name__ for x in tree_leaves(entry.result) if not _repeats(x)}:
                raise TypeError(f"it returns {', '.join(sorted(strange))}, not tensors in lists, tuples and dicts")
            return True
        except Exception as error:
            self.forget()  # a recording that failed may have cost the others their random source
            if what == "predict":
                self._predicts_eagerly = True
                why = f"{type(error).__name__}: {error}"
                self.note(f"the predict pass runs eagerly, it cannot be recorded ({why})")
                return False
            if isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"the {what} pass of this model cannot be recorded into a CUDA graph ({type(error).__name__}: "
                f'{error}): use engine="eager" or "compile"'
            ) from error

    def forget(self) -> None:
        """Drop all recordings: they hold the addresses of the weights, the optimizer's state and the window."""
        self._recordings.clear()
        self.recorder.forget()


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

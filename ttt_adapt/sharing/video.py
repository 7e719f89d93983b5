"""OneVideo: what a user does with one video: step, adapt, predict, reset, save, load."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, FrameTypeError, StateError
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.model.threads import one_at_a_time
from ttt_adapt.model.uncopied import Uncopied
from ttt_adapt.sharing.model import SharedModel
from ttt_adapt.sharing.state_file import is_finite, read_state, write_state
from ttt_adapt.stream.report import StepReport
from ttt_adapt.stream.state import StreamState
from ttt_adapt.stream.tally import StreamStats


class OneVideo(Uncopied):
    """One video over a model that others may share.

    Args:
        shared: the model.
        state: the video.
    """

    instead = "Save the stream with state_dict(), and load it into an adapter on a copy of the model and the branch"

    def __init__(self, shared: SharedModel, state: StreamState) -> None:
        self._shared, self._held, self._lock = shared, state, shared.lock
        self._adapted: tuple[StreamState, Any] | None = None  # the frame that `adapt` took, until it is predicted

    @property
    def _state(self) -> StreamState:
        """The video."""
        return self._held

    @property
    def config(self) -> StreamConfig:
        """The choices of the algorithm."""
        return self._shared.config

    @property
    def last(self) -> StepReport | None:
        """The report of the last step; None at the beginning of a video."""
        return self._state.progress.last

    @property
    def drift(self) -> float | None:
        """How far the last predicted frame is from the source, in units of what is usual there.

        1 is the mean of the stills that the model was calibrated on; 95 % of them stay below `calibration.limit`. With
        BatchNorm, "far" is far from the training data, as its running statistics have them: where the stills are far
        from these too (`calibration.distance`), it tells little. None without calibrated statistics, and before the
        first prediction of a video. Reading it waits for the device.
        """
        with self._lock:
            found = self._shared.drift(self._state)
        value = math.nan if found is None else float(found)
        return None if math.isnan(value) else value  # NaN: no frame was predicted yet

    @property
    def window(self) -> int:
        """How many of the last frames the next step draws from at most, the next frame included."""
        return self._state.window_length

    @one_at_a_time
    def stats(self) -> StreamStats:
        """What became of the frames of this video so far, and how long steps take; on a GPU it waits for the device."""
        return self._state.tally.stats()

    @one_at_a_time
    def step(self, frame: Any) -> Any:
        """Adapt to a frame, then predict it.

        Args:
            frame: uint8 RGB [H, W, 3] (NumPy or tensor), or float [3, H, W] or [1, 3, H, W] as the model takes it.

        Returns:
            Exactly what the model (or `predict`) returns.

        Raises:
            FrameTypeError, FrameError: a frame that cannot be used, also where the model does not take its size;
                nothing has changed.
            EncoderError: the model's weights were replaced by other tensors; nothing has changed.
            StateError: somebody else changed mode, flags, precision, device or values of the model; once this is
                undone, the stream goes on.
            MemoryLimitError: out of memory. After any error, also in the prediction, the frame was not taken into the
                stream: window, size of the frames, random state and counters are as before. The weights are those of
                the last finished iteration (pulled toward the source, if `source_pull` asks for it), and at the
                beginning of a video those of the source.
        """
        state, begun = self._state, self._state.tally.clock()
        self._adapted = None
        with state.frame_time():
            taken = self._shared.take(state, frame)
            with self._shared.explained(taken), self._shared.undone_if_it_fails():
                output = self._shared.steps.step(state, taken)
        state.tally.took(begun)
        return output

    @one_at_a_time
    def adapt(self, frame: Any) -> StepReport:
        """Take the frame into the window and the gradient steps on it; arguments and errors as in `step`."""
        with self._state.frame_time():
            taken = self._shared.take(self._state, frame)
            with self._shared.explained(taken), self._shared.undone_if_it_fails():
                report = self._shared.steps.adapt(self._state, taken)
                self._state.tally.count(report)
        self._shared.steps.forget_answer()  # `predict` is asked for it anew
        self._adapted = self._state, frame
        return report

    @one_at_a_time
    def predict(self, frame: Any) -> Any:
        """Predict a frame with the weights as they are; it does not enter the stream.

        What the model's own pass keeps of it (a recurrent state, a count) is put back. The first call with the frame
        object that `adapt` took last is the other half of `step`: what its pass keeps stays.
        """
        state = self._state
        half = self._adapted is not None and self._adapted[0] is state and self._adapted[1] is frame
        with state.call_time():
            taken = self._shared.take(state, frame)
            with self._shared.explained(taken):
                output = self._shared.steps.predict(taken, stays=half)
        if half:
            self._adapted = None
        return output

    @one_at_a_time
    def forward(self, x: Tensor) -> Any:
        """What the model (or `predict`) returns for x [1, 3, H, W], as it takes it, of any size; x is not checked.

        It does not enter the stream: what the model's own pass keeps of it is put back.
        """
        with self._state.call_time():
            self._shared.enter(self._state)
            return self._shared.steps.predict(TakenFrame(x), stays=False)

    @contextmanager
    def statistics(self) -> Iterator[None]:
        """Inside the block, the model normalises a frame as `predict` does: for code that calls the model itself.

        Other threads that call the adapter wait for the end of the block.

        Raises:
            StateError: the adapter is detached; or, inside the block, another stream of it is called.
        """
        with self._lock, self._shared.staying(self._state), self._shared.steps.statistics():
            yield

    def stream(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Predictions for `frames`, one by one as they come: lazy, only the window is kept.

        Raises:
            FrameTypeError: frames is nothing to go through.
        """
        if not isinstance(frames, Iterable) and not hasattr(frames, "__getitem__"):
            raise FrameTypeError(
                f"frames is {frames!r}; expected frames one by one, in a list or from open_video(path)"
            )
        return (self.step(frame) for frame in frames)

    @one_at_a_time
    def reset(self) -> None:
        """Begin a new video: source weights, empty window, fresh optimizer, the seed again, counters at 0.

        Raises:
            StateError: somebody else changed precision, device, or weights that the stream does not adapt.
        """
        self._shared.reset(self._state)
        self._adapted = None

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """A copy of all of the stream's state: weights, optimizer, window, random state, counters.

        What the model's own passes keep of the video (a recurrent state, a count) is in it, where it consists of
        tensors and plain values.

        Raises:
            StateError: somebody else changed the model, as for `step`; or the model keeps other objects of the video.
        """
        return self._shared.save(self._state)

    @one_at_a_time
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; a state that does not fit changes nothing.

        Raises:
            CheckpointError: the state is damaged, or of other weights, another model, configuration, objective,
                preprocessing or later version.
            StateError: somebody else changed the model, as for `reset`.
        """
        self._shared.load(self._state, state)
        self._adapted = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream's state into a .safetensors file, without pickle: `state_dict` as a file.

        It is written whole or not at all: an existing file stays until the new one is complete, and outlives what kills
        the process in the middle. It has its version, a hash of its content, and what it belongs to.

        Raises:
            CheckpointError: the file cannot be written.
            StateError: as for `state_dict`; or the state holds numbers that are not finite, which `load` would refuse.
        """
        saved = self.state_dict()
        if not is_finite(saved):
            raise StateError(
                f"the stream holds numbers that are not finite, so {path} is not written: reset() begins it anew"
            )
        try:
            write_state(Path(path), saved)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on exactly where `save` wrote the file; one that is damaged, or does not fit, changes nothing.

        Raises:
            CheckpointError: there is no such file, it is torn, changed by as little as a bit, or of another kind; or as
                for `load_state_dict`.
            StateError: as for `load_state_dict`.
        """
        self.load_state_dict(read_state(Path(path)))

"""A model in the hands of an adapter: which video is in it, what others change in it, what is undone, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.eager import explained_memory_errors
from ttt_adapt.engine.frame_size import explained_sizes, known_sizes
from ttt_adapt.errors import StateError
from ttt_adapt.model.frames import FrameIntake, TakenFrame
from ttt_adapt.model.outside_changes import OutsideChanges
from ttt_adapt.model.ownership import Ownership
from ttt_adapt.sharing.frame import FrameSteps
from ttt_adapt.sharing.parking import Parking
from ttt_adapt.stream.check_saved import FORMAT, check_compatible, check_source, current_format
from ttt_adapt.stream.frame_look import thumbnail
from ttt_adapt.stream.state import StreamState, check_same_model, swap


@dataclass(eq=False)
class SharedModel:
    """A model that is adapted, for one video at a time. Who calls it holds `lock`.

    Attributes:
        config: the choices of the algorithm.
        lock: of the model.
        present: the video whose weights are in the model.
        begin: makes a video whose weights are those in the model.
        intake: how frames come in.
        steps: what happens to a frame.
        outside: notices what somebody else changes.
        ownership: gives the model back.
        setting: what a stream depends on beside its configuration and its tensors.
        source: hashes of the source weights.
        parking: where videos wait that have no place on the device.
    """

    config: StreamConfig
    lock: Any
    present: StreamState
    begin: Callable[[], StreamState]
    intake: FrameIntake
    steps: FrameSteps
    outside: OutsideChanges
    setting: Callable[[], Mapping[str, Any]]
    source: Callable[[], Mapping[str, str]]
    parking: Parking = field(default_factory=Parking)
    ownership: Ownership = field(init=False)
    _staying: StreamState | None = field(init=False, default=None)
    _drifts: WeakKeyDictionary[StreamState, Tensor] = field(init=False, default_factory=WeakKeyDictionary)

    def check_attached(self) -> None:
        """Refuse to go on with a model that was given back.

        Raises:
            StateError: it was.
        """
        if self.ownership.ended:
            raise StateError("this adapter is detached and its model is free: make a new StreamAdapter")

    # ---- one frame

    def take(self, state: StreamState, frame: Any) -> TakenFrame:
        """Put a video into the model, and take its next frame as the model takes it, checked against the video so far.

        Raises:
            FrameTypeError, FrameError: a frame that cannot be used.
            StateError, EncoderError: see `enter`.
        """
        self.enter(state)
        taken = self.intake.take(frame, state.window.frame_shape)
        return taken if state.guards is None else taken._replace(small=thumbnail(frame))

    def explained(self, taken: TakenFrame) -> AbstractContextManager[None]:
        """Errors inside the block that come from the size of a frame of the present video say so."""
        known = partial(known_sizes, self.steps.objective, self.present)
        return explained_sizes(taken, self.present.window.frame_shape, known, self.steps.attempt)

    @contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """If the block raises, the frame of the present video was never there; see `StreamState.undone_if_it_fails`."""
        try:
            with self.present.undone_if_it_fails():
                yield
        except BaseException:
            self.steps.forget_answer()
            self.steps.engine.forget()
            self.outside.accept()  # the undo wrote to the model
            raise

    # ---- several videos

    def enter(self, state: StreamState) -> None:
        """Put a video into the model, in place of the one that is there; nothing is copied where it is there.

        What the model's own passes keep of a video (a recurrent state, a count) stays with that video.

        Raises:
            StateError: the model was given back, somebody else changed it, or the video is of another adapter; nothing
                has changed.
        """
        self.check_attached()
        if self._staying is not None and state is not self._staying:
            raise StateError("another stream is called inside of `with stream.statistics()`: call it behind the block")
        self._finish_undo()
        self.outside.check()
        if state is self.present:
            return
        check_same_model(self.present, state)
        with explained_memory_errors(self.config):
            self.parking.fetch(state)
        self._exchange(state)
        self.parking.make_room(state)

    @contextmanager
    def staying(self, state: StreamState) -> Iterator[None]:
        """Inside the block, this video is in the model, and no other can be put in.

        Raises:
            StateError: as for `enter`.
        """
        self.check_attached()
        if state is not self.present:
            self.enter(state)
        before, self._staying = self._staying, state
        try:
            yield
        finally:
            self._staying = before

    def _exchange(self, state: StreamState) -> None:
        """Put a video into the model, in place of the one that is there; where it fails, that one stays."""
        before, drift = self.present, self.steps.drift()
        if drift is not None:
            self._drifts[before] = drift
        self.steps.forget_passes()
        try:
            with explained_memory_errors(self.config):
                swap(before, state)
        finally:
            self.present = before if before.inside or not state.inside else state
            self.outside.accept()

    def _finish_undo(self) -> None:
        """Bring the present video back whole, where an exchange failed and its undo did too, for want of memory."""
        if not self.present.inside:
            with explained_memory_errors(self.config):
                self.present.enter()
            self.outside.accept()

    def drift(self, state: StreamState) -> Tensor | None:
        """How far the frame that was predicted last of a video is from the source; see `FrameSteps.drift`."""
        now = self.steps.drift() if state is self.present else None
        return self._drifts.get(state) if now is None else now

    def another(self) -> StreamState:
        """Another video at its beginning; it is not in the model."""
        self.check_attached()
        state = self.begin()
        state.leave()  # as one that did not move: no weights are copied
        state.passes.reset()
        return state

    def reset(self, state: StreamState) -> None:
        """Put a video into the model, and begin it anew.

        Raises:
            StateError: somebody else changed precision, device, or weights that the stream does not adapt.
        """
        self._enter_to_write(state)
        self.steps.engine.forget()
        self._forget_passes()
        state.reset()
        self.outside.accept()

    def _enter_to_write(self, state: StreamState) -> None:
        """As `enter`; what somebody else wrote to the weights of the video is no error, since they are written anew."""
        if state is not self.present:
            self.enter(state)
        self.check_attached()
        self.outside.check_unadapted()

    def _forget_passes(self) -> None:
        """Let go of the last prediction and drift of the present video: it begins anew."""
        self.steps.forget_passes()
        self._drifts.pop(self.present, None)

    # ---- saving

    def save(self, state: StreamState) -> dict[str, Any]:
        """A copy of all of a video's state, with what it belongs to.

        Raises:
            StateError: somebody else changed the model.
        """
        self.enter(state)
        about = {"config": asdict(self.config), "setting": self.setting(), "source": self.source()}
        return {"format": FORMAT, **about, **state.state_dict()}

    def load(self, state: StreamState, saved: Mapping[str, Any]) -> None:
        """Let a video go on where it was saved; what does not fit changes nothing.

        Raises:
            CheckpointError: what was saved is damaged, or of something else.
            StateError: somebody else changed the model, as for `reset`.
        """
        self._enter_to_write(state)
        saved = current_format(saved)
        check_compatible(saved, self.config, self.setting())
        with explained_memory_errors(self.config):
            take = state.prepare_load(saved)
            check_source(saved, self.source)
            self.steps.engine.forget()
            take()
        self.outside.accept()
        self._forget_passes()

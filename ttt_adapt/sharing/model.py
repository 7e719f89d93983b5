"""A model in the hands of an adapter: which video is in it, what others change in it, what is undone, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.eager import explained_memory_errors
from ttt_adapt.errors import StateError
from ttt_adapt.model.frames import FrameIntake, TakenFrame
from ttt_adapt.model.outside_changes import OutsideChanges
from ttt_adapt.model.ownership import Ownership
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.model.start_state import StartState
from ttt_adapt.sharing.frame import FrameSteps
from ttt_adapt.stream.check_saved import FORMAT, check_compatible, check_source, current_format
from ttt_adapt.stream.frame_look import thumbnail
from ttt_adapt.stream.state import StreamState, swap


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
        passes: what the model's own passes change in it.
        start: what the model's own passes may change, as it was when the adapter was made.
        outside: notices what somebody else changes.
        ownership: gives the model back.
        setting: what a stream depends on beside its configuration and its tensors.
        source: hashes of the source weights.
    """

    config: StreamConfig
    lock: Any
    present: StreamState
    begin: Callable[[], StreamState]
    intake: FrameIntake
    steps: FrameSteps
    passes: PassState
    start: StartState
    outside: OutsideChanges
    setting: Callable[[], Mapping[str, Any]]
    source: Callable[[], Mapping[str, str]]
    ownership: Ownership = field(init=False)
    _memories: WeakKeyDictionary[StreamState, list[Any]] = field(init=False, default_factory=WeakKeyDictionary)

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
        self.outside.check()
        if state is self.present:
            return
        memory = self.passes.memory()
        swap(self.present, state)
        if memory:
            self.start.put_back()
            self.passes.remember(self._memories.pop(state, ()))
            self._memories[self.present] = memory
        self.outside.accept()
        self.steps.forget_passes()
        self.present = state

    def another(self) -> StreamState:
        """Another video at its beginning; it is not in the model."""
        self.check_attached()
        state = self.begin()
        state.weights.leave()
        state.weights.reset()
        return state

    def reset(self) -> None:
        """Begin the present video anew.

        Raises:
            StateError: somebody else changed precision, device, or weights that the stream does not adapt.
        """
        self.check_attached()
        self.outside.check_unadapted()
        self.steps.engine.forget()
        self.steps.forget_passes()
        self.start.put_back()
        self.present.reset()
        self.outside.accept()

    # ---- saving

    def save(self) -> dict[str, Any]:
        """A copy of all of the present video's state, with what it belongs to.

        Raises:
            StateError: somebody else changed the model.
        """
        self.check_attached()
        self.outside.check()
        about = {"config": asdict(self.config), "setting": self.setting(), "source": self.source()}
        return {"format": FORMAT, **about, **self.present.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Let the present video go on where a state was saved; one that does not fit changes nothing.

        Raises:
            CheckpointError: the state is damaged, or of something else.
            StateError: somebody else changed the model, as for `reset`.
        """
        self.check_attached()
        self.outside.check_unadapted()
        saved = current_format(state)
        check_compatible(saved, self.config, self.setting())
        with explained_memory_errors(self.config):
            take = self.present.prepare_load(saved)
            check_source(saved, self.source)
            self.steps.engine.forget()
            take()
        self.outside.accept()
        self.steps.forget_passes()

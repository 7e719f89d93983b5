"""StreamState: everything that belongs to one video, so that it can be reset, saved, loaded and undone in one place.

To add to the state, write a `Part`, a field for it, and what makes it in `StreamState.begin`. Nothing else changes: the
methods of `StreamState` go through the fields. States that were saved without the field do not load any more, unless
`check_saved.current_format` adds it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import CheckpointError, StateError
from ttt_adapt.model.frames import FrameIntake, scaling
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.model.parameters import dense
from ttt_adapt.model.uncopied import Uncopied
from ttt_adapt.schema import check_fields, shown, whole
from ttt_adapt.stream.adapted_weights import AdaptedTensors, AdaptedWeights
from ttt_adapt.stream.auto_window import AutoWindow
from ttt_adapt.stream.budget import Budget
from ttt_adapt.stream.guards import Guards
from ttt_adapt.stream.optimizer import StreamOptimizer
from ttt_adapt.stream.pass_memory import PassMemory
from ttt_adapt.stream.report import StepReport
from ttt_adapt.stream.schedule import SurpriseGate
from ttt_adapt.stream.source import SourceWeights
from ttt_adapt.stream.state_part import Part
from ttt_adapt.stream.tally import Tally
from ttt_adapt.stream.window import FrameWindow

Self = TypeVar("Self", bound="StreamState")


class RandomState(Part):
    """The random source of draws, crops and masks.

    Args:
        seed: where every video begins.
        device: of the source.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)

    def reset(self) -> None:
        """Begin with the seed again."""
        self.generator.manual_seed(self._seed)

    def state_dict(self) -> Tensor:
        """The state of the generator, uint8 [n]."""
        return self.generator.get_state()

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        own = self.generator.get_state()
        if not isinstance(saved, Tensor) or not dense(saved) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise CheckpointError(
                f"the state's random state does not fit this adapter: {shown(saved)}, expected {shown(own)}; go on on "
                "the same kind of device"
            )
        try:
            state = saved.detach().cpu().clone()
            scratch = torch.Generator(self.generator.device)
            scratch.set_state(state)
            if not torch.equal(scratch.get_state(), state):
                raise ValueError("a generator in this state has another one")
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"the state's random state does not fit this adapter ({error}): go on on the same kind of device"
            ) from error
        return lambda: self._put_back(state)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        state = self.generator.get_state()
        return lambda: self._put_back(state)

    def _put_back(self, state: Tensor) -> None:
        self.generator.set_state(state)


class Progress(Part):
    """How far the video is.

    Attributes:
        frame_index: position of the next frame, from 0.
        last: the report of the last step; None at the beginning and after a load.
    """

    frame_index: int = 0
    last: StepReport | None = None

    def count(self, report: StepReport) -> None:
        """Go on to the next frame."""
        self.last = report
        self.frame_index += 1

    def reset(self) -> None:
        """Begin at frame 0."""
        self.frame_index, self.last = 0, None

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"frame_index": self.frame_index}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        check_fields(saved, {"frame_index": whole()}, "the state's progress")
        index = saved["frame_index"]
        return lambda: self._put_back(index, None)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        index, last = self.frame_index, self.last
        return lambda: self._put_back(index, last)

    def _put_back(self, index: int, last: StepReport | None) -> None:
        self.frame_index, self.last = index, last


@dataclass(eq=False)
class StreamState(Uncopied):
    """One video.

    Attributes:
        weights: the adapted weights and statistics (implicit memory).
        optimizer: takes the gradient steps.
        window: the last frames (explicit memory).
        random: the source of draws, crops and masks.
        gate: the losses that the surprise gate compares with.
        auto: chooses the length of the window; None where the configuration fixes it.
        passes: what the model's own passes keep of the video.
        progress: the position in the video, and the last report.
        tally: what became of its frames.
        guards: watches over it; None where the configuration has none.
        budget: the time of a frame; None where it is not limited.
    """

    instead = "`StreamAdapter.new_state()` makes another video, and `state_dict()` a copy of one in plain values"

    weights: AdaptedWeights
    optimizer: StreamOptimizer
    window: FrameWindow
    random: RandomState
    gate: SurpriseGate
    auto: AutoWindow | None
    passes: PassMemory
    progress: Progress
    tally: Tally
    guards: Guards | None
    budget: Budget | None

    @classmethod
    def begin(
        cls: type[Self],
        config: StreamConfig,
        adapted: AdaptedTensors,
        source: SourceWeights,
        make_optimizer: Callable[[], torch.optim.Optimizer],
        intake: FrameIntake,
        memory: ModelMemory,
    ) -> Self:
        """A new video, whose weights are those in the model.

        Args:
            config: the choices of the algorithm.
            adapted: what changes, from `adapted_tensors`.
            source: their source values.
            make_optimizer: makes a fresh optimizer.
            intake: how frames come in.
            memory: what the model itself keeps of a video.
        """
        normalize = scaling(intake.preprocess, intake.dtype)
        gone_back: dict[str, Part] = {
            "weights": AdaptedWeights(adapted.everything, source, undone=list(adapted.statistics)),
            "optimizer": StreamOptimizer(make_optimizer),
            "random": RandomState(config.seed, intake.device),
            "gate": SurpriseGate(),
            "passes": PassMemory(memory),
        }
        auto = AutoWindow(config.capacity, draws=config.batch_size) if config.window == "auto" else None
        together = gone_back if auto is None else {**gone_back, "auto": auto}
        return cls(
            **gone_back,  # type: ignore[arg-type]
            window=FrameWindow(config.capacity, normalize, intake.dtype, intake.device),
            auto=auto,
            progress=Progress(),
            tally=Tally(),
            guards=Guards(intake.device, together) if config.guards else None,
            budget=None if config.max_ms is None else Budget(config.max_ms, intake.device),
        )

    @property
    def parts(self) -> dict[str, Part | None]:
        """Name of a field -> what is there; None for a part that the configuration does not need."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def _present(self) -> dict[str, Part]:
        """`parts` without those that the configuration does not need; an empty window is there, though it is falsy."""
        return {name: part for name, part in self.parts.items() if part is not None}

    @property
    def window_length(self) -> int:
        """How many of the last frames a draw sees at most, the current one included."""
        length = self.window.capacity if self.auto is None else self.auto.length
        newest = None if self.guards is None else self.guards.newest
        return length if newest is None else min(length, newest)

    def draw(self, config: StreamConfig) -> Tensor:
        """A batch [B, 3, H, W] from the staged frame and the window."""
        crop: Any = config.crop_size
        return self.window.draw(config.batch_size, self.random.generator, crop, self.window_length)

    @property
    def inside(self) -> bool:
        """Whether the video is in the model."""
        return self.weights.inside and self.passes.inside

    def leave(self) -> None:
        """Copy the video out of the model: what the model keeps of it, and its weights.

        Raises:
            StateError: it is not in the model.
        """
        self.passes.leave()
        self.weights.leave()

    def enter(self) -> None:
        """Move the video into the model, as far as it is not there."""
        self.weights.enter()
        self.passes.enter()

    def frame_time(self) -> AbstractContextManager[None]:
        """Around all that is done with a frame: where its time is limited, it goes by."""
        return nullcontext() if self.budget is None else self.budget.frame()

    def call_time(self) -> AbstractContextManager[None]:
        """Around a prediction by itself: its time goes by too."""
        return nullcontext() if self.budget is None else self.budget.spent()

    def reset(self) -> None:
        """Begin a new video."""
        for part in self._present.values():
            part.reset()

    @contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """If the block raises, every part goes back to its `mark`: window, counters and random state are as before.

        Weights stay as the last finished gradient step left them. A video whose weights were those of the source before
        the block has these again, and a new optimizer.
        """
        moved = self.weights.moved
        with ExitStack() as undo:
            with _writing():
                for part in self._present.values():
                    undo.callback(_writing()(part.mark()))
            if not moved:
                undo.callback(_writing()(self._begin_weights_again))
            yield
            undo.pop_all()  # nothing to undo

    def _begin_weights_again(self) -> None:
        """Go back to the source weights, if a step of a video at its beginning moved them."""
        if self.weights.moved:
            self.weights.reset()
            self.optimizer.renew()

    def state_dict(self) -> dict[str, Any]:
        """A copy of every part, under the name of its field; None for a part that is not there."""
        return {name: None if part is None else part.state_dict() for name, part in self.parts.items()}

    def prepare_load(self, saved: Mapping[str, Any]) -> Callable[[], None]:
        """Check what `state_dict` returned, and change nothing.

        Returns:
            A function that takes all parts over.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """
        parts = self._present
        if missing := [name for name in parts if name not in saved]:
            raise CheckpointError(f"this is no state of a StreamAdapter: {', '.join(missing)} missing")
        with _writing():
            takers = [part.prepare_load(saved[name]) for name, part in parts.items()]

        @_writing()
        def take() -> None:
            for each in takers:
                each()

        return take

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, all parts or none; errors as in `prepare_load`."""
        self.prepare_load(saved)()

    def free(self) -> None:
        """Let go of the memory on the device; `take_back` goes on with what `state_dict` returned before."""
        for part in self._present.values():
            part.free()

    def take_back(self, saved: Mapping[str, Any]) -> None:
        """Go on exactly as before `free`, with the last report too."""
        moved, last = self.weights.moved, self.progress.last
        self.load_state_dict(saved)
        if not moved:
            self.weights.reset()  # which needs no copies
        self.progress.last = last


@contextmanager
def _writing() -> Iterator[None]:
    """Inside the block, values are written into tensors that a model may train later, without a graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_same_model(old: StreamState, new: Any) -> None:
    """Refuse what is no video of the same model.

    Raises:
        StateError: it is not.
    """
    if not isinstance(new, StreamState) or not new.weights.shares_model_with(old.weights):
        raise StateError("this is no state of this adapter: expected one from new_state() or swap() of this adapter")


def swap(old: StreamState, new: StreamState) -> None:
    """Put the weights and the memory of another video into the model, in place of those that are there.

    Where anything raises (out of memory, Ctrl-C), the old video is in the model again, and the new one is not.

    Raises:
        StateError: the videos are not of the same model.
    """
    check_same_model(old, new)
    if old is new:
        return
    with ExitStack() as undo:
        for each in (old.passes, old.weights, new.passes, new.weights):  # undone from the last to the first
            undo.callback(each.place())
        old.leave()
        new.enter()
        undo.pop_all()  # nothing to undo

"""StreamAdapter: online test-time training on a video stream, in the order of the paper.

"Test-Time Training on Video Streams" (Wang et al.), section 4: for each frame, push it into the window, take a gradient
step on the reconstruction of a batch drawn from the window, then predict the frame with the updated encoder.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.config import StreamConfig
from ttt_adapt.engine.choose import choose_engine
from ttt_adapt.engine.eager import explained_memory_errors
from ttt_adapt.engine.frame_size import explained_sizes, known_sizes
from ttt_adapt.engine.gradient_step import GradientStep
from ttt_adapt.errors import ConfigError, StateError
from ttt_adapt.model.calibration import Calibration, settled_config
from ttt_adapt.model.correction import correction_of
from ttt_adapt.model.frames import FrameIntake, Preprocess, TakenFrame, default_preprocess
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.model.norms import frame_statistics, norm_layers, updating_norms
from ttt_adapt.model.outside_changes import OutsideChanges
from ttt_adapt.model.ownership import Ownership, check_unowned, check_unshared
from ttt_adapt.model.threads import lock_of, one_at_a_time
from ttt_adapt.model.uncopied import Uncopied
from ttt_adapt.model.wrappers import unwrapped
from ttt_adapt.objectives.base import Objective
from ttt_adapt.objectives.check_objective import check_attached, check_objective, warn_if_untrained
from ttt_adapt.objectives.forward_only import ForwardOnly
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.stream.adapted_weights import adapted_tensors
from ttt_adapt.stream.auto_window import gradient_sketch
from ttt_adapt.stream.check_saved import FORMAT, check_compatible, check_source, current_format, setting_of, source_of
from ttt_adapt.stream.optimizer import ParamGroups, adamw, parameter_groups, total_norm
from ttt_adapt.stream.report import StepReport
from ttt_adapt.stream.schedule import is_due
from ttt_adapt.stream.source import SourceWeights
from ttt_adapt.stream.state import StreamState, swap


class StreamAdapter(Uncopied):
    """Keeps a model learning from the video it is watching: `prediction = adapter.step(frame)`.

    While attached, the model is in eval mode and its encoder's weights change in place. `detach()` (or leaving the
    `with` block) gives it back with its source weights and its own flags. Several threads may call it: their calls run
    one after the other. It is not copied and not pickled: `state_dict()` is.

    Args:
        model: the trained model, or a wrapper around the model that the branch is on: it is then what predicts.
        branch: an `MAEBranch` or any other `Objective` on this model. Without it, `encoder` and the other keywords of
            `MAEBranch.attach` make one.
        config: the choices of the algorithm; by default `StreamConfig()`, or for a calibrated model
            `StreamConfig.online()` with the settings that calibration chose.
        calibration: what the model is like on its own ground, from `ttt_adapt.calibrate`; by default the branch's.
            With a calibration and without a branch, the stream takes no gradient step: frames are corrected by
            calibrated statistics alone.
        preprocess: uint8 RGB [H, W, 3] -> float [1, 3, H, W] as the model takes it; for timm models the model's own. It
            may return a tuple (that, context): then `predict(x, context)` is called for this frame.
        predict: how the model is called on one preprocessed frame [1, 3, H, W]; `model(x)` by default.
        optimizer: parameter groups -> optimizer; AdamW by default. The groups carry `lr`, `weight_decay` and `name`.

    Raises:
        ConfigError: neither or both of `branch` and `encoder`, a branch of another model, an unknown keyword, or an
            engine or precision that is not available here.
        EncoderError: see `MAEBranch.attach`.
        StateError: the model already has an adapter, or shares what would be adapted with a model that has one.
    """

    instead = "Save the stream with state_dict(), and load it into an adapter on a copy of the model and the branch"

    def __init__(
        self,
        model: nn.Module,
        branch: Objective | None = None,
        *,
        config: StreamConfig | None = None,
        calibration: Calibration | None = None,
        preprocess: Preprocess | None = None,
        predict: Callable[..., Any] | None = None,
        optimizer: Callable[[ParamGroups], torch.optim.Optimizer] | None = None,
        **attach: Any,
    ) -> None:
        check_objective(model, branch, attach, needed=calibration is None)
        inside = unwrapped(model if branch is None else branch.model)
        calibration = getattr(branch, "calibration", None) if calibration is None else calibration
        self.config = config = settled_config(config, calibration)
        self._handed, plain = model, config.norm_stats == "frozen" or unwrapped(model) is not inside
        self._predict = (model if plain else inside) if predict is None else predict  # no hook reaches what is compiled
        model = model if branch is None else check_attached(model, branch)
        check_unowned(model)
        check_unowned(inside)
        self._lock = lock_of(inside)
        self._correction = correction_of(inside, config, calibration)
        if branch is None and not attach and self._correction is None:
            raise ConfigError(
                f"norm_stats is {config.norm_stats!r}, so the calibration would not be used, and without a branch "
                'nothing would adapt: leave config out, or set norm_stats="calibrated"'
            )
        self._limit = float("inf") if calibration is None else calibration.limit
        self._answer: tuple[TakenFrame, Any] | None = None
        self._calibrated_as = calibration.digest if calibration is not None and self._correction is not None else None
        self._owns_branch = branch is None
        if branch is None:
            branch = MAEBranch.attach(model, **attach) if attach else ForwardOnly(model)
        self._branch: Objective = branch
        self._norms = norm_layers(model)
        self._gradient = step = GradientStep(self._branch, config)
        own = default_preprocess(model, step.device)
        preprocess = own if preprocess is None else preprocess
        crop: Any = config.crop_size
        self._intake = FrameIntake(preprocess, step.device, step.dtype, crop, expects=own)
        moving = self._norms if config.norm_stats == "ema" else []
        adapted = adapted_tensors(self._branch, step.encoder, step.own, moving, step.half.copies)
        tensors = adapted.everything
        check_unshared(tensors)
        modules = [m for m in (model, self._branch) if isinstance(m, nn.Module)]
        groups = parameter_groups(step.encoder, step.own, modules, config, step.half.trained)
        make = partial(_fresh, optimizer or adamw, groups)
        source = SourceWeights(tensors, whole=[*adapted.statistics, *adapted.memory, *step.half.copies])
        self._memory = memory = ModelMemory(model, step.pass_state, tensors.values())
        self._begin = partial(StreamState.begin, config, adapted, source, make, self._intake, memory)
        self._state = self._begin()
        self._engine = choose_engine(step, self._state.optimizer.optimizer)
        self._branch_training = bool(getattr(self._branch, "training", False))
        self._source = functools.cache(partial(source_of, self._branch, source, memory.start))
        roots = [model, *([self._branch] if isinstance(self._branch, nn.Module) else [])]
        self._outside = OutsideChanges(roots, step.adapted, adapted.statistics.values(), step.replacements)
        warn_if_untrained(self._branch, config)  # before the model changes: a warning may be an error
        self._ownership = Ownership(self, model, tensors, step.parameters, source.restore, memory.start, inside)
        self._branch.train(False)
        self._outside.accept_modes()

    @property
    def branch(self) -> Objective:
        """The objective that the stream is adapted with."""
        return self._branch

    @property
    def state(self) -> StreamState:
        """All that belongs to the video that is being watched."""
        return self._state

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
        found = None if self._correction is None else self._correction.drift()
        value = math.nan if found is None else float(found)
        return None if math.isnan(value) else value  # NaN: no frame was predicted yet

    @property
    def window(self) -> int:
        """How many of the last frames the next step draws from at most, the next frame included."""
        return self._state.window_length

    @property
    def engine(self) -> tuple[str, str]:
        """How a step runs, and why so."""
        return self._engine.name, self._engine.reason

    # ---- what a user calls

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
        taken = self._take(frame)
        with self._explained(taken), self._undone_if_it_fails():
            self._adapt(taken)
            return self._predict_frame(taken)

    @one_at_a_time
    def adapt(self, frame: Any) -> StepReport:
        """Take the frame into the window and the gradient steps on it; arguments and errors as in `step`."""
        taken = self._take(frame)
        with self._explained(taken), self._undone_if_it_fails():
            report = self._adapt(taken)
        self._answer = None  # `predict` is asked for it anew
        return report

    @one_at_a_time
    def predict(self, frame: Any) -> Any:
        """Predict a frame with the weights as they are; it does not enter the stream."""
        taken = self._take(frame)
        with self._explained(taken):
            return self._predict_frame(taken)

    @one_at_a_time
    def forward(self, x: Tensor) -> Any:
        """What the model (or `predict`) returns for x [1, 3, H, W], as it takes it, of any size; x is not checked."""
        self._check_attached()
        self._outside.check()
        return self._predict_frame(TakenFrame(x))

    @contextmanager
    def statistics(self) -> Iterator[None]:
        """Inside the block, the model normalises a frame as `predict` does: for code that calls the model itself.

        Other threads that call the adapter wait for the end of the block.
        """
        with self._lock, self._statistics():
            yield

    def _statistics(self) -> AbstractContextManager[None]:
        config = self.config
        if self._correction is not None:
            return self._correction.active()
        return frame_statistics(config.norm_stats, self._norms, config.frame_share)

    def stream(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Predictions for `frames`, one by one as they come: lazy, only the window is kept."""
        for frame in frames:
            yield self.step(frame)

    @one_at_a_time
    def reset(self) -> None:
        """Begin a new video: source weights, empty window, fresh optimizer, the seed again, counters at 0.

        Raises:
            StateError: somebody else changed precision, device, or weights that the stream does not adapt.
        """
        self._check_attached()
        self._outside.check_unadapted()
        self._engine.forget()
        self._forget_passes()
        self._state.reset()
        self._outside.accept()

    @one_at_a_time
    def detach(self, keep_adapted: bool = False) -> nn.Module:
        """Give the model back as it was, with its source weights; may be called twice.

        Args:
            keep_adapted: keep the adapted weights instead, in the model and in the branch.
        """
        if not self._ownership.ended:
            self._engine.forget()
            self._forget_passes()
            self._branch.train(self._branch_training)  # first: a decoder may hold layers of the model's own
            self._ownership.give_back(keep_adapted)
            self._state.weights.release()
            if self._owns_branch:
                self._branch.detach()
        return self._handed

    def __enter__(self) -> StreamAdapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # ---- one frame, in the paper's order

    def _take(self, frame: Any) -> TakenFrame:
        """A frame as the model takes it, checked against the stream so far."""
        self._check_attached()
        self._outside.check()
        return self._intake.take(frame, self._state.window.frame_shape)

    def _adapt(self, taken: TakenFrame) -> StepReport:
        started = time.perf_counter()
        if not self._gradient.parameters or not self.config.iterations:
            return self._only_count(started, "iterations" if self._gradient.parameters else "no branch")
        state, numbers, sketch = self._state, None, None
        self._answer = None
        with self._stepping():
            self._engine.check()
            state.window.stage(taken.x[0], taken.pixels)
            skipped, surprise = self._decide(taken)
            if not skipped:
                try:
                    numbers, sketch = self._engine.update(self._update, state, taken)
                finally:  # not in `_update`: a replayed one runs no Python
                    state.weights.moved = True
            state.window.commit()
            if surprise is not None:
                state.gate.record(surprise)
            if state.auto is not None and sketch is not None and numbers is not None and bool(numbers[0, 1].isfinite()):
                state.auto.update(sketch.tolist())
            ms = (time.perf_counter() - started) * 1e3
            index, shut = state.progress.frame_index, surprise if skipped == "gate" else None
            report = StepReport(index, skipped, ms, numbers, shut)
            state.progress.count(report)
        return report

    def _only_count(self, started: float, reason: str) -> StepReport:
        """A frame of a stream that takes no gradient steps."""
        progress = self._state.progress
        report = StepReport(progress.frame_index, reason, (time.perf_counter() - started) * 1e3)
        progress.count(report)
        return report

    def _decide(self, taken: TakenFrame) -> tuple[str, float | None]:
        """Whether to adapt to this frame: why not, or "" for yes; and the loss that the surprise gate compared."""
        due = is_due(self._state.progress.frame_index, self.config.every)
        if due and self.config.gate == "none":
            return "", None
        if self.config.pull_fraction == 1.0:  # without memory, a frame that is skipped is predicted by the source too
            self._state.weights.pull(1.0)
        if not due:
            return "every", None
        if self.config.gate == "calibrated":
            return "gate" if self._is_usual(taken) else "", None
        batch = self._state.draw(self.config)
        surprise = float(self._engine.loss(batch, self._state.random.generator))
        return "" if self._state.gate.is_open(surprise) else "gate", surprise

    def _is_usual(self, taken: TakenFrame) -> bool:
        """Whether a frame looks usual to the source weights, which predict it then."""
        weights = self._state.weights
        with weights.as_source(), self._memory.predicting(stays=False):
            output, drift = self._predict_frame(taken), self.drift
        if drift is None or not drift <= self._limit:
            return False
        if weights.moved:
            weights.pull(1.0)
            self._engine.restart(self._state.optimizer)
        if not self._memory.changes:
            self._answer = taken, output  # of the source weights, which are in the model now
        return True

    def _update(self, taken: TakenFrame) -> tuple[Tensor, Tensor | None]:
        """What a frame does to the weights; nothing here waits for the device.

        Returns:
            [iterations, 2], the loss and gradient norm of each step; and for the automatic window a sketch of the
            frame's first gradient.
        """
        self._state.weights.pull(self.config.pull_fraction)
        if self.config.pull_fraction:
            self._gradient.half.round()  # the pull moves the float32 copies, and these are the weights
        self._move_statistics(taken)
        if self.config.restart_optimizer or self.config.pull_fraction == 1.0:
            self._engine.restart(self._state.optimizer)
        steps = [self._gradient_step(i) for i in range(self.config.iterations)]
        return torch.stack([numbers for numbers, _ in steps]), steps[0][1]

    @torch.no_grad()
    def _move_statistics(self, taken: TakenFrame) -> None:
        """Let the clean frame into the running statistics of BatchNorm, if the configuration says so."""
        if self.config.norm_stats == "ema" and self._norms:
            with self._memory.predicting(stays=False), updating_norms(self._norms, self.config.frame_share):
                self._predict(taken.x, *taken.context)

    def _gradient_step(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """Draw a batch and step if the gradient is finite: the loss and gradient norm, and a sketch of the gradient."""
        state, parameters = self._state, self._gradient.parameters
        batch = state.draw(self.config)
        with self._gradient.learning(state.progress.frame_index * self.config.iterations + iteration):
            loss = self._engine.gradients(batch, state.random.generator)
            norm = total_norm([p.grad for p in parameters if p.grad is not None])
            sketch = gradient_sketch(parameters) if iteration == 0 and state.auto is not None else None
            if self.config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
            self._engine.take_step(state.optimizer, norm.isfinite())
        return torch.stack([loss.float(), norm.float()]), sketch

    def _predict_frame(self, taken: TakenFrame) -> Any:
        config, answer = self.config, self._answer
        if answer is not None and answer[0] is taken:
            self._answer = None
            return answer[1]
        with torch.no_grad(), explained_memory_errors(config), self._memory.predicting():
            output = self._engine.predict(self._predict, taken, self._statistics())
        self._outside.accept_modes()
        return output

    def _explained(self, taken: TakenFrame) -> AbstractContextManager[None]:
        """Errors inside the block that come from the frame's size say so."""
        return explained_sizes(taken, partial(known_sizes, self._branch, self._state), self._attempt)

    def _attempt(self, x: Tensor) -> None:
        """The passes of a step over a frame, which change nothing."""
        with self._memory.predicting(stays=False):
            if self._gradient.parameters and self.config.iterations:
                self._engine.loss(x, torch.Generator(x.device))
            with nullcontext() if self._correction is not None else self._statistics():  # it would change the drift
                self._predict(x)

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """If the block raises, the frame was never there; see `step` for what stays."""
        try:
            with self._state.undone_if_it_fails():
                yield
        except BaseException:
            self._answer = None
            self._engine.forget()
            self._outside.accept()  # the undo wrote to the model
            raise

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Inside the block the weights change: outside of inference mode, and nothing stays that depends on them."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                with explained_memory_errors(self.config):
                    yield
            finally:
                self._gradient.forget_gradients()
                self._outside.accept()
                torch.clear_autocast_cache()  # an outer autocast would predict with casts of the old weights

    def _forget_passes(self) -> None:
        """Let go of the last frame's prediction and drift: another video begins."""
        self._answer = None
        if self._correction is not None:
            self._correction.forget()

    def _check_attached(self) -> None:
        if self._ownership.ended:
            raise StateError("this adapter is detached and its model is free: make a new StreamAdapter")

    # ---- saving mid-stream, and several videos

    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """A copy of all of the stream's state: weights, optimizer, window, random state, counters.

        What the model's own passes keep of the video (a recurrent state, a count) is in it, where it consists of
        tensors and plain values.

        Raises:
            StateError: somebody else changed the model, as for `step`; or the model keeps other objects of the video.
        """
        self._check_attached()
        self._outside.check()
        about = {"config": asdict(self.config), "setting": self._setting(), "source": self._source()}
        return {"format": FORMAT, **about, **self._state.state_dict()}

    def _setting(self) -> dict[str, Any]:
        """What the stream depends on beside its configuration and its tensors, in plain values."""
        return setting_of(self._branch, self._intake.preprocess, self._calibrated_as)

    @one_at_a_time
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; a state that does not fit changes nothing.

        Raises:
            CheckpointError: the state is damaged, or of other weights, another model, configuration, objective,
                preprocessing or later version.
            StateError: somebody else changed the model, as for `reset`.
        """
        self._check_attached()
        self._outside.check_unadapted()
        saved = current_format(state)
        check_compatible(saved, self.config, self._setting())
        with explained_memory_errors(self.config):
            take = self._state.prepare_load(saved)
            check_source(saved, self._source)
            self._engine.forget()
            take()
        self._outside.accept()
        self._forget_passes()

    @one_at_a_time
    def new_state(self) -> StreamState:
        """The state of another video over the same model, at its beginning; `swap` puts it in."""
        self._check_attached()
        state = self._begin()
        state.leave()
        state.weights.reset()
        state.passes.reset()
        return state

    @one_at_a_time
    def swap(self, state: StreamState) -> StreamState:
        """Go on with another video: its weights are copied into the model, in place.

        What the model's own passes keep of a video (a recurrent state, a count) stays with that video.

        Args:
            state: from `new_state`, or returned by an earlier `swap` of this adapter.

        Returns:
            The state of the video so far.

        Raises:
            StateError: the state is of another adapter, or somebody else changed the model; nothing has changed.
        """
        self._check_attached()
        self._outside.check()
        swap(self._state, state)
        self._outside.accept()
        self._forget_passes()
        before, self._state = self._state, state
        return before


def _fresh(make: Callable[[ParamGroups], torch.optim.Optimizer], groups: ParamGroups) -> torch.optim.Optimizer:
    """A new optimizer of parameter groups that it may change."""
    return make([dict(group) for group in groups])

"""What happens to one frame, in the order of the paper: stage it, pull, draw, step, commit, predict.

"Test-Time Training on Video Streams" (Wang et al.), section 4: for each frame, push it into the window, take a gradient
step on the reconstruction of a batch drawn from the window, then predict the frame with the updated encoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.engine.eager import EagerEngine, explained_memory_errors
from ttt_adapt.model.correction import Correction
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.model.norms import frame_statistics, norm_layers, updating_norms
from ttt_adapt.model.outside_changes import OutsideChanges
from ttt_adapt.objectives.base import Objective
from ttt_adapt.sharing.guarding import Guarding
from ttt_adapt.stream.auto_window import gradient_sketch
from ttt_adapt.stream.optimizer import total_norm
from ttt_adapt.stream.report import ROLLED_BACK, StepReport
from ttt_adapt.stream.schedule import is_due
from ttt_adapt.stream.state import StreamState


class FrameSteps:
    """Adapts a model to a frame, and predicts it. The video that the frame belongs to is in the model.

    Args:
        engine: runs passes and steps.
        predict: how the model is called on one preprocessed frame, with its context.
        correction: of the passes of predictions, in calibrated streams.
        limit: the drift up to which a frame looks usual to the source weights.
        memory: what the model keeps of the video in its own passes.
        outside: told what the steps themselves change.
    """

    def __init__(
        self,
        engine: EagerEngine,
        predict: Callable[..., Any],
        correction: Correction | None,
        limit: float,
        memory: ModelMemory,
        outside: OutsideChanges,
    ) -> None:
        self.engine, self._gradient, self.config = engine, engine.gradient_step, engine.gradient_step.config
        self._predict, self._correction, self._limit = predict, correction, limit
        self._memory, self._outside = memory, outside
        engine.memory = memory
        self._norms = norm_layers(self._gradient.objective.model)
        self._answer: tuple[TakenFrame, Any] | None = None
        self._guarding = Guarding(engine, memory)

    def step(self, state: StreamState, taken: TakenFrame) -> Any:
        """Adapt to a frame, and predict it; the guards look at the prediction."""
        report = self.adapt(state, taken)
        output = self.predict(taken)
        if kind := self._guarding.trouble(state, output):
            with self._stepping():
                mended = self._guarding.mended(state, taken, kind, self.predict)
            if mended is not None:
                report.add_remark(f"{ROLLED_BACK}: {kind}")
                output = mended
        state.tally.count(report)
        return output

    def adapt(self, state: StreamState, taken: TakenFrame) -> StepReport:
        """Take a frame into the window, and the gradient steps on it."""
        started = time.perf_counter()
        if not self._gradient.parameters or not self.config.iterations:
            return _only_count(state, started, "iterations" if self._gradient.parameters else "no branch")
        numbers, sketch, surprise = None, None, None
        self._answer = None
        with self._stepping():
            self.engine.check()
            skipped, remarks = self._guarding.look(state, taken)
            in_window = not skipped
            if in_window:
                state.window.stage(taken.x[0], taken.pixels)
                skipped, surprise = self._decide(state, taken)
            if not skipped:
                numbers, sketch, more = self._take_steps(state, taken)
                remarks += more
            if in_window:
                state.window.commit()
            if surprise is not None:
                state.gate.record(surprise)
            if state.auto is not None and sketch is not None and numbers is not None and bool(numbers[0, 1].isfinite()):
                state.auto.update(sketch.tolist())
            if state.guards is not None:
                remarks += self._guarding.look_at_weights(state)
                state.guards.count(in_window)
            ms = (time.perf_counter() - started) * 1e3
            index, shut = state.progress.frame_index, surprise if skipped == "gate" else None
            report = StepReport(index, skipped, ms, numbers, shut, remarks)
            state.progress.count(report)
        return report

    def _take_steps(self, state: StreamState, taken: TakenFrame) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """What `_update` returns, with as many gradient steps as there is time for, and whether these are fewer."""
        wanted, budget = self.config.iterations, state.budget
        steps = wanted if budget is None or self.engine.recorded else budget.steps(wanted)
        with nullcontext() if budget is None else budget.adapting(steps):
            try:
                numbers, sketch = self.engine.update(lambda frame: self._update(state, frame, steps), state, taken)
            finally:  # not in `_update`: a replayed one runs no Python
                state.weights.moved = True
        return numbers, sketch, () if steps == wanted else ("max_ms",)

    def predict(self, taken: TakenFrame, stays: bool = True) -> Any:
        """Predict a frame with the weights that are in the model.

        Args:
            taken: the frame.
            stays: whether it belongs to the video: what the model's own pass keeps of it stays.
        """
        answer = self._answer
        if answer is not None and answer[0] is taken:
            self._answer = None
            return answer[1]
        with torch.no_grad(), explained_memory_errors(self.config), self._memory.predicting(stays):
            output = self.engine.predict(self._predict, taken, self.statistics())
        self._outside.accept_modes()
        return output

    def attempt(self, x: Tensor) -> None:
        """The passes of a step over a frame x [1, 3, H, W], which change nothing; they raise where the step would."""
        with self._memory.predicting(stays=False):
            if self._gradient.parameters and self.config.iterations:
                self.engine.loss(x, torch.Generator(x.device))
            with nullcontext() if self._correction is not None else self.statistics():  # it would change the drift
                self._predict(x)

    @property
    def objective(self) -> Objective:
        """What the gradient steps are taken on."""
        return self._gradient.objective

    def statistics(self) -> AbstractContextManager[None]:
        """Inside the block, the model normalises a frame as a prediction does."""
        if self._correction is not None:
            return self._correction.active()
        return frame_statistics(self.config.norm_stats, self._norms, self.config.frame_share)

    def drift(self) -> Tensor | None:
        """How far the frame that was predicted last is from the source; NaN, or None, where there is no number."""
        return None if self._correction is None else self._correction.drift()

    def forget_answer(self) -> None:
        """Predict the next frame anew, even if it is the last one that was adapted to."""
        self._answer = None

    def forget_passes(self) -> None:
        """Let go of the last frame's prediction and drift: another video begins."""
        self._answer = None
        if self._correction is not None:
            self._correction.forget()

    # ---- what adapting consists of

    def _decide(self, state: StreamState, taken: TakenFrame) -> tuple[str, float | None]:
        """Whether to adapt to this frame: why not, or "" for yes; and the loss that the surprise gate compared."""
        due = is_due(state.progress.frame_index, self.config.every)
        late = due and state.budget is not None and not state.budget.steps(self.config.iterations)
        if due and not late and self.config.gate == "none":
            return "", None
        if self.config.pull_fraction == 1.0:  # without memory, a frame that is skipped is predicted by the source too
            state.weights.pull(1.0)
        if not due:
            return "every", None
        if late:
            return "max_ms", None
        if self.config.gate == "calibrated":
            return "gate" if self._is_usual(state, taken) else "", None
        batch = state.draw(self.config)
        surprise = float(self.engine.loss(batch, state.random.generator))
        return "" if state.gate.is_open(surprise) else "gate", surprise

    def _is_usual(self, state: StreamState, taken: TakenFrame) -> bool:
        """Whether a frame looks usual to the source weights, which predict it then."""
        weights = state.weights
        with weights.as_source(), self._memory.predicting(stays=False):
            output, drift = self.predict(taken), self.drift()
        if drift is None or not float(drift) <= self._limit:
            return False
        if weights.moved:
            weights.pull(1.0)
            self.engine.restart(state.optimizer)
        if not self._memory.changes:
            self._answer = taken, output  # of the source weights, which are in the model now
        return True

    def _update(self, state: StreamState, taken: TakenFrame, steps: int) -> tuple[Tensor, Tensor | None]:
        """What a frame does to the weights; nothing here waits for the device.

        Returns:
            The numbers of a `StepReport`; and for the automatic window a sketch of the frame's first gradient.
        """
        state.weights.pull(self.config.pull_fraction)
        if self.config.pull_fraction:
            self._gradient.half.round()  # the pull moves the float32 copies, and these are the weights
        moved = self._move_statistics(taken)
        if self.config.restart_optimizer or self.config.pull_fraction == 1.0:
            self.engine.restart(state.optimizer)
        found = [self._gradient_step(state, i) for i in range(steps)]
        numbers = torch.stack([row for row, _ in found])
        if state.guards is not None and moved:
            numbers[0, 2] += 2.0 * torch.stack([each.to(numbers.device) for each in moved]).all().logical_not()
        return numbers, found[0][1]

    @torch.no_grad()
    def _move_statistics(self, taken: TakenFrame) -> list[Tensor]:
        """Let the clean frame into the running statistics of BatchNorm, if the configuration says so.

        Returns:
            Whether they moved; see `updating_norms`.
        """
        if self.config.norm_stats != "ema" or not self._norms:
            return []
        updating = updating_norms(self._norms, self.config.frame_share)
        with self._memory.predicting(stays=False), updating as moved:
            self._predict(taken.x, *taken.context)
        return moved

    def _gradient_step(self, state: StreamState, iteration: int) -> tuple[Tensor, Tensor | None]:
        """Draw a batch, and step if nothing speaks against it: a row of numbers, and a sketch of the gradient."""
        parameters = self._gradient.parameters
        batch = state.draw(self.config)
        with self._gradient.learning(state.progress.frame_index * self.config.iterations + iteration):
            loss = self.engine.gradients(batch, state.random.generator)
            norm = total_norm([p.grad for p in parameters if p.grad is not None])
            sketch = gradient_sketch(parameters) if iteration == 0 and state.auto is not None else None
            if self.config.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
            taken = self._guarding.allows(state, loss, norm)
            self.engine.take_step(state.optimizer, taken)
        row = [loss.float(), norm.float()] if state.guards is None else [loss.float(), norm.float(), taken.float()]
        return torch.stack(row), sketch

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


def _only_count(state: StreamState, started: float, reason: str) -> StepReport:
    """A frame of a stream that takes no gradient steps."""
    report = StepReport(state.progress.frame_index, reason, (time.perf_counter() - started) * 1e3)
    state.progress.count(report)
    return report

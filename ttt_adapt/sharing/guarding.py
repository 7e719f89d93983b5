"""Guarding: what guards do to a video and to the model. What they know is in `ttt_adapt/stream/guards.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.model.frames import TakenFrame
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.stream.guards import Guards
from ttt_adapt.stream.prediction_look import shows, signals
from ttt_adapt.stream.report import ROLLED_BACK
from ttt_adapt.stream.state import StreamState

Predict = Callable[[TakenFrame], Any]


class Guarding:
    """Acts on a video that is in the model, where its guards say so. Without guards, nothing here does anything.

    Args:
        engine: runs the steps.
        memory: what the model keeps of the video in its own passes.
    """

    def __init__(self, engine: EagerEngine, memory: ModelMemory) -> None:
        self._engine, self._memory = engine, memory
        self._gradient, self._config = engine.gradient_step, engine.gradient_step.config

    # ---- before a step

    def look(self, state: StreamState, taken: TakenFrame) -> tuple[str, tuple[str, ...]]:
        """Look at a frame: why it is held back, or "", and what was done because of it."""
        guards = state.guards
        if guards is None or taken.small is None:
            return "", ()
        sight = guards.frames.at(taken.small)
        if sight.held and self._config.pull_fraction == 1.0:
            state.weights.pull(1.0)
        if sight.resumed:
            self._begin_scene(guards)
        if not sight.cut:
            return sight.held, ()
        state.tally.count_cut()
        guards.losses.reset()
        if self._config.on_cut == "keep":
            return sight.held, ()
        self._begin_scene(guards)
        if self._config.on_cut == "reset":
            self._to_source(state)
            state.gate.reset()
            if state.auto is not None:
                state.auto.reset()
        return sight.held, ("cut",)

    def _begin_scene(self, guards: Guards) -> None:
        guards.begin_window()
        guards.losses.reset()

    # ---- in a step: nothing here waits for the device

    def allows(self, state: StreamState, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a gradient step is taken, a bool scalar on the device of its loss and gradient norm."""
        finite = norm.isfinite()
        return finite if state.guards is None else finite & state.guards.losses.fits(loss).to(finite.device)

    # ---- behind a step

    def look_at_weights(self, state: StreamState) -> tuple[str, ...]:
        """Every 16 frames: go back from weights that are not finite, or too far from the source; what was done."""
        guards = state.guards
        if guards is None or not guards.looks_at_weights:
            return ()
        found = guards.drift.push(state.weights.distance()[None])
        if found is None:
            return ()
        if not math.isfinite(found[0]):
            self.roll_back(state)
            return (f"{ROLLED_BACK}: non-finite weights",)
        limit = self._config.max_drift
        if limit is not None and found[0] > limit:
            state.weights.pull(1.0 - limit / found[0])
            self._gradient.half.round()
            return ("drift",)
        guards.keep_if_due()
        return ()

    # ---- behind a prediction

    def trouble(self, state: StreamState, output: Any) -> str:
        """What is wrong with a prediction that was just made, or ""."""
        kind = "" if state.guards is None else state.guards.predictions.trouble(output)
        return kind if kind and state.weights.moved and self._shows(kind, output) else ""

    def mended(self, state: StreamState, taken: TakenFrame, kind: str, predict: Predict) -> Any:
        """Go back to where predictions show no trouble: the prediction then, or None where the source has it too.

        Args:
            state: the video.
            taken: the frame whose prediction showed it.
            kind: what it showed.
            predict: predicts with the weights that are in the model.
        """
        assert state.guards is not None
        with state.weights.as_source(), self._memory.predicting(stays=False):
            excused = self._shows(kind, predict(taken))
        if excused:
            state.guards.predictions.excuse(kind)
            return None
        for _ in range(2):
            at_source = not self.roll_back(state)
            output = predict(taken)
            if at_source or not self._shows(kind, output):
                break
        return output

    def _shows(self, kind: str, output: Any) -> bool:
        found = signals(output)
        return found is not None and shows(kind, found.tolist())

    def roll_back(self, state: StreamState) -> bool:
        """Bring the video back to its last good state, or to the source; whether it was the former."""
        assert state.guards is not None
        found = state.guards.restore()
        if not found:
            self._to_source(state)
            state.passes.reset()
        self._engine.forget()
        return found

    def _to_source(self, state: StreamState) -> None:
        """The source weights and an optimizer as new."""
        state.weights.pull(1.0)
        self._engine.restart(state.optimizer)

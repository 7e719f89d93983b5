"""What the runner of an arm is, and what it may see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ttt_adapt.tasks.checkpoint import Checkpoint

Predict = Callable[[Any], Tensor]
"""A frame -> class scores [1, C, H, W]."""

Score = Callable[[Predict], float]
"""Scores a way of predicting on the clip: larger is better. Labels reach an arm in no other way."""


class Runner(Protocol):
    """A model on a stream.

    It returns what the model returns: class scores, which are logits, whose softmax is the predicted distribution; of a
    task without classes, what that task's model returns.
    """

    @property
    def loss(self) -> float | None:
        """The label-free loss at the last frame; None where there was none."""
        ...

    def step(self, frame: Any) -> Tensor:
        """Class scores [1, C, H, W] for the next frame of the stream."""
        ...

    def predict(self, x: Tensor) -> Tensor:
        """Class scores for images [1, 3, H, W] as the model takes them, of any size; the stream does not change."""
        ...

    def close(self) -> None:
        """Give the model back as it was."""
        ...


@runtime_checkable
class ClipRunner(Runner, Protocol):
    """A runner of an arm that is not streaming: `prepare` comes before the first `step`."""

    def prepare(self, frames: Sequence[Any], score: Score | None = None) -> None:
        """Look at the whole clip.

        Args:
            frames: all frames of the clip, in order; read by index, as often as needed.
            score: for an oracle arm only.
        """
        ...


@runtime_checkable
class SavedRunner(Runner, Protocol):
    """A runner of a streaming arm: it can go on where another one stopped."""

    def state_dict(self) -> dict[str, Any]:
        """What it has of the stream so far: tensors and plain values, which share nothing with it."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken of a runner of the same arm, model and configuration.

        Raises:
            CheckpointError: it does not fit.
        """
        ...


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Where the checkpoint's model is."""
    return next(checkpoint.model.parameters()).device


def log_scores(probabilities: Tensor) -> Tensor:
    """Probabilities as logits: their softmax gives them back."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

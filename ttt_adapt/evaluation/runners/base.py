"""What an arm is: a name, a factory, and what its runner may see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt.tasks.checkpoint import Checkpoint

Predict = Callable[[Any], Tensor]
"""A frame -> class scores [1, C, H, W]."""

Score = Callable[[Predict], float]
"""Scores a way of predicting on the clip: larger is better. The one thing in which labels reach an arm."""


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
        """Class scores for images [1, 3, H, W] as the model takes them, of any size; the stream takes no notice."""
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


@dataclass(frozen=True)
class Arm:
    """A named way of running a checkpoint.

    A streaming arm is given frame after frame and nothing else. The runner of any other one is a `ClipRunner`, which
    is given the whole clip first.

    Attributes:
        name: as on the command line.
        title: as in tables.
        make: (checkpoint, online configuration) -> runner.
        streaming: whether frame t and those before it are all that the prediction of frame t depends on.
        oracle: whether it chooses by the labels; its results are a bound, not a method.
        fixes: fields of the configuration that make the arm what it is.
        defaults: other fields that this arm has of its own.
        adapts: whether it reads the configuration at all.
    """

    name: str
    title: str
    make: Callable[[Checkpoint, StreamConfig], Runner]
    streaming: bool = True
    oracle: bool = False
    fixes: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adapts: bool = True

    def start(self, checkpoint: Checkpoint, config: StreamConfig, changes: Mapping[str, Any] | None = None) -> Runner:
        """A runner at the beginning of a stream.

        Args:
            checkpoint: the model.
            config: the online arm's; other arms vary it.
            changes: fields that win over the arm's own defaults.

        Raises:
            ConfigError: the arm does not apply to this model, or the changes would make another arm of it; the message
                says why.
        """
        return self.make(checkpoint, self.configured(config, changes))

    def configured(self, config: StreamConfig, changes: Mapping[str, Any] | None = None) -> StreamConfig:
        """The arm's own configuration; arguments and errors as in `start`."""
        given = dict(changes or {})
        if given and not self.adapts:
            raise ConfigError(f"arm {self.name} adapts no weights, so {', '.join(given)} would change nothing of it")
        for name, value in given.items():
            if name in self.fixes and value != self.fixes[name]:
                raise ConfigError(
                    f"{name}={value!r} would make another arm of {self.name}, which is defined by "
                    f"{name}={self.fixes[name]!r}: leave it out, or run the arm that has it"
                )
        return config.replace(**{**self.defaults, **given, **self.fixes})


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Where the checkpoint's model is."""
    return next(checkpoint.model.parameters()).device


def log_scores(probabilities: Tensor) -> Tensor:
    """Probabilities as logits: their softmax gives them back."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

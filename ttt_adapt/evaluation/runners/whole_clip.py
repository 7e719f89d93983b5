"""Runners that see the whole clip before they predict. They are no streaming methods, and tables mark them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.data.order import shuffled_epochs
from ttt_adapt.errors import StateError
from ttt_adapt.evaluation.runners.base import Runner, Score, log_scores
from ttt_adapt.evaluation.runners.streaming import Adapting


class Shuffled:
    """Runs a streaming runner on the frames of a clip in random order, and puts the predictions back in order.

    "Test-Time Training on Video Streams", section 6.1: memory helps only where frames change smoothly.

    Attributes:
        runner: what runs the shuffled stream.

    Args:
        runner: what runs the shuffled stream.
        seed: of the order.
        classes: keep the most likely class of every pixel, where that is all that a prediction is made of; otherwise
            the model's output, in half precision.
    """

    def __init__(self, runner: Runner, seed: int, classes: bool = True) -> None:
        self.runner, self._seed, self._by_class = runner, seed, classes
        self._labels: list[Tensor] = []
        self._losses: list[float | None] = []
        self._next = 0
        self.loss: float | None = None

    def prepare(self, frames: Sequence[Any], score: Score | None = None) -> None:
        """Run the whole stream and keep the predictions; classes take one byte per pixel."""
        order = next(shuffled_epochs(len(frames), self._seed))
        labels: dict[int, Tensor] = {}
        losses: dict[int, float | None] = {}
        for index in order:
            scores = self.runner.step(frames[index])
            self._classes = scores.shape[1]
            small = torch.uint8 if self._classes <= 256 else torch.int32
            labels[index] = scores.argmax(1).to(small) if self._by_class else scores.half()
            losses[index] = self.runner.loss
        self._labels = [labels[i] for i in range(len(frames))]
        self._losses = [losses[i] for i in range(len(frames))]

    def step(self, frame: Any) -> Tensor:
        """The kept prediction for the next frame of the clip.

        For classes: scores that are highest for the predicted class.
        """
        if self._next >= len(self._labels):
            raise StateError("step() got more frames than prepare() was given: give both the same clip")
        self.loss, label = self._losses[self._next], self._labels[self._next]
        self._next += 1
        if not self._by_class:
            return label.float()
        return log_scores(F.one_hot(label.long(), self._classes).movedim(-1, 1).float())

    def predict(self, x: Tensor) -> Tensor:
        """Class scores with the weights as they are after the stream."""
        return self.runner.predict(x)

    def close(self) -> None:
        """Give the model back."""
        self.runner.close()


class Offline:
    """Adapt to all frames of the clip in random order, many times, then predict with the resulting weights.

    "Test-Time Training on Video Streams", section 6.1 ("training on all possible futures"). Batches are drawn from a
    window, as online, but the stream is shuffled and goes through the clip again and again. Without `score` it stops
    after a fixed number of gradient steps. The paper reports the step that is best by the labels of each video; with
    `score`, this is done here too, among 0, 1, 2, 5, 10, 20, ... steps and the last.

    Attributes:
        runner: adapts and predicts.

    Args:
        runner: adapts and predicts.
        steps: frames to adapt to, with a gradient step each.
        seed: of the order.
    """

    loss: float | None = None

    def __init__(self, runner: Adapting, steps: int, seed: int) -> None:
        self.runner, self._steps, self._seed = runner, steps, seed

    def prepare(self, frames: Sequence[Any], score: Score | None = None) -> None:
        """Adapt to the whole clip; with `score`, keep the weights of the best step among those that are scored."""
        adapter = self.runner.adapter
        best, kept, done = -np.inf, None, 0
        if score is not None:
            best, kept = score(self._predict_frame), adapter.state_dict()
        for order in shuffled_epochs(len(frames), self._seed):
            for index in order[: self._steps - done]:
                adapter.adapt(frames[index])
                done += 1
                if score is not None and (_looked_at(done) or done == self._steps):
                    found = score(self._predict_frame)
                    if found > best:
                        best, kept = found, adapter.state_dict()
            if done == self._steps:
                break
        if kept is not None:
            adapter.load_state_dict(kept)

    def step(self, frame: Any) -> Tensor:
        """Predict with the weights as they are."""
        return self._predict_frame(frame)

    def predict(self, x: Tensor) -> Tensor:
        """Class scores with the weights as they are."""
        return self.runner.predict(x)

    def close(self) -> None:
        """Give the model back."""
        self.runner.close()

    def _predict_frame(self, frame: Any) -> Tensor:
        return self.runner.adapter.predict(frame)


def _looked_at(step: int) -> bool:
    """Whether the weights of this step are scored: steps 1, 2, 5, 10, 20, 50, ..."""
    while step % 10 == 0:
        step //= 10
    return step in (1, 2, 5)

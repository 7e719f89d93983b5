"""Runners of the modifiers `+smooth`, `+vote` and `+class`, each on top of another runner."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.runners.base import ClipRunner, Runner, SavedRunner, Score, log_scores
from ttt_adapt.evaluation.runners.streaming import Adapting
from ttt_adapt.model.frames import Preprocess, to_model_input
from ttt_adapt.model.other_weights import with_other_weights


class Modified:
    """A runner on top of another one. What it does not change comes from the other.

    Attributes:
        runner: the other one.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @property
    def loss(self) -> float | None:
        """The other's label-free loss."""
        return self.runner.loss

    def prepare(self, frames: Sequence[Any], score: Score | None = None) -> None:
        """Hand the clip to a runner that sees it whole."""
        assert isinstance(self.runner, ClipRunner)
        self.runner.prepare(frames, score)

    def step(self, frame: Any) -> Tensor:
        """The other's class scores."""
        return self.runner.step(frame)

    def predict(self, x: Tensor) -> Tensor:
        """The other's class scores."""
        return self.runner.predict(x)

    def state_dict(self) -> dict[str, Any]:
        """The other's."""
        assert isinstance(self.runner, SavedRunner)
        return {"runner": self.runner.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Let the other one go on."""
        assert isinstance(self.runner, SavedRunner)
        self.runner.load_state_dict(saved["runner"])

    def close(self) -> None:
        """Give the model back."""
        self.runner.close()


class Smoothed(Modified):
    """Temporal smoothing: the mean of the predicted distributions of the last frames ("... Streams", section 5.1).

    Args:
        runner: predicts.
        length: number of frames, the current one included.
    """

    def __init__(self, runner: Runner, length: int) -> None:
        if length < 1:
            raise ConfigError(f"+smooth-{length} averages no prediction; expected at least one")
        super().__init__(runner)
        self._last: deque[Tensor] = deque(maxlen=length)

    def step(self, frame: Any) -> Tensor:
        """Class scores whose softmax is the mean."""
        now = super().step(frame).softmax(1)
        self._last.append(now)
        return log_scores(torch.stack([each.to(now.device) for each in self._last]).mean(0))

    def state_dict(self) -> dict[str, Any]:
        """The distributions that are averaged, and the other's state."""
        return {**super().state_dict(), "last": [each.clone() for each in self._last]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with these."""
        super().load_state_dict(saved)
        self._last.clear()
        self._last.extend(saved["last"])


class Voting(Modified):
    """Majority vote over views of the frame: flipped, scaled, and both ("... Streams", section 5.1).

    The frame itself counts with what the runner predicted for it. Where classes have as many votes, their mean
    probability decides.

    Args:
        runner: predicts; its model must take images of any size.
        preprocess: frame -> model input.
        scales: of the views beside the frame itself; each view is also flipped.
    """

    def __init__(self, runner: Runner, preprocess: Preprocess, scales: Sequence[float] = (0.75, 1.25)) -> None:
        super().__init__(runner)
        self._preprocess, self._scales = preprocess, tuple(scales)

    def step(self, frame: Any) -> Tensor:
        """Class scores; their softmax is the share of the votes, where the mean probability counts as one more vote."""
        first = super().step(frame)
        x = to_model_input(frame, self._preprocess, first.device, first.dtype)
        views = [first.softmax(1)]
        for scale in (1.0, *self._scales):
            size = (max(round(x.shape[2] * scale), 1), max(round(x.shape[3] * scale), 1))
            scaled = x if scale == 1.0 else F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
            views += [self._view(scaled, flip, first) for flip in (False, True) if flip or scale != 1.0]
        stacked = torch.stack(views)
        votes = F.one_hot(stacked.argmax(2), first.shape[1]).movedim(-1, 2).to(first.dtype)
        return log_scores((votes.sum(0) + stacked.mean(0)) / (len(views) + 1))

    def _view(self, x: Tensor, flip: bool, like: Tensor) -> Tensor:
        """The distribution predicted for a view, on the pixels of the frame."""
        scores = self.runner.predict(x.flip(3) if flip else x)
        scores = scores.flip(3) if flip else scores
        if scores.shape[2:] != like.shape[2:]:
            scores = F.interpolate(scores, like.shape[2:], mode="bilinear", align_corners=False)
        return scores.softmax(1)


class ClassBalanced(Modified):
    """Reset the adapted weights when predictions collapse to few classes (Volpi et al., CVPR 2022).

    The source model predicts every frame too, from a copy of its weights. When, over the last `length` frames, it has
    predicted more than `slack` classes more on average than the adapted model, the next frame begins with the source
    weights, an empty window and an empty buffer.

    Attributes:
        fewer: the buffer: how many classes fewer than the source model the adapted one predicted, for the last frames.
        resets: how often it was reset.

    Args:
        runner: adapts weights.
        length: frames in the buffer.
        slack: largest difference of the mean numbers of distinct predicted classes.
    """

    def __init__(self, runner: Adapting, length: int, slack: float = 0.5) -> None:
        super().__init__(runner)
        self._adapter, self._model, self._preprocess = runner.adapter, runner.model, runner.preprocess
        self._slack = slack
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        self._source = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.fewer: deque[int] = deque(maxlen=length)
        self.resets = 0

    def step(self, frame: Any) -> Tensor:
        """Reset if the buffer says so; then adapt, predict, and compare with the source model."""
        if len(self.fewer) == self.fewer.maxlen and sum(self.fewer) / len(self.fewer) > self._slack:
            self._adapter.reset()
            self.fewer.clear()
            self.resets += 1
        scores = super().step(frame)
        x = to_model_input(frame, self._preprocess, scores.device, scores.dtype)
        with torch.no_grad(), with_other_weights(self._model, self._source):
            source = self._model(x)
        self.fewer.append(_classes(source) - _classes(scores))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """The buffer, and the other's state."""
        return {**super().state_dict(), "fewer": list(self.fewer), "resets": self.resets}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with these."""
        super().load_state_dict(saved)
        self.fewer.clear()
        self.fewer.extend(saved["fewer"])
        self.resets = saved["resets"]


def _classes(scores: Tensor) -> int:
    """How many different classes are predicted."""
    return scores.argmax(1).unique().numel()

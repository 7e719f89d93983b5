"""A model that watches a source of frames, whose size may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ttt_adapt.evaluation.runners.base import Runner, SavedRunner
from ttt_adapt.evaluation.runners.modifiers import Modified
from ttt_adapt.evaluation.runners.streaming import Adapting
from ttt_adapt.model.frames import Normalize
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.video import VideoReader


class Watching:
    """Runs the model on the frames of a source; a frame of another size begins a new stream, from the source weights.

    Attributes:
        runner: of the stream that runs.
        normalize: how its frames become inputs.

    Args:
        checkpoint: the model.
        size: at which the model sees the frames, as for `adapt_video`.
        video: gives the frames, and counts what becomes of them.
        start: makes a runner at the beginning of a stream.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        size: tuple[int, int] | Literal["native"] | None,
        video: VideoReader,
        start: Callable[[], Runner],
    ) -> None:
        self._checkpoint, self._size, self._video, self._start = checkpoint, size, video, start
        self._frame_size = video.size
        self.normalize = normalizer(checkpoint, size, video.size)
        self.runner = start()

    def step(self, seen: np.ndarray) -> torch.Tensor:
        """What the model returns for a frame, as the task sees it."""
        if seen.shape[:2] != self._frame_size:
            self._frame_size = seen.shape[:2]
            self.normalize = normalizer(self._checkpoint, self._size, self._frame_size)
            self.runner.close()
            self.runner = self._start()
        output = self.runner.step(seen if self._size == "native" else self.normalize(seen))  # it knows of no resizing
        self._video.counts.predicted.add()
        if _adapted(self.runner):
            self._video.counts.adapted.add()
        return output

    def state_dict(self) -> dict[str, Any]:
        """What the runner has of the stream so far."""
        assert isinstance(self.runner, SavedRunner)  # those of streaming arms are
        return self.runner.state_dict()

    def go_on(self, saved: Mapping[str, Any], size: Sequence[int]) -> None:
        """Go on where a runner was saved.

        Args:
            saved: from `state_dict`.
            size: (height, width) of the last frame then. A frame of another one begins a new stream.

        Raises:
            CheckpointError: it does not fit.
        """
        assert isinstance(self.runner, SavedRunner)
        self.runner.load_state_dict(saved)
        self._frame_size = (size[0], size[1])
        self.normalize = normalizer(self._checkpoint, self._size, self._frame_size)

    def close(self) -> None:
        """Give the model back as it was."""
        self.runner.close()


def _adapted(runner: Runner) -> bool:
    """Whether the weights were updated at the last frame."""
    last = inner.adapter.last if isinstance(inner := unmodified(runner), Adapting) else None
    return last is not None and last.adapted


def unmodified(runner: Runner) -> Runner:
    """The runner below its modifiers."""
    while isinstance(runner, Modified):
        runner = runner.runner
    return runner


def normalizer(
    checkpoint: Checkpoint, size: tuple[int, int] | Literal["native"] | None, video: tuple[int, int]
) -> Normalize:
    """How frames become inputs; `video` is the (H, W) of the video."""
    spec = checkpoint.spec
    if size is None:
        height = spec.size[0]
        size = (height, max(round(height * video[1] / video[0] / 16), 1) * 16)
    device = next(checkpoint.model.parameters()).device
    return Normalize(spec.mean, spec.std, None if size == "native" else size, device)

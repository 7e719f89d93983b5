"""Run one arm on one labelled clip and score it; the streaming rule is in the order of the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.checkpoint import Checkpoint
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, DataError, FrameError, FrameTypeError
from ttt_adapt.evaluation.arms import Arm, Predict
from ttt_adapt.evaluation.memory import PeakMemory
from ttt_adapt.evaluation.metrics import SegmentationScore
from ttt_adapt.evaluation.realtime import stride, timed
from ttt_adapt.evaluation.report import Run

OnFrame = Callable[[int, np.ndarray, np.ndarray, float, float | None], None]


def run_arm(
    arm: Arm,
    checkpoint: Checkpoint,
    clip: Iterable[tuple[np.ndarray, np.ndarray]],
    config: StreamConfig,
    *,
    name: str,
    label: str | None = None,
    ignore: int = 255,
    changes: Mapping[str, Any] | None = None,
    forwards: float | None = None,
    on_frame: OnFrame | None = None,
) -> Run:
    """Stream a labelled clip through an arm.

    A streaming arm gets frame t and returns its prediction before frame t + 1 is read; labels go to the score alone.
    Any other arm is shown all frames first, and an oracle arm may also ask for the score of a way of predicting.

    Args:
        arm: how to run the model.
        checkpoint: the model and its branch; given back with its source weights.
        clip: pairs (uint8 RGB frame [H, W, 3], uint8 labels [H, W]), read one by one.
        config: configuration of the online arm, with the seed; other arms vary it.
        name: the clip's name in the report.
        label: the arm's name in the report; its own by default.
        ignore: label id of void.
        changes: fields of the configuration that win over the arm's own.
        forwards: for real-time scoring, the forward passes that the arm costs per frame: it misses the frames that go
            by meanwhile (see `ttt_adapt.evaluation.realtime`). None: it sees every frame.
        on_frame: called after each frame with (index, frame, prediction [H, W], mIoU, loss); uint8 up to 256 classes.

    Raises:
        ConfigError: real-time scoring of an arm that sees the whole clip first.
        DataError: the clip has no frames, or none with a labelled pixel, or can be read only once and the arm is not
            streaming.
        FrameError, FrameTypeError: the model's output is not [1, classes, H, W] of the frame's size.
    """
    score = SegmentationScore(len(checkpoint.spec.classes), ignore, checkpoint.spec.classes)
    losses: list[float | None] = []
    ms: list[float] = []
    every = 1 if forwards is None else stride(forwards)
    if forwards is not None and not arm.streaming:
        raise ConfigError(
            f"arm {arm.name} sees the whole clip before it predicts: real-time scoring is for streaming arms"
        )
    with PeakMemory(next(checkpoint.model.parameters()).device) as memory:
        runner = arm.start(checkpoint, config, changes)
        try:
            prepared = 0.0 if arm.streaming else _show_clip(arm, runner, clip, checkpoint, ignore)
            for index, (frame, labels) in enumerate(clip):
                if index % every == 0:
                    output, seconds = timed(runner.step, frame)
                    prediction = _class_map(output, labels, len(checkpoint.spec.classes), f"{arm.name} on {name}")
                    losses.append(runner.loss)
                    ms.append(seconds * 1e3)
                else:
                    losses.append(None)
                    ms.append(math.nan)
                miou = score.update(prediction, labels)
                if on_frame is not None:
                    on_frame(index, frame, prediction.numpy(), miou, losses[-1])
        finally:
            runner.close()
    ms = [each + prepared * 1e3 / len(ms) for each in ms]  # what was done before the first frame is shared by all
    if not losses:
        raise DataError(f"clip {name} has no frames; expected at least one")
    if not score.confusion.any():
        raise DataError(f"clip {name} has no labelled pixel: all are void ({ignore}); leave it out with --clips")
    run = Run.from_score(label or arm.name, name, config.seed, score, losses, ms)
    run.fps, run.peak_memory_mib, run.forwards = getattr(clip, "fps", None), memory.mib, forwards
    run.streaming, run.oracle = arm.streaming, arm.oracle
    return run


class _Frames(Sequence[np.ndarray]):
    """The frames of a labelled clip, without the labels."""

    def __init__(self, clip: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._clip = clip

    def __len__(self) -> int:
        return len(self._clip)

    def __getitem__(self, index: Any) -> Any:
        return self._clip[index][0]


def _show_clip(arm: Arm, runner: Any, clip: Any, checkpoint: Checkpoint, ignore: int) -> float:
    """Let a runner that is not streaming see the clip; returns the seconds it took."""
    if not (hasattr(clip, "__len__") and hasattr(clip, "__getitem__")):
        raise DataError(
            f"arm {arm.name} sees the whole clip before it predicts, and this one is a {type(clip).__name__} that can "
            "only be read once: pass a list of (frame, labels), or a LabelledClip"
        )

    if not len(clip):
        raise DataError("the clip has no frames; expected at least one")

    def score(predict: Predict) -> float:
        found = SegmentationScore(len(checkpoint.spec.classes), ignore, checkpoint.spec.classes)
        for frame, labels in (clip[i] for i in range(len(clip))):
            found.update(_class_map(predict(frame), labels, len(checkpoint.spec.classes), arm.name), labels)
        return found.result()["miou"]

    return timed(lambda frames: runner.prepare(frames, score if arm.oracle else None), _Frames(clip))[1]


def _class_map(output: Any, labels: np.ndarray, classes: int, what: str) -> Tensor:
    """The most likely class of every pixel, [H, W] on the CPU."""
    if not isinstance(output, Tensor):
        raise FrameTypeError(f"{what} returned a {type(output).__name__}; expected class scores, a tensor [1, C, H, W]")
    expected = [1, classes, *labels.shape]
    if [*output.shape] != expected:
        raise FrameError(
            f"{what} returned {[*output.shape]}; expected class scores {expected}, of the frame's own size "
            "(resize them in the model or in `predict`)"
        )
    return output.argmax(1)[0].to(torch.uint8 if classes <= 256 else torch.int32).cpu()

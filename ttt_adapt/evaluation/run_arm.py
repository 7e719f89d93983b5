"""Run one arm on one clip and score it: each frame is predicted and scored before the next is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.arms import Arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.peak_memory import PeakMemory
from ttt_adapt.evaluation.realtime import stride, timed
from ttt_adapt.evaluation.report import Run
from ttt_adapt.evaluation.runners import Predict, Runner, start
from ttt_adapt.tasks import Score, Task, check_output
from ttt_adapt.tasks.checkpoint import Checkpoint

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
    metric_weights: Path | None = None,
    on_frame: OnFrame | None = None,
) -> Run:
    """Stream a labelled clip through an arm.

    A streaming arm gets frame t and returns its prediction before frame t + 1 is read; labels go to the score alone.
    Any other arm is shown all frames first, and an oracle arm may also ask for the score of a way of predicting.

    Args:
        arm: how to run the model.
        checkpoint: the model and its branch; given back with its source weights.
        clip: pairs (uint8 RGB frame [H, W, 3], the task's label), read one by one.
        config: configuration of the online arm, with the seed; other arms vary it.
        name: the clip's name in the report.
        label: the arm's name in the report; its own by default.
        ignore: label id of void.
        changes: fields of the configuration that win over the arm's own.
        forwards: for real-time scoring, the forward passes that the arm costs per frame: it misses the frames that go
            by meanwhile (see `ttt_adapt.evaluation.realtime`). None: it sees every frame.
        metric_weights: folder of the networks that some metrics are measured with; None leaves those out.
        on_frame: called after each frame with (index, frame, prediction, headline metric, loss); of segmentation class
            ids [H, W], uint8 up to 256 classes, and mIoU.

    Raises:
        ConfigError: real-time scoring of an arm that sees the whole clip first.
        DataError: the clip has no frames, or none that can be scored, or can be read only once and the arm is not
            streaming.
        FrameError, FrameTypeError: the model's output is not [1, channels, H, W] of the frame's size.
    """
    if forwards is not None and not arm.streaming:
        raise ConfigError(
            f"arm {arm.name} sees the whole clip before it predicts: real-time scoring is for streaming arms"
        )
    task = checkpoint.task
    score = task.score(ignore, metric_weights)
    every = 1 if forwards is None else stride(forwards)
    with PeakMemory(next(checkpoint.model.parameters()).device) as memory:
        runner = start(arm, checkpoint, config, changes)
        try:
            prepared = 0.0 if arm.streaming else _show_clip(arm, runner, clip, task, ignore)
            losses, ms = _stream(runner, clip, task, score, every, f"{arm.name} on {name}", on_frame)
        finally:
            runner.close()
    if not losses:
        raise DataError(f"clip {name} has no frames; expected at least one")
    ms = [each + prepared * 1e3 / len(ms) for each in ms]  # what was done before the first frame is shared by all
    try:
        run = Run.from_score(label or arm.name, name, config.seed, score, losses, ms, task.name)
    except DataError as error:
        raise DataError(f"clip {name} has {error}; leave this clip out") from error
    run.fps, run.peak_memory_mib, run.forwards = getattr(clip, "fps", None), memory.mib, forwards
    run.streaming, run.oracle = arm.streaming, arm.oracle
    return run


def _stream(
    runner: Runner,
    clip: Iterable[tuple[np.ndarray, np.ndarray]],
    task: Task,
    score: Score,
    every: int,
    what: str,
    on_frame: OnFrame | None,
) -> tuple[list[float | None], list[float]]:
    """Predict and score frame after frame; the runner is given every `every`-th of them, and never sees a later frame.

    Returns:
        Of every frame the loss (None: there was none) and the milliseconds (NaN: it was missed).
    """
    losses: list[float | None] = []
    ms: list[float] = []
    for index, (frame, target) in enumerate(clip):
        if index % every == 0:
            answer, seconds = timed(runner.step, frame)
            output = check_output(answer, frame, task, what)
            losses.append(runner.loss)
            ms.append(seconds * 1e3)
        else:
            losses.append(None)
            ms.append(math.nan)
        prediction = task.predict(output, frame)
        found = score.update(prediction, target)
        if on_frame is not None:
            on_frame(index, frame, prediction, found, losses[-1])
    return losses, ms


class _Frames(Sequence[np.ndarray]):
    """The frames of a labelled clip, without the labels."""

    def __init__(self, clip: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._clip = clip

    def __len__(self) -> int:
        return len(self._clip)

    def __getitem__(self, index: Any) -> Any:
        return self._clip[index][0]


def _show_clip(arm: Arm, runner: Any, clip: Any, task: Task, ignore: int) -> float:
    """Let a runner that is not streaming see the clip; returns the seconds it took, without what scoring took."""
    if not (hasattr(clip, "__len__") and hasattr(clip, "__getitem__")):
        raise DataError(
            f"arm {arm.name} sees the whole clip before it predicts, and this one is a {type(clip).__name__} that can "
            "only be read once: pass a list of (frame, labels), or a LabelledClip"
        )

    if not len(clip):
        raise DataError("the clip has no frames; expected at least one")

    scoring = 0.0

    def score(predict: Predict) -> float:
        nonlocal scoring
        started = time.perf_counter()
        found = task.score(ignore)
        for frame, label in (clip[i] for i in range(len(clip))):
            found.update(task.predict(check_output(predict(frame), frame, task, arm.name), frame), label)
        headline = task.metrics[0]
        scoring += time.perf_counter() - started
        return headline.better(found.result()[headline.field])

    return timed(lambda frames: runner.prepare(frames, score if arm.oracle else None), _Frames(clip))[1] - scoring

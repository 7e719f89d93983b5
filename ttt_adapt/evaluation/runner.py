"""Run one arm on one labelled clip and score it; the streaming rule is in the order of the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ttt_adapt.checkpoint import Checkpoint
from ttt_adapt.config import StreamConfig
from ttt_adapt.evaluation.arms import Arm
from ttt_adapt.evaluation.metrics import SegmentationScore
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
    on_frame: OnFrame | None = None,
) -> Run:
    """Stream a labelled clip through an arm.

    The arm gets frame t and returns its prediction before frame t + 1 is read; labels go to the score alone.

    Args:
        arm: how to run the model.
        checkpoint: the model and its branch; given back with its source weights.
        clip: pairs (uint8 RGB frame [H, W, 3], uint8 labels [H, W]), read one by one.
        config: configuration of the online arm, with the seed; other arms vary it.
        name: the clip's name in the report.
        label: the arm's name in the report; its own by default.
        ignore: label id of void.
        on_frame: called after each frame with (index, frame, prediction [H, W] uint8, mIoU, loss).
    """
    score = SegmentationScore(len(checkpoint.spec.classes), ignore, checkpoint.spec.classes)
    losses: list[float | None] = []
    ms: list[float] = []
    runner = arm.start(checkpoint, config)
    try:
        for index, (frame, labels) in enumerate(clip):
            started = time.perf_counter()
            prediction = runner.step(frame).argmax(1)[0]
            if prediction.is_cuda:
                torch.cuda.synchronize()
            ms.append((time.perf_counter() - started) * 1e3)
            losses.append(runner.loss)
            miou = score.update(prediction, labels)
            if on_frame is not None:
                on_frame(index, frame, prediction.to(torch.uint8).cpu().numpy(), miou, runner.loss)
    finally:
        runner.close()
    return Run.from_score(label or arm.name, name, config.seed, score, losses, ms)

"""Real-time scoring: an arm that is slower than the stream misses frames.

In the time of one forward pass of the fixed model, one frame of the stream goes by. An arm that needs R forward passes
per frame is busy with a frame while the next ceil(R) - 1 go by. It never sees those frames, and its last prediction is
scored on them. The fixed model has R = 1 and misses none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from ttt_adapt.arms import ARMS, Arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.runners import configured, runner_of
from ttt_adapt.stream.schedule import LENGTH
from ttt_adapt.tasks.checkpoint import Checkpoint

PROBE = 8
"""The cost of an arm is measured on at least this many frames, after one that warms up."""


def stride(forwards: float) -> int:
    """An arm that needs `forwards` passes per frame takes every n-th frame; returns n, which is ceil(R).

    Raises:
        ConfigError: `forwards` is not a finite number above 0.
    """
    if not 0 < forwards < math.inf:
        raise ConfigError(f"forwards is {forwards!r}; expected a finite number of forward passes per frame, above 0")
    return math.ceil(forwards)


def measure_forwards(
    arm: Arm,
    checkpoint: Checkpoint,
    clip: Iterable[Any],
    config: StreamConfig,
    changes: Mapping[str, Any] | None = None,
) -> float:
    """How many forward passes of the fixed model a frame costs the arm, measured here and now.

    The fixed model and the arm run on the clip's first frames, one after the other. The result is the ratio of their
    mean times per frame, rounded to one decimal, so that the noise of the clock does not cost a frame. An arm that
    updates on every n-th frame is measured over whole periods, and an arm with the surprise gate until the gate has its
    history. Afterwards the model is as it was.

    Args:
        arm: what to measure; a streaming arm.
        checkpoint: the model.
        clip: (frame, labels) pairs; the labels are not looked at.
        config: of the online arm.
        changes: as for `ttt_adapt.evaluation.runners.start`.

    Raises:
        DataError: the clip has no frames.
    """
    if arm.name == "fixed":
        return 1.0
    own = configured(arm, config, changes, checkpoint.calibration)
    count = own.every * max(2, -(-PROBE // own.every)) + (LENGTH if own.gate == "surprise" else 0)
    frames = [frame for frame, _ in islice(clip, 1 + count)]
    if not frames:
        raise DataError("the clip has no frames: nothing to measure an arm's cost on")
    fixed, seconds = (_seconds(some, checkpoint, frames, own) for some in (ARMS["fixed"], arm))
    return max(1.0, round(seconds / fixed, 1))


def _seconds(arm: Arm, checkpoint: Checkpoint, frames: list[Any], config: StreamConfig) -> float:
    """Mean time of a step after the first."""
    runner = runner_of(arm, checkpoint, config)
    try:
        times = [timed(runner.step, frame)[1] for frame in frames]
    finally:
        runner.close()
    return float(np.mean(times[1:] or times))


def timed(step: Any, frame: Any) -> tuple[Any, float]:
    """(result of step(frame), seconds until the device was done with it)."""
    started = time.perf_counter()
    result = step(frame)
    if torch.cuda.is_initialized():
        device = result.device if isinstance(result, torch.Tensor) and result.is_cuda else None
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started

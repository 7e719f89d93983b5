"""Real-time scoring: which frames a slow arm misses, by hand, and what it is scored with on them."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ttt_adapt.evaluation.realtime as realtime
from arm_inputs import CONFIG, arm_run_by, checkpoint, frames
from ttt_adapt.arms import ARMS
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.realtime import measure_forwards, stride
from ttt_adapt.evaluation.run_arm import run_arm

pytestmark = pytest.mark.usefixtures("small_collections")

CHECKPOINT = SimpleNamespace(calibration=None)
"""All that a measurement of a made-up arm asks a checkpoint for."""


@pytest.mark.parametrize("forwards", [0, -1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(forwards):
    with pytest.raises(ConfigError, match="forward passes per frame, above 0"):
        stride(forwards)


class Counting:
    """Predicts class (number of frames it has seen so far) mod 3 everywhere."""

    loss = 0.5

    def __init__(self) -> None:
        self.seen: list[int] = []

    def step(self, frame) -> torch.Tensor:
        self.seen.append(int(frame[0, 0, 0]))
        scores = torch.zeros(1, 3, *frame.shape[:2])
        scores[:, (len(self.seen) - 1) % 3] = 1.0
        return scores

    def predict(self, x):
        raise NotImplementedError

    def close(self) -> None:
        pass


def numbered(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frame i has value i, and all its pixels are of class i mod 3."""
    return [(np.full((8, 8, 3), i, np.uint8), np.full((8, 8), i % 3, np.uint8)) for i in range(count)]


@pytest.mark.parametrize(
    ("forwards", "expected"),
    [
        (1.0, [0, 1, 2, 3, 4, 5, 6]),
        (0.5, [0, 1, 2, 3, 4, 5, 6]),
        (1.1, [0, 0, 2, 2, 4, 4, 6]),
        (2.0, [0, 0, 2, 2, 4, 4, 6]),
        (2.3, [0, 0, 0, 3, 3, 3, 6]),
        (4, [0, 0, 0, 0, 4, 4, 4]),
        (100, [0] * 7),
    ],
)
def test_an_arm_of_r_passes_misses_ceil_r_minus_1_frames_after_each_it_sees(forwards, expected, monkeypatch):
    runner, shown = Counting(), []
    arm = arm_run_by(monkeypatch, lambda *_: runner, "counting")
    run_arm(
        arm, checkpoint(), numbered(7), CONFIG, name="clip", forwards=forwards,
        on_frame=lambda _i, _f, prediction, _m, _l: shown.append(runner.seen[-1]),
    )  # fmt: skip
    assert shown == expected
    missed = [later - earlier - 1 for earlier, later in itertools.pairwise(runner.seen)]
    assert set(missed) <= {math.ceil(forwards) - 1}


def test_missed_frames_are_never_seen_and_scored_with_the_last_prediction(monkeypatch):
    runner, shown = Counting(), []
    arm = arm_run_by(monkeypatch, lambda *_: runner, "counting")
    run = run_arm(
        arm, checkpoint(), numbered(6), CONFIG, name="clip", forwards=1.5,
        on_frame=lambda i, _f, prediction, miou, loss: shown.append((int(prediction[0, 0]), miou, loss)),
    )  # fmt: skip
    assert runner.seen == [0, 2, 4]
    assert [prediction for prediction, _, _ in shown] == [0, 0, 1, 1, 2, 2]
    # labels are 0 1 2 0 1 2: right on frames 0 and 5 only
    assert run.per_frame == [miou for _, miou, _ in shown] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert run.losses == [0.5, None, 0.5, None, 0.5, None]
    assert run.forwards == 1.5
    assert run.ms_per_frame > 0


def test_an_arm_as_fast_as_the_fixed_model_is_scored_as_without_real_time():
    made = checkpoint()
    plain = run_arm(ARMS["online"], made, frames(), CONFIG, name="clip")
    timed = run_arm(ARMS["online"], made, frames(), CONFIG, name="clip", forwards=1.0)
    assert (plain.per_frame, plain.losses) == (timed.per_frame, timed.losses)
    assert (plain.forwards, timed.forwards) == (None, 1.0)


def test_the_measured_cost_is_the_ratio_of_mean_times_after_the_first_frame(monkeypatch):
    durations = {"fixed": [9.0, 1.0, 2.0, 1.5], "slow": [70.0, 4.0, 4.0, 4.25]}

    class Clock:
        now = 0.0

    class Slow:
        loss = None

        def __init__(self, kind: str) -> None:
            self._left = iter(durations[kind])

        def step(self, frame):
            Clock.now += next(self._left)

        def close(self) -> None:
            pass

    monkeypatch.setattr(realtime.time, "perf_counter", lambda: Clock.now)
    fixed, slow = (arm_run_by(monkeypatch, lambda *_, n=name: Slow(n), name) for name in ("fixed", "slow"))
    assert measure_forwards(slow, CHECKPOINT, frames(4), CONFIG) == 2.7  # 12.25 / 4.5 = 2.72, to one decimal
    assert measure_forwards(fixed, CHECKPOINT, frames(4), CONFIG) == 1.0


def test_measuring_gives_the_model_back_and_looks_at_the_first_frames_only():
    made = checkpoint()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    read = []

    def clip():
        for index, pair in enumerate(frames(30)):
            read.append(index)
            yield pair

    assert measure_forwards(ARMS["online"], made, clip(), CONFIG) > 1.0
    assert len(read) == 1 + realtime.PROBE
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    with pytest.raises(DataError, match="no frames"):
        measure_forwards(ARMS["online"], made, [], CONFIG)


def test_an_arm_that_is_busy_on_some_frames_is_measured_over_whole_periods(monkeypatch):
    seen = []

    class Quick:
        loss = None

        def step(self, frame):
            seen.append(frame)

        def close(self) -> None:
            pass

    arm_run_by(monkeypatch, lambda *_: Quick(), "fixed")
    lazy = arm_run_by(monkeypatch, lambda *_: Quick(), "lazy", fixes={"every": 12})
    measure_forwards(lazy, CHECKPOINT, frames(40), CONFIG)
    assert len(seen) == 2 * (1 + 2 * 12)


def test_an_arm_that_sees_the_whole_clip_is_not_scored_in_real_time():
    with pytest.raises(ConfigError, match="sees the whole clip"):
        run_arm(ARMS["online-shuffled"], checkpoint(), frames(), CONFIG, name="clip", forwards=2.0)

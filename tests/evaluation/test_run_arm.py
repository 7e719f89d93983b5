"""One arm on one clip: what a run holds, and what bad input says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arm_inputs import CONFIG, arm_run_by, checkpoint, frames
from ttt_adapt.arms import ARMS, Arm
from ttt_adapt.errors import DataError, FrameError, FrameTypeError
from ttt_adapt.evaluation.run_arm import run_arm


def test_a_run_holds_memory_and_rate():
    class Clip(list):
        fps = 12.5

    run = run_arm(ARMS["fixed"], checkpoint(), Clip(frames(2)), CONFIG, name="clip")
    assert run.fps == 12.5
    assert run.peak_memory_mib is None or run.peak_memory_mib >= 0


def answering(monkeypatch, output) -> Arm:
    class Runner:
        loss = None

        def step(self, frame):
            return output

        def close(self) -> None:
            pass

    return arm_run_by(monkeypatch, lambda *_: Runner(), "answering")


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.zeros(1, 3, 12, 16), FrameError, r"answering on dusk returned \[1, 3, 12, 16\]; .*\[1, 3, 48, 64\]"),
        (torch.zeros(1, 4, 48, 64), FrameError, r"returned \[1, 4, 48, 64\]"),
        (torch.zeros(3, 48, 64), FrameError, r"returned \[3, 48, 64\]"),
        ([1, 2], FrameTypeError, "returned a list"),
    ],
)
def test_predictions_of_wrong_shape_are_refused_with_what_was_expected(output, error, message, monkeypatch):
    with pytest.raises(error, match=message):
        run_arm(answering(monkeypatch, output), checkpoint(), frames(1), CONFIG, name="dusk")


def test_a_clip_without_frames_or_without_labelled_pixels_is_named():
    with pytest.raises(DataError, match="clip empty has no frames"):
        run_arm(ARMS["fixed"], checkpoint(), [], CONFIG, name="empty")
    void = [(frame, np.full_like(labels, 255)) for frame, labels in frames(2)]
    with pytest.raises(DataError, match="clip night has no labelled pixel"):
        run_arm(ARMS["fixed"], checkpoint(), void, CONFIG, name="night")

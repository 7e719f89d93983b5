"""The sentences about an evaluation."""

from __future__ import annotations

import numpy as np

from report_inputs import make_run
from ttt_adapt.evaluation.captions import gain_note
from ttt_adapt.evaluation.differences import paired_difference
from ttt_adapt.evaluation.report import Report


def report_of(gains: np.ndarray) -> Report:
    """Two arms on one clip; `gains` are the mIoU of each frame that the second is ahead."""
    report = Report()
    report.add(make_run("fixed", per_frame=[0.5] * len(gains)))
    report.add(make_run("online", per_frame=[0.5 + gain for gain in gains]))
    return report


def test_a_certain_gain_comes_with_its_interval():
    report = report_of(0.05 + 0.01 * np.sin(np.arange(80)))
    found = paired_difference(report, "online", "fixed", "dusk")
    note = gain_note(report, "online", "fixed")
    assert found.low > 0
    assert f"gain of online over fixed: {100 * found.mean:+.2f} points of frame mIoU" in note
    assert f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]" in note
    assert "not certain" not in note


def test_a_gain_whose_interval_contains_0_is_said_to_be_uncertain():
    note = gain_note(report_of(0.01 + 0.2 * np.sin(np.arange(80) / 10)), "online", "fixed")
    assert "contains 0: it is not certain that online is better or worse" in note


def test_a_certain_loss_is_no_uncertain_gain():
    note = gain_note(report_of(-0.05 + 0.01 * np.sin(np.arange(80))), "online", "fixed")
    assert "gain of online over fixed: -" in note
    assert "not certain" not in note


def test_without_enough_frames_the_note_has_no_interval_and_without_shared_runs_there_is_no_note():
    report = report_of(np.array([0.1]))
    assert "without an interval" in gain_note(report, "online", "fixed")
    report.runs[1].seed = 7
    assert gain_note(report, "online", "fixed") == ""

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
    assert note == (
        f"online is better than fixed by {100 * found.mean:.2f} points of frame mIoU. This is certain as far as these "
        f"frames can tell: with 95 % confidence, it is between {100 * found.low:.2f} better and {100 * found.high:.2f} "
        "better."
    )


def test_a_gain_that_may_be_chance_is_said_to_be_uncertain():
    report = report_of(0.01 + 0.2 * np.sin(np.arange(80) / 10))
    found = paired_difference(report, "online", "fixed", "dusk")
    assert gain_note(report, "online", "fixed").endswith(
        "This is not certain, and may be chance: over other frames of this kind, online is with 95 % confidence "
        f"anywhere between {-100 * found.low:.2f} worse and {100 * found.high:.2f} better."
    )


def test_a_certain_loss_is_no_uncertain_gain():
    note = gain_note(report_of(-0.05 + 0.01 * np.sin(np.arange(80))), "online", "fixed")
    assert note.startswith("online is worse than fixed by 4.9")
    assert "This is certain" in note
    assert note.endswith(" worse.")


def test_no_gain_at_all_is_said_so():
    assert gain_note(report_of(np.zeros(40)), "online", "fixed").startswith("online and fixed have the same frame mIoU")


def test_without_enough_frames_the_note_has_no_interval_and_without_shared_runs_there_is_no_note():
    report = report_of(np.array([0.1]))
    assert "too little was run to tell" in gain_note(report, "online", "fixed")
    report.runs[1].seed = 7
    assert gain_note(report, "online", "fixed") == ""

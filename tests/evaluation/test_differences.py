"""Paired differences: what is compared, and what the intervals draw."""

from __future__ import annotations

import numpy as np
import pytest

from report_inputs import make_report, make_run
from ttt_adapt.evaluation.differences import average_difference, paired_difference
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.statistics import paired_bootstrap
from ttt_adapt.evaluation.tables import markdown_table


def two_arms(fps: float | None = None, count: int = 60) -> Report:
    random = np.random.default_rng(0)
    report = Report()
    for seed in range(2):
        for arm, gain in (("fixed", 0.0), ("online", 0.1)):
            per_frame = [None if i == 3 else float(v) for i, v in enumerate(0.4 + gain + 0.05 * random.random(count))]
            report.add(make_run(arm, "dusk", seed, per_frame=per_frame, losses=[None] * count, fps=fps))
    return report


def test_the_paired_difference_draws_seeds_and_blocks_of_frames():
    report = two_arms()
    arrays = {arm: np.array([run.per_frame for run in report.select(arm)], float) for arm in report.arms}
    found = paired_difference(report, "online", "fixed", "dusk")
    expected = paired_bootstrap(arrays["online"], arrays["fixed"], block=10)
    assert (found.mean, found.low, found.high, found.block) == (*expected, 10)
    assert [*found.by_seed] == [0, 1]
    assert [*found.by_seed.values()] == pytest.approx(np.nanmean(arrays["online"] - arrays["fixed"], axis=1))


@pytest.mark.parametrize(
    ("fps", "count", "block"), [(15.0, 101, 15), (0.99, 62, 10), (None, 60, 10), (30.0, 60, 14), (30.0, 5, 1)]
)
def test_a_block_is_a_second_and_ten_frames_but_at_most_a_quarter_of_the_clip(fps, count, block):
    assert paired_difference(two_arms(fps, count), "online", "fixed", "dusk").block == block


def test_a_clip_of_one_frame_has_a_difference_and_no_interval():
    report = Report(
        runs=[make_run(arm, "one", 0, score, per_frame=[score]) for arm, score in (("a", 0.5), ("b", 0.75))]
    )
    found = paired_difference(report, "b", "a", "one")
    assert (found.mean, found.low, found.high) == (pytest.approx(0.25), None, None)
    assert "| b | +25.00 |" in markdown_table(report)


def test_arms_are_compared_on_the_clips_that_both_ran_or_not_at_all():
    report = make_report()  # fixed never ran on day
    assert paired_difference(report, "online", "fixed", "day") is None
    assert average_difference(report, "online", "fixed") == paired_difference(report, "online", "fixed", "dusk")
    report.runs = [run for run in report.runs if (run.arm, run.clip) != ("online", "dusk")]
    assert average_difference(report, "online", "fixed") is None
    assert "| online | n/a | n/a, n/a, n/a |" in markdown_table(report)


def test_the_mean_over_clips_draws_clips():
    gains = [0.1, 0.2, 0.6, 0.3]
    report = Report()
    for clip, gain in enumerate(gains):
        for arm, extra in (("fixed", 0.0), ("online", gain)):
            report.add(make_run(arm, f"clip{clip}", 0, 0.2 + extra, per_frame=[0.2 + extra] * 8))
    found = average_difference(report, "online", "fixed")
    assert (found.mean, found.low, found.high) == pytest.approx(paired_bootstrap(gains, np.zeros(4)))
    assert "### Mean over clips (intervals draw clips)" in markdown_table(report)


def test_the_table_states_difference_interval_and_block():
    text = markdown_table(two_arms(fps=15.0))
    found = paired_difference(two_arms(fps=15.0), "online", "fixed", "dusk")
    assert f"| online | {100 * found.mean:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}] | +" in text
    assert "frames per block: dusk 14" in text  # a quarter of 59 scored frames


def test_a_class_that_no_clip_shows_is_not_available_and_breaks_nothing():
    text = markdown_table(make_report())
    assert "| road | 40.00 | 55.50 |" in text
    assert "| car | n/a | n/a |" in text

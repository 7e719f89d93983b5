"""Means, deviations and bootstrap intervals, against formulas and against streams whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.statistics import block_length, paired_bootstrap, student_quantile, summarize


def test_summarize_gives_the_sample_deviation():
    assert summarize([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.sqrt(7 / 3)))
    assert summarize([0.5]) == (0.5, None)
    with pytest.raises(DataError):
        summarize([])


def test_the_bootstrap_interval_matches_the_normal_one_for_independent_pairs():
    rng = np.random.default_rng(1)
    shared = rng.normal(size=400)
    a, b = shared + rng.normal(0.3, 1.0, 400), shared
    difference, low, high = paired_bootstrap(a, b)
    error = (a - b).std(ddof=1) / 20
    assert difference == pytest.approx((a - b).mean())
    assert low == pytest.approx(difference - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(difference + 1.96 * error, abs=0.15 * error)
    assert paired_bootstrap(a, b) == (difference, low, high)
    assert paired_bootstrap(a, b, seed=1) != (difference, low, high)


def test_blocks_widen_the_interval_where_neighbours_are_alike():
    slow = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    widths = []
    for block in (1, 20):
        _, low, high = paired_bootstrap(slow, np.zeros_like(slow), block=block)
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_frames_without_a_score_leave_the_comparison_in_pairs():
    nan = float("nan")
    assert paired_bootstrap([0.5, nan, 0.7], [0.4, nan, 0.6])[0] == pytest.approx(0.1)
    with pytest.raises(DataError, match="one of a and b only"):
        paired_bootstrap([0.5, nan], [0.5, 0.5])
    with pytest.raises(DataError, match="no scores"):
        paired_bootstrap([], [])
    with pytest.raises(DataError, match="shape"):
        paired_bootstrap([0.5], [0.5, 0.5])
    with pytest.raises(DataError, match="with some seeds only"):
        paired_bootstrap([[0.5, nan], [0.5, 0.5]], [[0.4, nan], [0.4, 0.4]])
    with pytest.raises(ConfigError, match="block"):
        paired_bootstrap([0.5], [0.5], block=0)


# Blocks ------------------------------------------------------------------------------------------------------------


def alternating(frames: int) -> np.ndarray:
    """Neighbours that are as unlike as can be."""
    return np.resize([1.0, -1.0], frames)


@pytest.mark.parametrize(
    ("frames", "fps", "block"),
    [(101, 15.0, 15), (62, 0.99, 10), (62, None, 10), (400, 12.5, 12), (40, 30.0, 10), (12, 15.0, 3), (3, 30.0, 1)],
)
def test_a_block_is_a_second_and_at_least_ten_frames_but_at_most_a_quarter_of_the_clip(frames, fps, block):
    assert block_length(alternating(frames), fps) == block
    assert block_length(np.zeros(frames), fps) == block


def test_a_block_is_three_correlation_times_where_that_is_more():
    stream = autoregressive(np.random.default_rng(0), 0.8, 1, 20000)[0]
    assert block_length(stream, 1.0) == pytest.approx(3 * 1.8 / 0.2, abs=2)
    assert block_length(stream[:60], 1.0) == 15


def test_students_quantile_is_that_of_the_tables():
    for freedom, expected in ((3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)):
        assert student_quantile(freedom) == pytest.approx(expected, rel=0.01)


def autoregressive(random: np.random.Generator, rho: float, streams: int, frames: int) -> np.ndarray:
    """Stationary x_t = rho x_(t - 1) + e_t of variance 1 and mean 0, [streams, frames]."""
    x = random.normal(size=(streams, frames))
    for t in range(1, frames):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * x[:, t]
    return x


def coverage(streams: np.ndarray, block: int | None = None) -> float:
    """Share of the streams, [n, frames] or [n, seeds, frames], whose interval holds the true mean, which is 0.

    Without `block` in blocks of `block_length`.
    """
    held = 0
    for x in streams if streams.ndim == 3 else streams[:, None]:
        length = block_length(x.mean(axis=0), 1.0) if block is None else block
        _, low, high = paired_bootstrap(x, np.zeros_like(x), block=length, samples=400)
        held += low <= 0.0 <= high
    return held / len(streams)


@pytest.mark.parametrize(("rho", "frames"), [(0.44, 62), (0.8, 101), (0.44, 200), (0.9, 400)])
def test_an_interval_of_95_percent_covers_nearly_that_where_neighbouring_frames_are_alike(rho, frames):
    streams = autoregressive(np.random.default_rng(0), rho, 300, frames)
    assert 0.88 <= coverage(streams) <= 0.98
    assert coverage(streams, 1) < 0.82  # single frames are too sure


def test_an_interval_of_independent_frames_is_not_much_too_wide():
    streams = np.random.default_rng(0).normal(size=(300, 62))
    assert 0.9 <= coverage(streams) <= 0.99


# Seeds -------------------------------------------------------------------------------------------------------------


def test_seeds_that_differ_alone_give_the_normal_interval_of_their_mean():
    gains = np.random.default_rng(0).normal(0.3, 1.0, 60)
    table = np.repeat(gains[:, None], 20, axis=1)  # the same on every frame
    mean, low, high = paired_bootstrap(table, np.zeros_like(table), samples=8000)
    error = gains.std(ddof=1) / np.sqrt(60)
    assert mean == pytest.approx(gains.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_seeds_that_agree_on_every_frame_leave_the_interval_of_the_frames():
    frames = autoregressive(np.random.default_rng(0), 0.5, 1, 80)[0]
    one = paired_bootstrap(frames, np.zeros(80), block=10)
    three = paired_bootstrap(np.tile(frames, (3, 1)), np.zeros((3, 80)), block=10)
    assert three == pytest.approx(one)


def test_the_spread_of_draws_is_that_of_crossed_data():
    """Seeds and frames that each add their own: var(seed means) / seeds + var(frame means) / frames, both unbiased."""
    random = np.random.default_rng(0)
    table = random.normal(size=(5, 1)) + random.normal(0, 3.0, size=(1, 50))
    _, low, high = paired_bootstrap(table, np.zeros_like(table), samples=20000)
    error = np.sqrt(table.mean(axis=1).var(ddof=1) / 5 + table.mean(axis=0).var(ddof=1) / 50)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("seeds", "least", "most"), [(1, 0.5, 0.8), (2, 0.82, 0.95), (3, 0.88, 0.98), (8, 0.88, 0.98)])
def test_the_interval_speaks_about_other_seeds_as_well_as_so_many_can(seeds, least, most):
    """A gain that depends on the seed twice as much as on which stretch of the video it was measured on."""
    random = np.random.default_rng(0)
    stretches = autoregressive(random, 0.44, 300, 60)[:, None]
    error = np.sqrt(1.44 / 0.56 / 60)  # of the mean over such a stretch
    tables = stretches + 2 * error * random.normal(size=(300, seeds, 1))
    assert least <= coverage(tables) <= most

"""Means, deviations, and intervals of paired differences over frames and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ttt_adapt.errors import ConfigError, DataError

SHORTEST_BLOCK = 10
"""Frames in a bootstrap block, at least, where the clip has four times as many."""
_Z = NormalDist().inv_cdf(0.975)


def summarize(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1 in the denominator; None for a single value).

    Raises:
        DataError: there are no values.
    """
    if not len(values):
        raise DataError("there are no values to summarize; expected at least one")
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def block_length(differences: np.ndarray, fps: float | None = None) -> int:
    """Frames per bootstrap block: three correlation times of the differences, one second and `SHORTEST_BLOCK` at least.

    An arm's effect on a frame depends on the frames before, at any frame rate, so the length comes from the data. In an
    autoregressive series with correlation r between neighbours, (1 + r) / (1 - r) frames hold as much information as
    one independent frame; blocks of three times that length lose at most a sixth of the variance. A block is at most a
    quarter of the frames, so that there are four to draw. On a clip of a few correlation times the interval is
    therefore too narrow.

    Args:
        differences: of one arm from another, [frames], mean over seeds, without NaN.
        fps: frames per second; None where unknown.
    """
    off = differences - differences.mean()
    power = float(off @ off)
    alike = min(max(float(off[1:] @ off[:-1]) / power, 0.0), 0.99) if power > 0 else 0.0
    wanted = max(SHORTEST_BLOCK, round(fps or 0), math.ceil(3 * (1 + alike) / (1 - alike)))
    return max(1, min(wanted, differences.size // 4))


def paired_bootstrap(
    a: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    b: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    seed: int = 0,
    samples: int = 2000,
    block: int = 1,
) -> tuple[float, float, float]:
    """The mean of a - b on the same frames (or clips), and a 95 % interval for other frames and other seeds.

    Pairs are drawn with replacement, `samples` times; the interval holds the middle 95 % of the mean differences. Two
    things are drawn, independently of each other, because every seed ran on the same frames (the pigeonhole bootstrap
    of crossed data, Owen 2007):

    - **frames**: neighbouring frames of a video are alike, so single frames make the interval too narrow. With
      `block` > 1 runs of that many frames are drawn (circular block bootstrap, Politis and Romano 1992);
    - **seeds**, where there are several.

    With few seeds or frames, the draws vary too little: their variance is too small by the factor (n - 1) / n for n
    seeds, and (n - block) / n for n frames. To correct this, the means of seeds and of frames are moved away from the
    whole mean by the square root of the inverse factor (the rescaling bootstrap, Rao and Wu 1988). The means of frames
    in blocks are also moved by the ratio of Student's quantile for so many blocks to the normal one (Hesterberg 2015).
    `tests/evaluation/test_statistics.py` measures how often the intervals are right.

    Args:
        a: one score per frame, [frames], or of several seeds, [seeds, frames]. NaN marks a frame without a score, in
            both and for all seeds, or not at all.
        b: the scores of the other arm on the same frames with the same seeds.
        seed: of the random draws.
        samples: number of resamplings.
        block: frames per draw; see `block_length`.

    Returns:
        (mean of a - b, lower bound, upper bound), in the unit of the scores.

    Raises:
        DataError: different shapes, nothing to compare, or a score missing on one side or for one seed only.
        ConfigError: `block` or `samples` is below 1.
    """
    difference = _differences(a, b)
    if min(block, samples) < 1:
        raise ConfigError(f"block is {block} and samples is {samples}; expected at least 1")
    seeds, count = difference.shape
    block = min(block, count)
    random = np.random.default_rng(seed)
    starts = random.integers(0, count, (samples, -(-count // block)))
    picked = (starts[..., None] + np.arange(block)).reshape(samples, -1)[:, :count] % count
    means = np.stack([row[picked].mean(axis=1) for row in _stretched(difference, block)], axis=1)
    chosen = random.integers(0, seeds, (samples, seeds))
    low, high = np.quantile(np.take_along_axis(means, chosen, axis=1).mean(axis=1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def _differences(
    a: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    b: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
) -> np.ndarray:
    """a - b, float64 [seeds, frames], without the frames that have no score."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim not in (1, 2):
        raise DataError(
            f"a has shape {first.shape}, b has {second.shape}; expected one score per frame in both, [frames] or "
            "[seeds, frames]"
        )
    difference = np.atleast_2d(first - second)
    absent = np.isnan(difference)
    if not np.array_equal(np.isnan(first), np.isnan(second)) or (absent != absent[:1]).any():
        raise DataError(
            "some frames have a score in one of a and b only, or with some seeds only; all must be scored on the same "
            "frames"
        )
    difference = difference[:, ~absent.any(axis=0)]
    if not difference.size:
        raise DataError("there are no scores to compare; expected at least one frame")
    return difference


def _stretched(difference: np.ndarray, block: int) -> np.ndarray:
    """[seeds, frames], the means of seeds and of frames moved away from the whole mean; see `paired_bootstrap`."""
    seeds, count = difference.shape
    whole = difference.mean()
    by_seed, by_frame = difference.mean(axis=1, keepdims=True) - whole, difference.mean(axis=0) - whole
    return difference + (_stretch(seeds, 1) - 1) * by_seed + (_stretch(count, block) - 1) * by_frame


def _stretch(count: int, block: int) -> float:
    """sqrt(n / (n - block)), for blocks times Student's factor; 1 where all n are one block, and nothing is drawn."""
    if count <= block:
        return 1.0
    student = student_quantile(max(1.0, count / block - 1)) / _Z if block > 1 else 1.0
    return student * math.sqrt(count / (count - block))


def student_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution, by its series in 1 / degrees of freedom.

    Abramowitz and Stegun 26.7.5; off by less than 1 % from 3 degrees on.
    """
    z, v = _Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))

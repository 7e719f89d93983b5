"""Paired differences between two arms, on the clips, frames and seeds that both ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.statistics import block_length, paired_bootstrap


@dataclass(frozen=True)
class Difference:
    """How much better an arm is than another on the same frames with the same seeds.

    Attributes:
        mean: mean difference of the headline metric of a frame, as it is kept (mIoU in [-1, 1], PSNR in dB).
        low: lower end of the 95 % bootstrap interval; None where there is too little to draw from.
        high: its upper end.
        block: frames (of a mean over clips: clips) per bootstrap block.
        by_seed: seed -> its mean difference, for the seeds that both arms have.
        clips: the clips that both arms have.
    """

    mean: float
    low: float | None
    high: float | None
    block: int
    by_seed: Mapping[int, float] = field(default_factory=dict)
    clips: Sequence[str] = ()


def shared_seeds(report: Report, arm: str, reference: str, clip: str) -> list[int]:
    """The seeds that both arms ran on the clip, in ascending order."""
    return sorted(runs_by_seed(report, arm, clip).keys() & runs_by_seed(report, reference, clip).keys())


def is_uneven(report: Report, arm: str, reference: str, clip: str) -> bool:
    """Whether both arms ran the clip with some shared seed, and one of them also with a seed that the other lacks."""
    ours, theirs = (runs_by_seed(report, name, clip).keys() for name in (arm, reference))
    return bool(ours & theirs) and ours != theirs


def paired_difference(report: Report, arm: str, reference: str, clip: str) -> Difference | None:
    """`arm` against `reference` on one clip, frame by frame, over the seeds that both ran.

    The interval says how the difference would vary with other frames and other seeds: the bootstrap draws both, frames
    in blocks of `block_length` (see `paired_bootstrap`). With a single seed it draws frames alone. Few seeds say little
    about how far seeds differ, so look at `by_seed` too.

    Returns:
        None where the two share no seed.
    """
    seeds = shared_seeds(report, arm, reference, clip)
    if not seeds:
        return None
    ours, theirs = (runs_by_seed(report, name, clip) for name in (arm, reference))
    a, b = (np.array([runs[seed].per_frame for seed in seeds], dtype=np.float64) for runs in (ours, theirs))
    by_frame = (a - b).mean(axis=0)
    by_frame = by_frame[~np.isnan(by_frame)]
    block = block_length(by_frame, ours[seeds[0]].fps)
    mean, low, high = paired_bootstrap(a, b, block=block)
    by_seed = dict(zip(seeds, np.nanmean(a - b, axis=1).tolist(), strict=True))
    known = by_frame.size > 1
    return Difference(mean, low if known else None, high if known else None, block, by_seed, (clip,))


def average_difference(report: Report, arm: str, reference: str) -> Difference | None:
    """The mean of `paired_difference` over the clips that both arms ran, on the seeds that both ran on all of those.

    The bootstrap draws clips and seeds. With one clip, this is the difference on that clip, and the bootstrap draws
    frames. With two clips there is no interval.

    Returns:
        None where no seed is left.
    """
    found = {clip: paired_difference(report, arm, reference, clip) for clip in report.clips}
    each = {clip: difference.by_seed for clip, difference in found.items() if difference is not None}
    if len(each) == 1:
        return found[next(iter(each))]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in each.values()))) if each else []
    if not seeds:
        return None
    table = np.array([[by_seed[seed] for by_seed in each.values()] for seed in seeds])
    mean, low, high = paired_bootstrap(table, np.zeros_like(table))
    by_seed = dict(zip(seeds, table.mean(axis=1).tolist(), strict=True))
    known = len(each) > 2
    return Difference(mean, low if known else None, high if known else None, 1, by_seed, tuple(each))


def runs_by_seed(report: Report, arm: str, clip: str) -> dict[int, Run]:
    """The runs of an arm on a clip, by seed."""
    return {run.seed: run for run in report.select(arm, clip)}

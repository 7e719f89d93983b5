"""The text below the tables of an evaluation: what the numbers are, what marks mean, and what is missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ttt_adapt.evaluation.differences import Difference, average_difference, is_uneven, shared_seeds
from ttt_adapt.evaluation.report import Report
from ttt_adapt.tasks.base import Metric

UNEVEN = "§"
"""Marks a change that is computed on fewer seeds than the mean beside it."""


def score_note(report: Report, reference: str) -> str:
    """The text below the table of scores."""
    counts = {len(report.select(arm, clip)) for arm in report.arms for clip in report.clips}
    seeds = f"{_span(counts)} seed{'' if counts == {1} else 's'}"
    sentences = [
        f"{report.task.about}; mean ± sample standard deviation over {seeds}; in "
        f"brackets the change relative to {report.marked(reference)}."
    ]
    uneven = [
        f"{report.marked(arm)} on {clip} {numbers(shared_seeds(report, arm, reference, clip))}"
        for arm in report.arms
        for clip in report.clips
        if is_uneven(report, arm, reference, clip)
    ]
    if uneven:
        sentences.append(f"{UNEVEN} on the seeds that both arms ran: {'; '.join(uneven)}.")
    sentences += [mark_note(report)]
    sentences += [
        metric.note
        for metric in report.task.metrics
        if metric.note and any(run.value(metric) is not None for run in report.runs)
    ]
    return " ".join(filter(None, [*sentences, calibration_note(report), _real_time_note(report)]))


def mark_note(report: Report) -> str:
    """What the marks behind names of arms mean; "" where there are none."""
    if all(run.streaming for run in report.runs):
        return ""
    return "† sees the whole clip before it predicts; ‡ and chooses by the labels: a bound, not a method."


def calibration_note(report: Report) -> str:
    """Which rows ran a calibrated model, with hashes of the calibrations; "" where none did."""
    rows = report.config.get("rows", {})
    found = {arm: [each or "none" for each in rows.get(arm, {}).get("calibrations", ())] for arm in report.arms}
    if not any(found.values()):
        return ""
    each = "; ".join(f"{report.marked(arm)} {', '.join(digests) or 'none'}" for arm, digests in found.items())
    same = {", ".join(digests) for digests in found.values()}
    return f"Calibration of the models: {same.pop() if len(same) == 1 else each}."


def _real_time_note(report: Report) -> str:
    charged = {run.arm: run.forwards for run in report.runs if run.forwards is not None}
    if not charged:
        return ""
    costs = ", ".join(f"{report.marked(arm)} {forwards:g}" for arm, forwards in charged.items())
    return (
        f"Real-time scoring, forward passes per frame: {costs}; an arm that costs R passes misses the next "
        "ceil(R) - 1 frames after each frame it sees, and keeps its last prediction."
    ) + ("" if all(run.streaming for run in report.runs) else " Arms with a mark are not charged.")


def difference_note(report: Report, blocks: Mapping[str, Sequence[int]]) -> str:
    """The text below the table of paired differences.

    Args:
        report: the report.
        blocks: clip -> the frames per bootstrap block, of every row of the table.
    """
    seeds = sorted({run.seed for run in report.runs})
    frame = report.task.metrics[1]
    drawn = "frames and seeds" if len(seeds) > 1 else "frames"
    return (
        f"Mean difference of the {frame.title} on the same frames and seeds, in {frame.step}, and the 95 % interval of "
        f"a circular block bootstrap over {drawn}, 2000 resamplings; frames per block: "
        + ", ".join(f"{clip} {_span(lengths)}" for clip, lengths in blocks.items())
        + "."
        + (f" By seed: {numbers(seeds)}; n/a where not both arms ran it." if len(seeds) > 1 else "")
    )


def gain_note(report: Report, arm: str, reference: str) -> str:
    """How much better an arm is than the reference, and in plain words whether that is certain.

    Args:
        report: of one clip or several.
        arm: the name of the arm.
        reference: the name of the arm that it is compared with.

    Returns:
        Two sentences, such as "online is better than fixed by 2.64 points of frame mIoU. This is not certain, and may
        be chance: over other frames of this kind, online is with 95 % confidence anywhere between 6.60 worse and 11.50
        better."; "" where the two share no run.
    """
    difference = average_difference(report, arm, reference)
    if difference is None:
        return ""
    frame, name = report.task.metrics[1], report.marked(arm)
    gain = frame.signed(frame.better(difference.mean))
    if not gain.strip("+-0."):
        first = f"{name} and {report.marked(reference)} have the same {frame.title}, to {frame.digits} digits"
    else:
        than = "better" if gain[0] == "+" else "worse"
        first = f"{name} is {than} than {report.marked(reference)} by {gain[1:]} {frame.step} of {frame.title}"
    if difference.low is None or difference.high is None:
        return f"{first}. Nobody can say whether this is certain: too little was run to tell."
    low, high = sorted(map(frame.better, (difference.low, difference.high)))
    ends = f"between {_in_words(frame, low)} and {_in_words(frame, high)}"
    drawn = "clips" if len(difference.clips) > 1 else "frames"
    if low <= 0 <= high:
        return (
            f"{first}. This is not certain, and may be chance: over other {drawn} of this kind, {name} is with 95 % "
            f"confidence anywhere {ends}."
        )
    return f"{first}. This is certain as far as these {drawn} can tell: with 95 % confidence, it is {ends}."


def _in_words(metric: Metric, value: float) -> str:
    """A difference where larger is better: "2.64 better", "0.10 worse"."""
    text = metric.signed(value)
    return f"{text[1:]} {'better' if text[0] == '+' else 'worse'}"


def drawn_note(report: Report) -> str:
    """What the bootstrap of means over clips draws, in words."""
    seeds = " and seeds" if len({run.seed for run in report.runs}) > 1 else ""
    return f"draw {'clips' if len(report.clips) > 1 else 'blocks of frames'}{seeds}"


def average_note(report: Report, means: Mapping[str, Sequence[int]], found: Mapping[str, Difference | None]) -> str:
    """The text below the means over clips where arms ran different clips or seeds; "" where all ran the same.

    Args:
        report: the report.
        means: arm -> the seeds that its means are over.
        found: arm -> its difference to the reference.
    """
    seeds = sorted({run.seed for run in report.runs})
    fewer = [f"{report.marked(arm)} {numbers(own)}" for arm, own in means.items() if own and list(own) != seeds]
    less = [
        f"{report.marked(arm)} {', '.join(difference.clips)} with {numbers(sorted(difference.by_seed))}"
        for arm, difference in found.items()
        if difference is not None and (list(difference.clips) != report.clips or sorted(difference.by_seed) != seeds)
    ]
    return " ".join(
        f"{what}: {'; '.join(some)}."
        for what, some in (
            ("Means are over the seeds that ran on every clip", fewer),
            ("Differences are on the clips and seeds that both arms ran", less),
        )
        if some
    )


def gap_note(report: Report) -> str:
    """The runs that some arms have and others lack; "" where all have the same."""
    every = list(dict.fromkeys((run.clip, run.seed) for run in report.runs))
    lacking = []
    for arm in report.arms:
        own = {(run.clip, run.seed) for run in report.select(arm)}
        absent = [f"{clip} seed {seed}" for clip, seed in every if (clip, seed) not in own]
        lacking += [f"{report.marked(arm)} lacks {', '.join(absent)}"] if absent else []
    return f"Not all arms are over the same runs: {'; '.join(lacking)}." if lacking else ""


def _span(counts: Collection[int]) -> str:
    """ "3", or "1 to 3"."""
    return str(min(counts)) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def numbers(seeds: Sequence[int]) -> str:
    """Seeds in words: "seed 1", "seeds 0, 2"."""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"

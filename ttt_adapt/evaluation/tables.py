"""Tables of an evaluation: scores, paired differences with intervals, averages over clips, and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError, missing, nearest
from ..tasks import Metric
from .metrics import paired_bootstrap, summarize

if TYPE_CHECKING:
    from rich.table import Table

    from .report import Report, Run

_BLOCK = 10
"""Frames per bootstrap block where a clip's rate is unknown."""


@dataclass(frozen=True)
class Difference:
    """How much better an arm is than another on the same frames.

    Attributes:
        mean: mean difference of the headline metric of a frame, as it is kept (mIoU in [-1, 1], PSNR in dB).
        low: lower end of the 95 % bootstrap interval; None where there is too little to draw from.
        high: its upper end.
        block: frames per bootstrap block.
    """

    mean: float
    low: float | None
    high: float | None
    block: int


def paired_difference(report: Report, arm: str, reference: str, clip: str) -> Difference | None:
    """`arm` against `reference` on one clip, frame by frame, over the seeds that both ran.

    Seeds are averaged first; frames are then drawn in blocks of one second (10 frames where the rate is unknown), at
    most a quarter of the clip, so the interval is about the clip's frames and not about the seeds.

    Returns:
        None where the two share no seed.
    """
    ours, theirs = ({run.seed: run for run in report.select(name, clip)} for name in (arm, reference))
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    a, b = (np.mean([np.array(runs[s].per_frame, dtype=np.float64) for s in seeds], axis=0) for runs in (ours, theirs))
    scored = int((~np.isnan(a)).sum())
    block = max(1, min(round(ours[seeds[0]].fps or _BLOCK), scored // 4))
    mean, low, high = paired_bootstrap(a, b, block=block)
    return Difference(mean, low, high, block) if scored > 1 else Difference(mean, None, None, block)


def average_difference(report: Report, arm: str, reference: str) -> Difference | None:
    """The mean of `paired_difference` over all clips, with clips drawn; None where one of them is missing.

    Of a single clip it is that clip's, with frames drawn; of two, there is no interval.
    """
    each = [paired_difference(report, arm, reference, clip) for clip in report.clips]
    if len(each) == 1:
        return each[0]
    means = [difference.mean for difference in each if difference is not None]
    if len(means) < len(each):
        return None
    mean, low, high = paired_bootstrap(means, np.zeros(len(means)))
    return Difference(mean, low, high, 1) if len(means) > 2 else Difference(mean, None, None, 1)


def markdown_table(report: Report, reference: str | None = None) -> str:
    """Markdown tables; the first has one row per arm, for each clip the task's metrics, and time.

    A metric that no run of the clip has is left out; runs that measured it have their peak memory. Below stand the
    paired differences to `reference` with their intervals, the means over clips, the IoU of every class where there are
    classes, and failed runs.

    Cells are mean ± sample standard deviation over seeds; in brackets stands the change of the mean against `reference`
    (by default the first arm that was asked for), of mIoU in percent of it. A value is bold where it is the best beyond
    the spread: every streaming arm ran at least two seeds, and its mean minus its deviation is above the mean plus
    deviation of every other (the other way round where less is better). Arms that see the whole clip first are marked,
    and never bold.

    Raises:
        ConfigError: `reference` is no arm of the report.
        DataError: the report holds no runs.
    """
    header, rows, caption = _table(report, reference)
    reference = _reference(report, reference)
    parts = [_markdown(header, rows), caption]
    if len(report.arms) > 1:
        parts += [f"### Paired difference to {reference}", *_difference_table(report, reference)]
    if len(report.clips) > 1:
        parts += ["### Mean over clips (intervals draw clips)", _average_table(report, reference)]
    if any(run.per_class for run in report.runs):
        parts += ["### IoU of every class (%), mean over clips and seeds", _class_table(report)]
    if report.failures:
        parts += ["### Runs that failed", *(f"- {describe_failure(failure)}" for failure in report.failures)]
    return "\n\n".join(parts) + "\n"


def describe_failure(failure: dict[str, object]) -> str:
    """One line about a run that broke off."""
    return f"{failure['arm']} on {failure['clip']}, seed {failure['seed']}: {failure['error']}"


def study_table(report: Report, title: str, reference: str) -> str:
    """The Markdown table of a study: one row per setting, scores averaged over clips.

    Raises:
        DataError: the report holds no runs.
    """
    if not report.runs:
        raise DataError("the report holds no runs; add at least one")
    drawn = "clips" if len(report.clips) > 1 else "blocks of frames"
    note = f"Clips: {', '.join(report.clips)}. Seeds: {len({run.seed for run in report.runs})}. Intervals draw {drawn}."
    return "\n\n".join([f"## {title}", _average_table(report, reference), note]) + "\n"


def rich_table(report: Report, reference: str | None = None) -> Table:
    """The table of `markdown_table` for the terminal, best values in bold.

    Raises:
        MissingPackageError: rich is not installed.
    """
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise missing("rich", "cli") from error
    header, rows, caption = _table(report, reference)
    titles = list(dict.fromkeys(name.partition(": ")[2] for name in header[1:]))
    table = Table(caption=caption, caption_justify="left")
    for title in ["clip", "arm", *titles]:
        table.add_column(title, justify="left" if title in ("clip", "arm") else "right", overflow="fold")
    for clip in report.clips:
        for row in rows:
            cells = {
                name.partition(": ")[2]: cell
                for name, cell in zip(header, row, strict=True)
                if name.startswith(f"{clip}: ")
            }
            texts = [
                Text(text, style="bold" if best else "") for text, best in (cells.get(t, ("", False)) for t in titles)
            ]
            table.add_row(clip, row[0][0], *texts, end_section=row is rows[-1])
    return table


Cell = tuple[str, bool]
"""A table cell: its text, and whether it is the best beyond the spread."""


def _table(report: Report, reference: str | None) -> tuple[list[str], list[list[Cell]], str]:
    """Header, rows and caption of the report's table."""
    if not report.runs:
        raise DataError("the report holds no runs; add at least one")
    reference = _reference(report, reference)
    if reference not in report.arms:
        raise ConfigError(f"reference arm {reference!r} is not in the report; {nearest(reference, report.arms)}")
    header, columns = ["arm"], [[(_marked(report, arm), False) for arm in report.arms]]
    for clip in report.clips:
        for metric in report.task.metrics:
            if all(run.value(metric) is None for run in report.select(clip=clip)):
                continue
            header.append(f"{clip}: {metric.label}")
            columns.append(_score_column(report, clip, metric, reference))
        header.append(f"{clip}: ms/frame")
        columns.append([_plain_cell(report.select(arm, clip), "ms_per_frame") for arm in report.arms])
        if any(run.peak_memory_mib is not None for run in report.select(clip=clip)):
            header.append(f"{clip}: peak MiB")
            columns.append([_plain_cell(report.select(arm, clip), "peak_memory_mib") for arm in report.arms])
    counts = sorted({len(report.select(arm, clip)) for arm in report.arms for clip in report.clips})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = (
        f"{report.task.about}; mean ± sample standard deviation over "
        f"{seeds} seed{'' if counts == [1] else 's'}; in brackets the change relative to {reference}."
    )
    if not all(run.streaming for run in report.runs):
        caption += " † sees the whole clip before it predicts; ‡ and chooses by the labels: a bound, not a method."
    if any(run.j is not None for run in report.runs):
        caption += " J is DAVIS' region similarity of the foreground, over the clip and per frame."
    charged = {run.arm: run.forwards for run in report.runs if run.forwards is not None}
    if charged:
        caption += " Real-time scoring, forward passes per frame: " + ", ".join(
            f"{arm} {forwards:g}" for arm, forwards in charged.items()
        )
        caption += "; an arm misses ceil of it - 1 frames after each that it sees, and keeps its last prediction."
        caption += "" if all(run.streaming for run in report.runs) else " Arms with a mark are not charged."
    return header, [list(row) for row in zip(*columns, strict=True)], caption


def _reference(report: Report, name: str | None) -> str:
    found = report.reference if name is None else name
    if found is None:
        raise DataError("the report holds no runs; add at least one")
    return found


def _marked(report: Report, arm: str) -> str:
    """The arm's name, with a mark where it is no streaming method."""
    runs = report.select(arm)
    return arm + (" ‡" if any(run.oracle for run in runs) else "" if all(run.streaming for run in runs) else " †")


def _score_column(report: Report, clip: str, metric: Metric, reference: str) -> list[Cell]:
    values = [_present(report.select(arm, clip), metric.field) for arm in report.arms]
    stats = [summarize(scores) if scores else None for scores in values]
    base = stats[report.arms.index(reference)]
    methods = [arm for arm in report.arms if all(run.streaming for run in report.select(arm))]
    cells: list[Cell] = []
    for position, (arm, stat) in enumerate(zip(report.arms, stats, strict=True)):
        if stat is None:
            cells.append(("n/a", False))
            continue
        mean, spread = stat
        text = metric.text(mean, spread)
        if base is not None and arm != reference:
            text += _change(metric, mean, base[0])
        among = [report.arms.index(arm) for arm in methods]
        cells.append((text, arm in methods and _is_best(stats, position, among, metric)))
    return cells


def _change(metric: Metric, mean: float, base: float) -> str:
    """What stands in brackets behind a mean, given that of the reference."""
    if metric.change == "percent":
        return f" ({100 * (mean / base - 1):+.1f}%)" if base > 0 else ""
    return f" ({metric.signed(mean - base)})" if metric.change else ""


def _is_best(
    stats: Sequence[tuple[float, float | None] | None], position: int, among: Sequence[int], metric: Metric
) -> bool:
    """Whether mean - deviation at `position` is better than mean + deviation everywhere else `among` them."""
    found = {place: stats[place] for place in among}
    known = {
        place: (metric.better(stat[0]), stat[1])
        for place, stat in found.items()
        if stat is not None and stat[1] is not None
    }
    if len(known) < len(found) or len(known) < 2:
        return False
    mean, spread = known[position]
    return all(mean - spread > other + width for place, (other, width) in known.items() if place != position)


def _present(runs: Sequence[Run], name: str) -> list[float]:
    """A number of every run that has it."""
    return [value for run in runs if (value := getattr(run, name)) is not None]


def _plain_cell(runs: Sequence[Run], name: str) -> Cell:
    values = _present(runs, name)
    return (f"{summarize(values)[0]:.1f}" if values else "n/a"), False


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |" for row in rows]
    return "\n".join(lines)


def _difference_cell(difference: Difference | None, metric: Metric) -> Cell:
    if difference is None:
        return "n/a", False
    text = metric.signed(difference.mean)
    if difference.low is not None and difference.high is not None:
        text += f" [{metric.signed(difference.low)}, {metric.signed(difference.high)}]"
    return text, False


def _difference_table(report: Report, reference: str) -> tuple[str, str]:
    """The table of paired differences, and its caption."""
    frame = report.task.metrics[1]
    rows: list[list[Cell]] = []
    blocks: dict[str, int] = {}
    for arm in report.arms:
        if arm == reference:
            continue
        found = {clip: paired_difference(report, arm, reference, clip) for clip in report.clips}
        blocks |= {clip: difference.block for clip, difference in found.items() if difference is not None}
        rows.append([(arm, False), *(_difference_cell(difference, frame) for difference in found.values())])
    sizes = ", ".join(f"{clip} {block}" for clip, block in blocks.items())
    return _markdown(["arm", *report.clips], rows), (
        f"Mean difference of the {frame.title} on the same frames and seeds, in {frame.step}, and the 95 % interval "
        "of a circular block bootstrap over frames, 2000 resamplings; frames per block: " + sizes + "."
    )


def _average_table(report: Report, reference: str) -> str:
    """Means over clips of every score, with the paired difference to the reference."""
    metrics = [each for each in report.task.metrics if all(run.value(each) is not None for run in report.runs)]
    frame = report.task.metrics[1]
    rows = []
    for arm in report.arms:
        row: list[Cell] = [(arm, False)]
        for metric in metrics:
            seeds = {run.seed for run in report.select(arm)}
            each = [
                _present([run for run in report.select(arm) if run.seed == seed], metric.field)
                for seed in sorted(seeds)
            ]
            whole = all(len(values) == len(report.clips) for values in each)
            means = [float(np.mean(values)) for values in each]
            row.append((metric.text(*summarize(means)) if whole else "n/a", False))
        row.append(
            ("", False) if arm == reference else _difference_cell(average_difference(report, arm, reference), frame)
        )
        rows.append([*row, _plain_cell(report.select(arm), "ms_per_frame")])
    header = ["arm", *(each.label for each in metrics), f"{frame.title} - {reference} [95 %]", "ms/frame"]
    return _markdown(header, rows)


def _class_table(report: Report) -> str:
    """One row per class, one column per arm; n/a for a class that no clip shows."""
    rows = []
    for name in dict.fromkeys(name for run in report.runs for name in run.per_class):
        row: list[Cell] = [(name, False)]
        for arm in report.arms:
            values = [iou for run in report.select(arm) if (iou := run.per_class.get(name)) is not None]
            row.append((f"{100 * np.mean(values):.2f}" if values else "n/a", False))
        rows.append(row)
    return _markdown(["class", *report.arms], rows)

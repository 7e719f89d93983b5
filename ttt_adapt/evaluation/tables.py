"""Tables of an evaluation: scores, paired differences with intervals, averages over clips, and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import ConfigError, DataError, missing, nearest
from ttt_adapt.evaluation.captions import (
    UNEVEN,
    average_note,
    difference_note,
    drawn_note,
    gap_note,
    mark_note,
    score_note,
)
from ttt_adapt.evaluation.differences import Difference, average_difference, is_uneven, paired_difference, runs_by_seed
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.statistics import summarize
from ttt_adapt.tasks import Metric

if TYPE_CHECKING:
    from rich.table import Table


def markdown_table(report: Report, reference: str | None = None) -> str:
    """Markdown tables; the first has one row per arm, for each clip the task's metrics, and time.

    A metric that no run of the clip has is left out; runs that measured it have their peak memory. Below stand the
    paired differences to `reference` with their intervals, the means over clips, a score of every class where there are
    classes, and failed runs.

    Cells are mean ± sample standard deviation over seeds; in brackets stands the change of the mean against `reference`
    (by default the first arm that was asked for), of mIoU in percent of it. Every change is on the seeds (and clips)
    that both arms have; where those are not all, a note says which they are. A value is bold where it is the best
    beyond the spread: every streaming arm ran the same two or more seeds, and its mean minus its deviation is above the
    mean plus deviation of every other (the other way round where less is better). Arms that see the whole clip first
    are marked in every table, and never bold.

    Raises:
        ConfigError: `reference` is no arm of the report.
        DataError: the report holds no runs.
    """
    header, rows, caption = _table(report, reference)
    reference = _reference(report, reference)
    parts = [_markdown(header, rows), caption]
    if len(report.arms) > 1:
        parts += [f"### Paired difference to {report.marked(reference)}", *_difference_table(report, reference)]
    if len(report.clips) > 1:
        parts += [f"### Mean over clips (intervals {drawn_note(report)})", *_average_table(report, reference)]
    if any(run.per_class for run in report.runs):
        parts += [_class_title(report), _class_table(report), gap_note(report)]
    if report.failures:
        parts += ["### Runs that failed", *(f"- {describe_failure(failure, report)}" for failure in report.failures)]
    return "\n\n".join(filter(None, parts)) + "\n"


def describe_failure(failure: Mapping[str, Any], report: Report | None = None) -> str:
    """One line about a run that failed, or a clip that cannot be scored; with `report`, the arm has its mark."""
    if failure.get("arm") is None:
        return f"every arm on {failure['clip']}: {failure['error']}"
    arm = failure["arm"] if report is None else report.marked(failure["arm"])
    return f"{arm} on {failure['clip']}, seed {failure['seed']}: {failure['error']}"


def study_table(report: Report, title: str, reference: str) -> str:
    """The Markdown table of a study: one row per setting, scores averaged over clips.

    Raises:
        DataError: the report holds no runs.
    """
    if not report.runs:
        raise DataError("the report holds no runs; add at least one")
    seeds = len({run.seed for run in report.runs})
    about = f"Clips: {', '.join(report.clips)}. Seeds: {seeds}. Intervals {drawn_note(report)}."
    note = " ".join(filter(None, [about, mark_note(report)]))
    return "\n\n".join(filter(None, [f"## {title}", *_average_table(report, reference), note])) + "\n"


def rich_table(report: Report, reference: str | None = None, width: int | None = None) -> Table:
    """The table of `markdown_table` for the terminal, best values in bold.

    Args:
        report: the results to show.
        reference: as in `markdown_table`.
        width: of the terminal, in characters. Columns that do not fit are left out, but never the headline metric, and
            the caption names them. None: all columns.

    Raises:
        MissingPackageError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise missing("rich", "cli") from error
    header, rows, caption = _table(report, reference)
    titles = list(dict.fromkeys(name.partition(": ")[2] for name in header[1:]))
    shown = list(titles)
    table = _rich(report, header, rows, shown, caption)
    while width is not None and len(shown) > 1 and Console(width=10_000).measure(table).maximum > width:
        shown.pop()
        left = ", ".join(title for title in titles if title not in shown)
        table = _rich(report, header, rows, shown, f"{caption} In the written table: {left}.")
    return table


def _rich(
    report: Report, header: Sequence[str], rows: Sequence[Sequence[Cell]], titles: Sequence[str], caption: str
) -> Table:
    """One row per clip and arm, with the columns of those titles."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text(caption, "table.caption"), caption_justify="left")
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
            table.add_row(Text(clip), Text(row[0][0]), *texts, end_section=row is rows[-1])
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
    header, columns = ["arm"], [[(report.marked(arm), False) for arm in report.arms]]
    for clip in report.clips:
        for metric in report.task.metrics:
            if all(run.value(metric) is None for run in report.select(clip=clip)):
                continue
            header.append(f"{clip}: {metric.label}")
            columns.append(_score_column(report, clip, metric, reference))
        header.append(f"{clip}: ms/frame")
        columns.append([_plain_cell([run.ms_per_frame for run in report.select(arm, clip)]) for arm in report.arms])
        if any(run.peak_memory_mib is not None for run in report.select(clip=clip)):
            header.append(f"{clip}: peak MiB")
            columns.append(
                [_plain_cell([run.peak_memory_mib for run in report.select(arm, clip)]) for arm in report.arms]
            )
    return header, [list(row) for row in zip(*columns, strict=True)], score_note(report, reference)


def _reference(report: Report, name: str | None) -> str:
    found = report.reference if name is None else name
    if found is None:
        raise DataError("the report holds no runs; add at least one")
    return found


def _score_column(report: Report, clip: str, metric: Metric, reference: str) -> list[Cell]:
    values = [_known(report.select(arm, clip), metric) for arm in report.arms]
    stats = [summarize(scores) if scores else None for scores in values]
    methods = [arm for arm in report.arms if all(run.streaming for run in report.select(arm))]
    alike = len({frozenset(runs_by_seed(report, arm, clip)) for arm in methods}) == 1
    cells: list[Cell] = []
    for position, (arm, stat) in enumerate(zip(report.arms, stats, strict=True)):
        if stat is None:
            cells.append(("n/a", False))
            continue
        text = metric.text(*stat) + ("" if arm == reference else _change(report, arm, reference, clip, metric))
        among = [report.arms.index(arm) for arm in methods]
        cells.append((text, alike and arm in methods and _is_best(stats, position, among, metric)))
    return cells


def _change(report: Report, arm: str, reference: str, clip: str, metric: Metric) -> str:
    """The text in brackets behind a mean: its change against the reference, on the seeds that both have."""
    ours, theirs = (
        {
            seed: value
            for seed, run in runs_by_seed(report, name, clip).items()
            if (value := run.value(metric)) is not None
        }
        for name in (arm, reference)
    )
    shared = [seed for seed in ours if seed in theirs]
    if not shared or not metric.change:
        return ""
    mean, base = (float(np.mean([values[seed] for seed in shared])) for values in (ours, theirs))
    if metric.change == "percent" and base <= 0:
        return ""
    text = f"{100 * (mean / base - 1):+.1f}%" if metric.change == "percent" else metric.signed(mean - base)
    return f" ({text})" + (f" {UNEVEN}" if is_uneven(report, arm, reference, clip) else "")


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


def _known(runs: Sequence[Run], metric: Metric) -> list[float]:
    """A score of every run that has it."""
    return [value for run in runs if (value := run.value(metric)) is not None]


def _plain_cell(numbers: Sequence[float | None]) -> Cell:
    values = [number for number in numbers if number is not None]
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
    """The table of paired differences, and its note."""
    frame = report.task.metrics[1]
    seeds = sorted({run.seed for run in report.runs})
    header = ["arm", *(name for clip in report.clips for name in (clip, "by seed")[: 1 + (len(seeds) > 1)])]
    rows: list[list[Cell]] = []
    blocks: dict[str, list[int]] = {}
    for arm in report.arms:
        if arm == reference:
            continue
        row: list[Cell] = [(report.marked(arm), False)]
        for clip in report.clips:
            difference = paired_difference(report, arm, reference, clip)
            row.append(_difference_cell(difference, frame))
            if difference is not None:
                blocks.setdefault(clip, []).append(difference.block)
            if len(seeds) > 1:
                own = {} if difference is None else difference.by_seed
                row.append((", ".join(frame.signed(own[s]) if s in own else "n/a" for s in seeds), False))
        rows.append(row)
    return _markdown(header, rows), difference_note(report, blocks)


def _average_table(report: Report, reference: str) -> tuple[str, str]:
    """Means over clips of every score, with the paired difference to the reference; and their note.

    An arm's means are over the seeds that ran on every clip.
    """
    metrics = [each for each in report.task.metrics if all(run.value(each) is not None for run in report.runs)]
    frame = report.task.metrics[1]
    rows: list[list[Cell]] = []
    whole: dict[str, list[int]] = {}
    found: dict[str, Difference | None] = {}
    for arm in report.arms:
        by_clip = [runs_by_seed(report, arm, clip) for clip in report.clips]
        whole[arm] = sorted(set.intersection(*(set(runs) for runs in by_clip)))
        row: list[Cell] = [(report.marked(arm), False)]
        for metric in metrics:
            means = [float(np.mean(_known([runs[s] for runs in by_clip], metric))) for s in whole[arm]]
            row.append((metric.text(*summarize(means)) if means else "n/a", False))
        if arm != reference:
            found[arm] = average_difference(report, arm, reference)
        row.append(("", False) if arm == reference else _difference_cell(found[arm], frame))
        rows.append([*row, _plain_cell([run.ms_per_frame for run in report.select(arm)])])
    titles = [f"{frame.title} - {report.marked(reference)} [95 %]", "ms/frame"]
    header = ["arm", *(each.label for each in metrics), *titles]
    return _markdown(header, rows), average_note(report, whole, found)


def _class_title(report: Report) -> str:
    """The heading of the table of classes."""
    metric = report.task.class_metric
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"### {metric.title} of every class{unit}, mean over clips and seeds"


def _class_table(report: Report) -> str:
    """One row per class, one column per arm; n/a for a class that no clip shows."""
    rows, metric = [], report.task.class_metric
    for name in dict.fromkeys(name for run in report.runs for name in run.per_class):
        row: list[Cell] = [(name, False)]
        for arm in report.arms:
            values = [iou for run in report.select(arm) if (iou := run.per_class.get(name)) is not None]
            row.append((metric.text(float(np.mean(values))) if values else "n/a", False))
        rows.append(row)
    return _markdown(["class", *map(report.marked, report.arms)], rows)

"""Figures of a whole evaluation: bars of scores, sweeps of a setting, and losses against scores.

Arms have the same marks as in tables: † sees the whole clip before it predicts, ‡ also chooses by the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import DataError
from ttt_adapt.evaluation.figure import (
    COLOURS,
    axis_label,
    legend_room,
    mean_over_present,
    new_figure,
    save_figure,
    tidy_axes,
)
from ttt_adapt.evaluation.report import Report, Run
from ttt_adapt.evaluation.statistics import summarize
from ttt_adapt.tasks import find_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HATCHES = ("", "///", "...", "xxx")
"""Hatches of the bars whose colour is already in use."""
_ROOM = 0.25
"""A bar of at least this width in inches has its value written beside it."""


def plot_bars(path: str | Path, report: Report) -> None:
    """Draws the headline metric of every arm, grouped by clip; bars are means over seeds, whiskers ± one deviation.

    Bars begin at zero, or at what the input itself scores, where the metric has such a floor.

    Args:
        path: where to write; the suffix chooses the format (png, svg, pdf).
        report: what to draw.

    Raises:
        DataError: the report holds no runs.
        MissingPackageError: matplotlib is not installed.
    """
    if not report.runs:
        raise DataError("the report holds no runs; add at least one")
    arms, clips = report.arms, report.clips
    across = min(16.0, max(8.0, 2.5 + 0.62 * len(arms) * len(clips)))
    columns, extra = legend_room(across, arms)
    figure = new_figure(across, 5.0 + extra)
    axes = figure.subplots()
    width = 0.8 / len(arms)
    floor = report.headline.floor
    for position, arm in enumerate(arms):
        colour = COLOURS[position % len(COLOURS)]
        for place, clip in enumerate(clips):
            runs = report.select(arm, clip)
            if scores := _shown(runs):
                floors = [value for run in runs if floor and (value := run.scores.get(floor)) is not None]
                begin = float(np.mean(floors)) if floors else 0.0
                centre = place + (position - (len(arms) - 1) / 2) * width
                hatch = _HATCHES[position // len(COLOURS) % len(_HATCHES)]
                _draw_bar(axes, centre, scores, begin, width, colour, hatch, report.marked(arm))
                if across * width / len(clips) > _ROOM:
                    _write_value(axes, centre, scores, begin)
    axes.set_xticks(range(len(clips)), clips)
    where = " over the clip, from that of the input" if floor else " over the clip"
    axes.set_ylabel(axis_label(report.headline, where))
    axes.margins(y=0.1)
    tidy_axes(axes)
    axes.tick_params(axis="x", length=0)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=columns, frameon=False)
    save_figure(figure, path)


def plot_sweep(
    path: str | Path,
    report: Report,
    values: Mapping[str, float | None],
    reference: str,
    axis: str,
    log: bool = True,
) -> None:
    """Draws the gain over `reference` against a setting: every clip thin, their mean thick; 1050 x 750 pixels as PNG.

    Args:
        path: where to write; the suffix chooses the format (png, svg, pdf).
        report: what to draw.
        values: label of an arm -> its place on the axis; one without a place (None) becomes a dashed level.
        reference: the arm at zero; the gain is that of the headline metric over the clip, on the same clip and seed.
        axis: what the axis says.
        log: whether it is logarithmic.

    Raises:
        DataError: no arm of `values` ran.
        MissingPackageError: matplotlib is not installed.
    """
    places = sorted({value for arm, value in values.items() if value is not None and arm in report.arms})
    if not places:
        raise DataError("none of the settings ran; there is nothing to draw")
    figure = new_figure(7.0, 5.0)
    axes = figure.subplots()
    _draw_sweep(axes, report, values, reference, places)
    for arm in (arm for arm, value in values.items() if value is None):
        level = [np.mean(gain) for clip in report.clips if (gain := _gains(report, arm, reference, clip))]
        if level:
            label = report.marked(arm)
            axes.axhline(float(np.mean(level)), color="#000000", linestyle="--", linewidth=1.4, label=label)
    axes.axhline(0.0, color=COLOURS[0], linewidth=1.4)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{report.headline.title} - {report.marked(reference)} ({report.headline.step})")
    tidy_axes(axes)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)


def _draw_sweep(
    axes: Axes, report: Report, values: Mapping[str, float | None], reference: str, places: Sequence[float]
) -> None:
    """A curve of gains for every clip, and their mean where there are several."""
    curves = []
    for position, clip in enumerate(report.clips):
        gains = {arm: _gains(report, arm, reference, clip) for arm in values}
        at = {value: gains[arm] for arm, value in values.items() if value is not None and gains[arm]}
        curves.append(np.array([np.mean(at[place]) if place in at else np.nan for place in places]))
        spread = [float(np.std(at[place], ddof=1)) if len(at.get(place, ())) > 1 else 0.0 for place in places]
        colour = COLOURS[1 + position % (len(COLOURS) - 1)]
        axes.errorbar(places, curves[-1], spread, color=colour, linewidth=1, marker="o", markersize=3, label=clip)
    if len(curves) > 1:
        axes.plot(places, mean_over_present(np.array(curves), axis=0), color="#000000", linewidth=2.6, label="mean")


def plot_losses(path: str | Path, report: Report) -> bool:
    """Draws the headline metric against the mean label-free loss, one point per run, one colour per arm.

    1050 x 750 pixels as PNG.

    From both numbers the mean over the drawn runs of the same clip is subtracted. Otherwise a clip that is hard both to
    reconstruct and to predict would look like a relation between loss and score.

    Args:
        path: where to write; the suffix chooses the format (png, svg, pdf).
        report: what to draw; arms without a loss are left out.

    Returns:
        Whether there was anything to draw; if not, nothing is written.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    points = []
    for clip in report.clips:
        runs = [run for run in report.select(clip=clip) if any(loss is not None for loss in run.losses)]
        losses = np.array([np.mean([loss for loss in run.losses if loss is not None]) for run in runs])
        scores = np.array(_shown(runs))
        points += (
            [
                (run.arm, loss, score)
                for run, loss, score in zip(runs, losses - losses.mean(), scores - scores.mean(), strict=True)
            ]
            if runs
            else []
        )
    if not points:
        return False
    figure = new_figure(7.0, 5.0)
    axes = figure.subplots()
    for position, arm in enumerate(dict.fromkeys(arm for arm, _, _ in points)):
        x, y = zip(*[(loss, score) for name, loss, score in points if name == arm], strict=True)
        colour, marker = COLOURS[(1 + position) % len(COLOURS)], "os^Dv"[position // len(COLOURS) % 5]
        axes.scatter(x, y, s=28, color=colour, marker=marker, label=report.marked(arm))
    axes.set_xlabel("mean loss of the run - that of its clip")
    axes.set_ylabel(f"{report.headline.title} - that of its clip ({report.headline.step})")
    tidy_axes(axes)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def _gains(report: Report, arm: str, reference: str, clip: str) -> list[float]:
    """The headline metric above the reference's on one clip, as it is shown, for every seed that both ran."""
    others = report.select(reference, clip)
    base = {run.seed: value for run, value in zip(others, _shown(others), strict=True)}
    ours = report.select(arm, clip)
    return [value - base[run.seed] for run, value in zip(ours, _shown(ours), strict=True) if run.seed in base]


def _shown(runs: Sequence[Run]) -> list[float]:
    """The headline metric of every run, as it is shown."""
    metrics = (find_task(run.task).metrics[0] for run in runs)
    return [metric.scale * (run.value(metric) or 0.0) for run, metric in zip(runs, metrics, strict=True)]


def _draw_bar(
    axes: Axes, centre: float, scores: Sequence[float], begin: float, width: float, colour: str, hatch: str, label: str
) -> None:
    mean, spread = summarize(scores)
    whisker: dict[str, Any] = {"elinewidth": 1.2, "capsize": 3, "ecolor": "#222222"}
    axes.bar(
        centre, mean - begin, 0.92 * width, begin, yerr=spread, color=colour, hatch=hatch, label=label, error_kw=whisker
    )


def _write_value(axes: Axes, centre: float, scores: Sequence[float], begin: float) -> None:
    """The mean, beyond the end of its bar."""
    mean, spread = summarize(scores)
    up = mean >= begin
    axes.annotate(
        f"{mean:.1f}",
        (centre, mean + (spread or 0.0) * (1 if up else -1)),
        xytext=(0, 3 if up else -3),
        textcoords="offset points",
        ha="center",
        va="bottom" if up else "top",
        fontsize=8,
    )

"""Figures of an evaluation. They need matplotlib and draw without a display and without pyplot's global state.

Arms have the same marks as in tables: † sees the whole clip before it predicts, ‡ also chooses by the labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import DataError, missing
from ttt_adapt.evaluation.report import Report, Run, marked
from ttt_adapt.evaluation.statistics import summarize
from ttt_adapt.tasks import Metric, find_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: people with the common kinds of colour blindness can tell the colours apart. Grey is first,
# because the first arm is usually the fixed model.
_COLOURS = ("#6b6b6b", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_HATCHES = ("", "///", "...", "xxx")
"""Hatches of the bars whose colour is already in use."""
_TINTS = ("#ffffff", "#fdeedd", "#e2e2f2", "#ebebeb", "#dcedf7", "#e6f3e3")
"""Backgrounds of the bands of a stream, in the order in which their conditions first come."""
_SMOOTH = 9
_DPI = 150
_ROOM = 0.25
"""A bar of at least this width in inches has its value written beside it."""


def plot_stream(path: str | Path, runs: Sequence[Run], title: str = "", conditions: Sequence[str] = ()) -> None:
    """Draws the label-free loss and the headline metric along one clip, one colour per arm.

    1200 x 900 pixels as PNG, and higher where many arms need a long legend.

    Thin lines are single frames, thick lines a centred running mean over 9 frames. Seeds of one arm are averaged.

    Args:
        path: where to write; the suffix chooses the format (png, svg, pdf).
        runs: runs on one clip, such as `report.select(clip="dusk")`.
        title: stands above; by default the clip's name.
        conditions: what every frame is like, such as "night" or "fog". Neighbours that are alike form a band, which is
            named on the time axis.

    Raises:
        DataError: no runs, or runs on several clips or of different lengths, or not one condition for each frame.
        MissingPackageError: matplotlib is not installed.
    """
    clips, lengths = {run.clip for run in runs}, {len(run.per_frame) for run in runs}
    if len(clips) != 1 or len(lengths) != 1:
        raise DataError(
            f"got {len(runs)} runs on clips {sorted(clips)} of {sorted(lengths)} frames; expected runs on one clip"
        )
    length = lengths.pop()
    if conditions and len(conditions) != length:
        raise DataError(f"got {len(conditions)} conditions for {length} frames; expected one for each frame")
    headline = find_task(runs[0].task).metrics[0]
    arms = list(dict.fromkeys(run.arm for run in runs))
    columns, extra = _legend(8.0, arms)
    figure = _figure(8.0, 6.0 + extra)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    for position, arm in enumerate(arms):
        colour, dashes = _COLOURS[position % len(_COLOURS)], "--" if position >= len(_COLOURS) else "-"
        chosen = [run for run in runs if run.arm == arm]
        label = marked(arm, chosen)
        _draw_line(upper, [run.losses for run in chosen], colour, dashes, label)
        _draw_line(lower, [run.per_frame for run in chosen], colour, dashes, label, scale=headline.scale)
    upper.set_ylabel("label-free loss")
    lower.set_ylabel(_axis(headline, " of the frame"))
    lower.set_xlabel(f"frame (thin: single ones, thick: mean over {_SMOOTH})")
    lower.set_xlim(0, max(length - 1, 1))
    for axes in (upper, lower):
        _style(axes)
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        _draw_bands(axes, conditions, named=axes is lower)
    if not upper.has_data():
        upper.text(0.5, 0.5, "no arm adapted", transform=upper.transAxes, ha="center", va="center", color="#6b6b6b")
        upper.set_yticks([])
    figure.suptitle(title or clips.pop(), fontsize=13, fontweight="bold")
    handles, names = lower.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    _save(figure, path)


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
    columns, extra = _legend(across, arms)
    figure = _figure(across, 5.0 + extra)
    axes = figure.subplots()
    width = 0.8 / len(arms)
    floor = report.headline.floor
    for position, arm in enumerate(arms):
        colour = _COLOURS[position % len(_COLOURS)]
        for place, clip in enumerate(clips):
            runs = report.select(arm, clip)
            if scores := _shown(runs):
                floors = [value for run in runs if floor and (value := run.scores.get(floor)) is not None]
                begin = float(np.mean(floors)) if floors else 0.0
                centre = place + (position - (len(arms) - 1) / 2) * width
                hatch = _HATCHES[position // len(_COLOURS) % len(_HATCHES)]
                _draw_bar(axes, centre, scores, begin, width, colour, hatch, report.marked(arm))
                if across * width / len(clips) > _ROOM:
                    _write_value(axes, centre, scores, begin)
    axes.set_xticks(range(len(clips)), clips)
    where = " over the clip, from that of the input" if floor else " over the clip"
    axes.set_ylabel(_axis(report.headline, where))
    axes.margins(y=0.1)
    _style(axes)
    axes.tick_params(axis="x", length=0)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=columns, frameon=False)
    _save(figure, path)


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
    figure = _figure(7.0, 5.0)
    axes = figure.subplots()
    _draw_sweep(axes, report, values, reference, places)
    for arm in (arm for arm, value in values.items() if value is None):
        level = [np.mean(gain) for clip in report.clips if (gain := _gains(report, arm, reference, clip))]
        if level:
            label = report.marked(arm)
            axes.axhline(float(np.mean(level)), color="#000000", linestyle="--", linewidth=1.4, label=label)
    axes.axhline(0.0, color=_COLOURS[0], linewidth=1.4)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places], minor=False)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{report.headline.title} - {report.marked(reference)} ({report.headline.step})")
    _style(axes)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


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
        colour = _COLOURS[1 + position % (len(_COLOURS) - 1)]
        axes.errorbar(places, curves[-1], spread, color=colour, linewidth=1, marker="o", markersize=3, label=clip)
    if len(curves) > 1:
        axes.plot(places, _mean_over_present(np.array(curves), axis=0), color="#000000", linewidth=2.6, label="mean")


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
    figure = _figure(7.0, 5.0)
    axes = figure.subplots()
    for position, arm in enumerate(dict.fromkeys(arm for arm, _, _ in points)):
        x, y = zip(*[(loss, score) for name, loss, score in points if name == arm], strict=True)
        colour, marker = _COLOURS[(1 + position) % len(_COLOURS)], "os^Dv"[position // len(_COLOURS) % 5]
        axes.scatter(x, y, s=28, color=colour, marker=marker, label=report.marked(arm))
    axes.set_xlabel("mean loss of the run - that of its clip")
    axes.set_ylabel(f"{report.headline.title} - that of its clip ({report.headline.step})")
    _style(axes)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)
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


def _axis(metric: Metric, where: str) -> str:
    """The label of an axis."""
    return f"{metric.title}{where}" + (f" ({metric.unit})" if metric.unit else "")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "eval") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _legend(width: float, names: Sequence[str]) -> tuple[int, float]:
    """How many columns a legend has in a figure of `width` inches, and the inches that rows beyond the second need."""
    inches = 0.75 + 0.09 * max(len(name) for name in names)  # with room for a mark
    columns = max(1, min(len(names), int(width // inches)))
    return columns, 0.21 * max(-(-len(names) // columns) - 2, 0)


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_line(
    axes: Axes, series: Sequence[Sequence[float | None]], colour: str, dashes: str, label: str, scale: float = 1.0
) -> None:
    """The mean of several series (None = a gap), raw and smoothed; nothing if there is no value at all."""
    values = scale * _mean_over_present(np.array(series, dtype=np.float64), axis=0)
    if np.isnan(values).all():
        return
    frames = np.arange(values.size)
    axes.plot(frames, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(frames, running_mean(values, _SMOOTH), color=colour, linestyle=dashes, linewidth=2.2, label=label)


def _draw_bands(axes: Axes, conditions: Sequence[str], named: bool) -> None:
    """Tints the background of runs of equal conditions, and writes their names just above the time axis."""
    if not conditions:
        return
    tints = dict(zip(dict.fromkeys(conditions), itertools.cycle(_TINTS), strict=False))
    changes = [i for i in range(1, len(conditions)) if conditions[i] != conditions[i - 1]]
    for first, end in itertools.pairwise([0, *changes, len(conditions)]):
        left, right = max(first - 0.5, 0), min(end - 0.5, len(conditions) - 1)
        axes.axvspan(left, right, color=tints[conditions[first]], linewidth=0, zorder=-1)
        if named:
            words = conditions[first].replace(" ", "\n")
            place = ((left + right) / 2, 0.012)
            axes.text(*place, words, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    if named:  # room below the lines for the names
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.12 * (high - low), high)


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


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean of `[n]` over up to `width` values; NaN values are left out, and stay NaN."""
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    means = _mean_over_present(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return np.where(np.isnan(values), np.nan, means)


def _mean_over_present(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over `axis` without NaN; NaN where nothing is left."""
    present = ~np.isnan(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)

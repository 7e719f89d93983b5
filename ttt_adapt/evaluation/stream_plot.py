"""The figure of one clip, frame by frame: loss and score of every arm, and what the frames are like.

Arms have the same marks as in tables: † sees the whole clip before it predicts, ‡ also chooses by the labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from ttt_adapt.evaluation.report import Run, marked
from ttt_adapt.tasks import find_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TINTS = ("#ffffff", "#fdeedd", "#e2e2f2", "#ebebeb", "#dcedf7", "#e6f3e3")
"""Backgrounds of bands, in the order in which their conditions first come."""
_SMOOTH = 9


def plot_stream(path: str | Path, runs: Sequence[Run], title: str = "", conditions: Sequence[str] = ()) -> None:
    """Draws the headline metric along one clip, one colour per arm; above it the label-free loss where arms have one.

    1200 x 900 pixels as PNG (750 without losses), and higher where many arms need a long legend.

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
    length = _checked_length(runs, conditions)
    headline = find_task(runs[0].task).metrics[0]
    arms = list(dict.fromkeys(run.arm for run in runs))
    columns, extra = legend_room(8.0, arms)
    adapted = any(loss is not None for run in runs for loss in run.losses)
    figure = new_figure(8.0, (6.0 if adapted else 5.0) + extra)
    if adapted:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
        upper.set_ylabel("label-free loss")
    else:
        upper, lower = None, figure.subplots()
    for position, arm in enumerate(arms):
        colour, dashes = COLOURS[position % len(COLOURS)], "--" if position >= len(COLOURS) else "-"
        chosen = [run for run in runs if run.arm == arm]
        label = marked(arm, chosen)
        if upper is not None:
            _draw_line(upper, [run.losses for run in chosen], colour, dashes, label)
        _draw_line(lower, [run.per_frame for run in chosen], colour, dashes, label, scale=headline.scale)
    lower.set_ylabel(axis_label(headline, " of the frame"))
    lower.set_xlabel(f"frame (thin: single ones, thick: mean over {_SMOOTH})")
    lower.set_xlim(0, max(length - 1, 1))
    for axes in filter(None, (upper, lower)):
        tidy_axes(axes)
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        _draw_bands(axes, conditions, named=axes is lower)
    figure.suptitle(title or runs[0].clip, fontsize=13, fontweight="bold")
    handles, names = lower.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    save_figure(figure, path)


def _checked_length(runs: Sequence[Run], conditions: Sequence[str]) -> int:
    """How many frames the runs have, all the same."""
    clips, lengths = {run.clip for run in runs}, {len(run.per_frame) for run in runs}
    if len(clips) != 1 or len(lengths) != 1:
        raise DataError(
            f"got {len(runs)} runs on clips {sorted(clips)} of {sorted(lengths)} frames; expected runs on one clip"
        )
    length = lengths.pop()
    if conditions and len(conditions) != length:
        raise DataError(f"got {len(conditions)} conditions for {length} frames; expected one for each frame")
    return length


def _draw_line(
    axes: Axes, series: Sequence[Sequence[float | None]], colour: str, dashes: str, label: str, scale: float = 1.0
) -> None:
    """The mean of several series (None = a gap), raw and smoothed; nothing if there is no value at all."""
    values = scale * mean_over_present(np.array(series, dtype=np.float64), axis=0)
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


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean of `[n]` over up to `width` values; NaN values are left out, and stay NaN."""
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    means = mean_over_present(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return np.where(np.isnan(values), np.nan, means)

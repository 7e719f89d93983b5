"""What all figures of an evaluation share: colours, size, style, and room for a legend.

Figures need matplotlib, and are drawn without a display and without pyplot's global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_adapt.errors import missing
from ttt_adapt.tasks import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: people with the common kinds of colour blindness can tell the colours apart. Grey is first,
# because the first arm is usually the fixed model.
COLOURS = ("#6b6b6b", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "eval") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure, and the folder for it; the suffix chooses the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def legend_room(width: float, names: Sequence[str]) -> tuple[int, float]:
    """How many columns a legend has in a figure of `width` inches, and the inches that rows beyond the second need."""
    inches = 0.75 + 0.09 * max(len(name) for name in names)  # with room for a mark
    columns = max(1, min(len(names), int(width // inches)))
    return columns, 0.21 * max(-(-len(names) // columns) - 2, 0)


def tidy_axes(axes: Axes) -> None:
    """Take the upper and the right line away, and put the grid behind what is drawn."""
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def axis_label(metric: Metric, where: str) -> str:
    """The label of an axis."""
    return f"{metric.title}{where}" + (f" ({metric.unit})" if metric.unit else "")


def mean_over_present(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over `axis` without NaN; NaN where nothing is left."""
    present = ~np.isnan(values)
    count = present.sum(axis=axis)
    total = np.where(present, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)

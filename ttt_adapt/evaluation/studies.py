"""The analyses of the paper, each as rows to run side by side, with a table and plots of its own.

| study | of the paper | what varies |
|---|---|---|
| memory | Table 4 | no memory, implicit, explicit, both |
| window | Figure 5 | frames in the window: 1, 2, 4, ..., all |
| smoothness | the shuffle experiment, section 5 | the order of the frames |
| iterations | gradient steps per frame | 1, 2, 4, 8 |
| mask-ratio | share of patches hidden | 0.25 to 0.9, at test time only: the branch stays as it was trained |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ttt_adapt.data import Clip
from ttt_adapt.errors import ConfigError, nearest
from ttt_adapt.evaluation.plots import plot_bars, plot_losses, plot_sweep
from ttt_adapt.evaluation.report import Report
from ttt_adapt.evaluation.rows import Row
from ttt_adapt.evaluation.tables import study_table

ITERATIONS = (1, 2, 4, 8)
MASK_RATIOS = (0.25, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True)
class Study:
    """A named comparison; the first row is the fixed model, to which the others are compared.

    Attributes:
        name: as on the command line.
        title: heading of its table.
        axis: what varies along the axis of its plot; "" for bars.
        log: whether that axis is logarithmic.
        rows: length of the longest clip -> rows, without checkpoints.
    """

    name: str
    title: str
    axis: str
    log: bool
    rows: Callable[[int], list[Row]]

    @property
    def arms(self) -> list[str]:
        """The arms of its rows."""
        return [row.arm for row in self.rows(1)]


FIXED = Row("fixed", "Fixed")


def _memory(_frames: int) -> list[Row]:
    labels = {"No memory": "no-memory", "Implicit only": "implicit", "Explicit only": "explicit", "Both": "online"}
    return [FIXED, *(Row(arm, label) for label, arm in labels.items())]


def _window(frames: int) -> list[Row]:
    sizes = [2**i for i in range(frames.bit_length()) if 2**i < frames]
    rows = [Row("online", f"Window {k}", changes={"window": k}, value=k) for k in sizes]
    rows.append(Row("online", "Window all", changes={"window": frames}, value=frames))
    return [FIXED, *rows, Row("online", "Window auto", changes={"window": "auto"})]


def _smoothness(_frames: int) -> list[Row]:
    return [FIXED, Row("online", "Online"), Row("online-shuffled", "Online, shuffled frames")]


def _iterations(_frames: int) -> list[Row]:
    return [FIXED, *(Row("online", f"{n} iterations", changes={"iterations": n}, value=n) for n in ITERATIONS)]


def _mask_ratio(_frames: int) -> list[Row]:
    return [FIXED, *(Row("online", f"Mask {r:g}", branch={"mask_ratio": r}, value=r) for r in MASK_RATIOS)]


STUDIES = {
    study.name: study
    for study in (
        Study("memory", "Memory: explicit, implicit, both", "", False, _memory),
        Study("window", "Window size", "frames in the window", True, _window),
        Study("smoothness", "Temporal smoothness: frames in order and shuffled", "", False, _smoothness),
        Study("iterations", "Gradient steps per frame", "gradient steps per frame", True, _iterations),
        Study("mask-ratio", "Mask ratio at test time", "share of patches hidden", False, _mask_ratio),
    )
}


def find_study(name: str) -> Study:
    """The study of that name.

    Raises:
        ConfigError: there is none; the message holds the nearest.
    """
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}; {nearest(name, STUDIES)}")
    return STUDIES[name]


def rows_of_study(
    study: Study, clips: Sequence[Clip], checkpoints: Sequence[Path], branch: Mapping[str, Any] | None = None
) -> list[Row]:
    """The rows of a study, ready to run.

    Args:
        study: which one.
        clips: what it will run on.
        checkpoints: one for all seeds, or one per seed.
        branch: of all rows, see `MAEBranch.using`.
    """
    longest = max(len(clip) for clip in clips)
    return [
        replace(row, checkpoints=tuple(checkpoints), branch={**(branch or {}), **row.branch})
        for row in study.rows(longest)
    ]


def write_study(report: Report, study: Study, rows: Sequence[Row], out: Path) -> None:
    """Write NAME.md, NAME.png and loss.png of a finished study into `out`."""
    reference = rows[0].label
    (out / f"{study.name}.md").write_text(study_table(report, study.title, reference), encoding="utf-8")
    if study.axis and reference in report.arms:
        values = {row.label: row.value for row in rows[1:]}
        plot_sweep(out / f"{study.name}.png", report, values, reference, study.axis, study.log)
    else:
        plot_bars(out / f"{study.name}.png", report)
    plot_losses(out / "loss.png", report)

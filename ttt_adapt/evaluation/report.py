"""What an evaluation found: one `Run` per arm, clip and seed, kept in a `Report`.

A report is saved after every run, so an interrupted evaluation goes on where it stopped (`Report.has`). Scores are
fractions in [0, 1] in the data and percent in the tables.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, StateError, missing, nearest
from .metrics import SegmentationScore, summarize

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of the JSON layout."""


@dataclass
class Run:
    """One arm on one clip with one seed.

    Attributes:
        arm: name of the arm.
        clip: name of the clip.
        seed: the seed it ran with.
        miou: dataset-level mIoU in [0, 1].
        miou_frames: mean over frames of the per-frame mIoU, in [0, 1].
        pixel_accuracy: share of labelled pixels that are right.
        per_class: IoU by class name; None for classes that the clip never shows.
        per_frame: mIoU of every frame; None where a frame is all void.
        losses: label-free loss at every frame; None where the arm did not adapt, or the loss was not finite.
        ms_per_frame: median time of a step, in milliseconds.
    """

    arm: str
    clip: str
    seed: int
    miou: float
    miou_frames: float
    pixel_accuracy: float
    per_class: dict[str, float | None]
    per_frame: list[float | None]
    losses: list[float | None]
    ms_per_frame: float

    @classmethod
    def from_score(
        cls,
        arm: str,
        clip: str,
        seed: int,
        score: SegmentationScore,
        losses: Sequence[float | None],
        ms: Sequence[float],
    ) -> Run:
        """A run from its collected score, the loss at every frame (None = none) and the milliseconds of every step.

        Raises:
            DataError: `losses` or `ms` has not one value per frame, or there is nothing to score.
        """
        result = score.result()
        for name, values in (("losses", losses), ("ms", ms)):
            if len(values) != result["frames"]:
                raise DataError(f"{name} has {len(values)} values for {result['frames']} frames; expected one a frame")
        return cls(
            arm=arm,
            clip=clip,
            seed=seed,
            miou=result["miou"],
            miou_frames=result["miou_frames"],
            pixel_accuracy=result["pixel_accuracy"],
            per_class=result["per_class"],
            per_frame=[_finite(value) for value in score.per_frame()],
            losses=[_finite(value) for value in losses],
            ms_per_frame=float(np.median(np.asarray(ms, dtype=np.float64))),
        )


@dataclass
class Report:
    """All runs of one evaluation.

    Attributes:
        config: the settings it ran with; anything JSON can hold.
        environment: where it ran; see `environment`.
        runs: in the order they were made.
    """

    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def has(self, arm: str, clip: str, seed: int) -> bool:
        """Whether this run was made already."""
        return any((run.arm, run.clip, run.seed) == (arm, clip, seed) for run in self.runs)

    def add(self, run: Run) -> None:
        """Adds a run.

        Raises:
            StateError: the same arm, clip and seed is there already.
        """
        if self.has(run.arm, run.clip, run.seed):
            raise StateError(f"arm {run.arm!r} on clip {run.clip!r} with seed {run.seed} is in the report already")
        self.runs.append(run)

    def select(self, arm: str | None = None, clip: str | None = None) -> list[Run]:
        """The runs of one arm, one clip, or both."""
        return [run for run in self.runs if arm in (None, run.arm) and clip in (None, run.clip)]

    @property
    def arms(self) -> list[str]:
        """Arm names in the order they first ran."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def clips(self) -> list[str]:
        """Clip names in the order they first ran."""
        return list(dict.fromkeys(run.clip for run in self.runs))

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        write_json(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing, or not such a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise DataError(f"{path} has format {data['format']}; this version reads format {FORMAT}")
            names = {entry.name for entry in fields(Run)}
            runs = [Run(**{key: value for key, value in run.items() if key in names}) for run in data["runs"]]
            return cls(config=data["config"], environment=data["environment"], runs=runs)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not an evaluation report: {error!r}") from error


def write_json(path: str | Path, report: Report) -> None:
    """Writes the report as JSON; the file is the old one or the new one, never half of one.

    Raises:
        DataError: `config` or `environment` holds something that JSON cannot.
    """
    path = Path(path)
    try:
        text = json.dumps({"format": FORMAT, **asdict(report)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the report cannot be written as JSON: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def markdown_table(report: Report, reference: str | None = None) -> str:
    """A Markdown table: one row per arm, for each clip dataset-level mIoU, mean over frames, and time.

    Cells are mean ± sample standard deviation over seeds, in percent; in brackets stands the change of the mean
    relative to `reference` (by default the first arm), in percent of it. A value is bold where it is the best
    beyond the spread: every arm ran at least two seeds, and its mean minus its deviation is above the mean plus
    deviation of every other arm.

    Raises:
        ConfigError: `reference` is no arm of the report.
        DataError: the report holds no runs.
    """
    header, rows, caption = _table(report, reference)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(f"**{text}**" if best else text for text, best in row) + " |" for row in rows]
    return "\n".join([*lines, "", caption]) + "\n"


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
    table = Table(caption=caption, caption_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(text, style="bold" if best else "") for text, best in row))
    return table


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on.

    `commit` is the commit of the checkout that the running ttt_adapt belongs to, and `dirty` whether tracked files
    were changed in it; both are None for an installed package.
    """
    packages = ("ttt-adapt", "torch", "numpy", "timm", "torchmetrics")
    folder = Path(__file__).resolve().parents[1]
    # Git answers for any repository around the folder, such as the one around a virtual environment.
    ours = _git(folder, "ls-files", "--error-unmatch", "errors.py") is not None
    commit = _git(folder, "rev-parse", "HEAD") if ours else None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "packages": {name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


Cell = tuple[str, bool]
"""A table cell: its text, and whether it is the best beyond the spread."""


def _table(report: Report, reference: str | None) -> tuple[list[str], list[list[Cell]], str]:
    """Header, rows and caption of the report's table."""
    if not report.runs:
        raise DataError("the report holds no runs; add at least one")
    reference = report.arms[0] if reference is None else reference
    if reference not in report.arms:
        raise ConfigError(f"reference arm {reference!r} is not in the report; {nearest(reference, report.arms)}")
    header, columns = ["arm"], [[(arm, False) for arm in report.arms]]
    for clip in report.clips:
        for title, name in (("mIoU", "miou"), ("frame mIoU", "miou_frames")):
            header.append(f"{clip}: {title} (%)")
            columns.append(_score_column(report, clip, name, reference))
        header.append(f"{clip}: ms/frame")
        columns.append([_time_cell(report.select(arm, clip)) for arm in report.arms])
    counts = sorted({len(report.select(arm, clip)) for arm in report.arms for clip in report.clips})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = (
        "mIoU over the whole clip; frame mIoU is the mean over frames; mean ± sample standard deviation over "
        f"{seeds} seed{'' if counts == [1] else 's'}; in brackets the change relative to {reference}."
    )
    return header, [list(row) for row in zip(*columns, strict=True)], caption


def _score_column(report: Report, clip: str, name: str, reference: str) -> list[Cell]:
    values = [[getattr(run, name) for run in report.select(arm, clip)] for arm in report.arms]
    stats = [summarize(scores) if scores else None for scores in values]
    base = stats[report.arms.index(reference)]
    cells: list[Cell] = []
    for position, (arm, stat) in enumerate(zip(report.arms, stats, strict=True)):
        if stat is None:
            cells.append(("n/a", False))
            continue
        mean, spread = stat
        text = f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
        if base is not None and base[0] > 0 and arm != reference:
            text += f" ({100 * (mean / base[0] - 1):+.1f}%)"
        cells.append((text, _is_best(stats, position)))
    return cells


def _is_best(stats: Sequence[tuple[float, float | None] | None], position: int) -> bool:
    """Whether mean - deviation at `position` is above mean + deviation everywhere else."""
    known = [(stat[0], stat[1]) for stat in stats if stat is not None and stat[1] is not None]
    if len(known) < len(stats) or len(stats) < 2:
        return False
    mean, spread = known[position]
    return all(mean - spread > other + width for place, (other, width) in enumerate(known) if place != position)


def _time_cell(runs: Sequence[Run]) -> Cell:
    return (f"{summarize([run.ms_per_frame for run in runs])[0]:.1f}" if runs else "n/a"), False


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers in `folder`; None where it has no answer."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

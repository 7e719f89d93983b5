"""The rows and clips of an evaluation, and whether they go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.arms import find_arm
from ttt_adapt.config import StreamConfig
from ttt_adapt.data import Clip, StreetClip, is_unnamed
from ttt_adapt.data.drift import NONE, Drift, Schedule
from ttt_adapt.errors import CheckpointError, ConfigError, missing
from ttt_adapt.evaluation.calibrated import digests
from ttt_adapt.evaluation.realtime import stride
from ttt_adapt.evaluation.runners import start
from ttt_adapt.files import file_digest
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks import find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, read_spec


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        arm: the arm's name; it is kept as `find_arm` spells it.
        label: the row's name in the report.
        checkpoints: the files it runs, one for all seeds or one per seed.
        changes: fields of the online configuration that differ in this row.
        branch: what the branch hides and scores in this row, see `MAEBranch.using`.
        value: the row's place on the axis of a study; None where it has none.

    Raises:
        ConfigError: an unknown arm.
    """

    arm: str
    label: str
    checkpoints: tuple[Path, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    branch: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arm", find_arm(self.arm).name)


def rows_of(
    arms: Sequence[str],
    checkpoints: Sequence[Path],
    baselines: Sequence[Path] = (),
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    branch: Mapping[str, Any] | None = None,
) -> list[Row]:
    """A row for every arm, under its title, after one for the model trained for the main task alone, if there is one.

    Args:
        arms: names.
        checkpoints: jointly trained, one for all seeds or one per seed.
        baselines: the same, trained for the main task alone.
        changes: arm -> fields of the configuration that differ for it alone.
        branch: of all rows, see `MAEBranch.using`.

    Raises:
        ConfigError: an unknown arm, or none; changes of an arm that is not among them.
    """
    if not arms:
        raise ConfigError("arms is empty; expected at least one arm")
    own = {find_arm(name).name: fields for name, fields in (changes or {}).items()}
    found = [find_arm(name) for name in arms]
    names = [arm.name for arm in found]
    for name in own:
        if name not in names:
            raise ConfigError(
                f"{name}.{next(iter(own[name]))} is to change, and {name} is none of the arms {', '.join(names)}"
            )
    rows = [Row(arm.name, arm.title, tuple(checkpoints), own.get(arm.name, {}), branch or {}) for arm in found]
    return [Row("fixed", "Main Task Only", tuple(baselines)), *rows] if baselines else rows


def unheeded(rows: Sequence[Row], config: StreamConfig, fields: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The fields of the common configuration that some arms replace by a value of their own.

    Args:
        rows: what runs.
        config: of the online arm.
        fields: names of the fields to look at.

    Returns:
        Field -> arm -> the arm's own value. Fields that every arm takes from `config`, or that a row changes for its
        arm, are not in it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in fields:
        for row in rows:
            arm = find_arm(row.arm)
            own = arm.settings() if arm.adapts and name not in row.changes else {}
            if own.get(name, getattr(config, name)) != getattr(config, name):
                found.setdefault(name, {})[arm.name] = own[name]
    return found


def clips_from(
    data: str,
    names: Sequence[str],
    size: tuple[int, int] | None,
    *,
    format: str = "auto",
    classes: Sequence[str] = (),
    default_classes: Sequence[str] = (),
    seed: int | None = None,
    frames: int | None = None,
    task: str = "segmentation",
    drifts: Sequence[Drift | Schedule] = (),
) -> list[Clip]:
    """The clips called `names` under the folder `data`; all of them without names.

    Args:
        data: a folder, or "street" for the rendered stream of the demo.
        names: which clips.
        size: (height, width) of the frames.
        format: see `ttt_adapt.data.open_clips`.
        classes: class names, where the data bring none.
        default_classes: those of the checkpoint, for folders of class ids that bring none either.
        seed: which street; 0 by default.
        frames: length of the street's stream; 240 by default.
        task: of the checkpoint.
        drifts: each clip comes once under each of them; without any, as it is.

    Raises:
        ConfigError: an option does not fit the data, or a schedule does not fit a clip.
        DataError: clips are missing or broken.
    """
    found = _open(data, names, size, format, classes, default_classes, seed, frames, task)
    if not drifts:
        return found
    drifted = find_task(task).drifted
    return [clip if drift == Drift(NONE) else drifted(clip, drift) for clip in found for drift in drifts]


def _open(
    data: str,
    names: Sequence[str],
    size: tuple[int, int] | None,
    format: str,
    classes: Sequence[str],
    default_classes: Sequence[str],
    seed: int | None,
    frames: int | None,
    task: str,
) -> list[Clip]:
    """The clips as they are; arguments as those of `clips_from`."""
    if data == "street" and not Path(data).exists():
        if names:
            raise ConfigError(f"'street' is one clip, got the clips {', '.join(names)}; choose a street by its seed")
        return [find_task(task).adopt(StreetClip(seed or 0, 240 if frames is None else frames, size))]
    for name, value in (("seed", seed), ("frames", frames)):
        if value is not None:
            raise ConfigError(
                f"{name} is {value}, an option of the rendered street, and the data are {data}: leave it out; "
                "the seeds of adaptation are called seeds"
            )
    return find_task(task).clips(data, names, size, list(classes) or _unnamed(data, default_classes), format)


def _unnamed(data: str, classes: Sequence[str]) -> list[str] | None:
    """`classes`, if `data` are folders of class ids without names."""
    return list(classes) if classes and is_unnamed(data) else None


def check(
    rows: Sequence[Row],
    clips: Sequence[Clip],
    config: StreamConfig,
    device: torch.device | str,
    real_time: Mapping[str, float] | None = None,
    metric_weights: Path | None = None,
) -> None:
    """Check before the first run that packages are installed and that checkpoints load and fit arms and classes.

    Arguments and errors as in `ttt_adapt.evaluation.session.evaluate`.
    """
    _check_arms(rows, config, real_time or {})
    for package, spelled in (("torchmetrics", "torchmetrics"), ("matplotlib", "matplotlib"), ("PIL", "pillow")):
        if importlib.util.find_spec(package) is None:
            raise missing(spelled, "eval")
    paths = list(dict.fromkeys(path for row in rows for path in row.checkpoints))
    _check_one_task(paths)
    for path in paths:
        checkpoint = load_checkpoint(path, device)
        checkpoint.task.score(weights=metric_weights)  # it raises what is wrong with the weights
        for clip in clips:
            _check_classes(checkpoint, clip, path)
        for row in rows:
            if path in row.checkpoints:
                _check_row(row, checkpoint, path, config)
    for clip in clips:
        find_task(read_spec(paths[0]).task).check_clip(clip)


def _check_arms(rows: Sequence[Row], config: StreamConfig, costs: Mapping[str, float]) -> None:
    """Raises ConfigError for two rows of one name, a bad cost, or a configuration that is not the online arm's."""
    if not config.carry_weights or config.window == 1:
        raise ConfigError(
            f"the configuration must be that of the online arm; it has carry_weights={config.carry_weights} and "
            f"window={config.window}; expected both memories. With less there are arms: no-memory, implicit, explicit"
        )
    for forwards in costs.values():
        stride(forwards)
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"two rows are called {label!r}; expected every arm once")


def _check_row(row: Row, checkpoint: Checkpoint, path: Path, config: StreamConfig) -> None:
    """Raises ConfigError where the row's arm, or what its branch hides, does not fit the checkpoint."""
    try:
        start(find_arm(row.arm), checkpoint, config, row.changes).close()
    except ConfigError as error:
        raise ConfigError(f"{row.label} on {path.name}: {error}") from error
    if row.branch and isinstance(checkpoint.branch, MAEBranch):
        with checkpoint.branch.using(**row.branch):
            pass  # it raises what is wrong


def check_seeds(seeds: Sequence[int], config: StreamConfig) -> None:
    """Raises ConfigError unless there are seeds, each once, and each one that adaptation can take."""
    if not seeds:
        raise ConfigError("seeds is empty; expected at least one")
    if twice := sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        raise ConfigError(
            f"seeds names {', '.join(map(str, twice))} more than once, and a seed runs once; expected different ones"
        )
    for seed in seeds:
        config.replace(seed=seed)  # its checks


def _check_one_task(paths: Sequence[Path]) -> None:
    """Raises CheckpointError if two files were trained for different tasks."""
    tasks = {read_spec(path).task: path for path in paths}
    if len(tasks) > 1:
        raise CheckpointError(f"one table is of one task: {', '.join(f'{p} is of {t}' for t, p in tasks.items())}")


def describe(row: Row) -> dict[str, Any]:
    """What a row is, for the record."""
    found: dict[str, Any] = {"arm": row.arm, "checkpoints": fingerprints(row.checkpoints)}
    if calibrations := digests(row.checkpoints):
        found["calibrations"] = calibrations
    if row.changes:
        found["changes"] = dict(row.changes)
    if row.branch:
        found["branch"] = dict(row.branch)
    return found


def fingerprints(files: Sequence[Path]) -> list[str]:
    """Name and hash of each file, so that a checkpoint that was trained again under the same name is noticed."""
    return [f"{file.name} sha256:{file_digest(file)[:16]}" for file in files]


def metric_files(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The files of networks in `folder` that the metrics of the rows' task know."""
    known = find_task(read_spec(rows[0].checkpoints[0]).task).weight_files
    return [folder / name for name in known if (folder / name).is_file()]


def _check_classes(checkpoint: Checkpoint, clip: Clip, path: Path) -> None:
    if tuple(checkpoint.spec.classes) != tuple(clip.classes):
        raise CheckpointError(
            f"{path} was trained on the classes {', '.join(checkpoint.spec.classes)}; "
            f"clip {clip.name} has {', '.join(clip.classes)}"
        )

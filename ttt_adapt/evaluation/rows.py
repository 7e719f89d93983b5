"""The rows, clips and costs that an evaluation is asked for, and whether they go together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ttt_adapt.arms import find_arm
from ttt_adapt.cli.options import parse_settings
from ttt_adapt.config import StreamConfig
from ttt_adapt.data import Clip, StreetClip, is_unnamed
from ttt_adapt.data.clips import file_digest
from ttt_adapt.errors import CheckpointError, ConfigError, missing
from ttt_adapt.evaluation.realtime import stride
from ttt_adapt.evaluation.runners import start
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks import find_task
from ttt_adapt.tasks.checkpoint import Checkpoint, load_checkpoint, read_spec


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        arm: the arm's name.
        label: the row's name in the report.
        checkpoints: the files it runs, one for all seeds or one per seed.
        changes: fields of the online configuration that differ in this row.
        branch: what the branch hides and scores in this row, see `MAEBranch.using`.
    """

    arm: str
    label: str
    checkpoints: tuple[Path, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    branch: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RealTime:
    """Score as if frames did not wait; see `ttt_adapt.evaluation.realtime`.

    Attributes:
        forwards: forward passes per frame by arm; those of other arms are measured.
    """

    forwards: Mapping[str, float] = field(default_factory=dict)


def contenders_of(
    arms: Sequence[str],
    checkpoints: Sequence[Path],
    baselines: Sequence[Path],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    branch: Mapping[str, Any] | None = None,
) -> list[Contender]:
    """A row for every arm, under its title, after one for the model trained for the main task alone, if there is one.

    Args:
        arms: names.
        checkpoints: jointly trained, one for all seeds or one per seed.
        baselines: the same, trained for the main task alone.
        changes: arm -> fields of the configuration that it has of its own.
        branch: of all rows, see `MAEBranch.using`.

    Raises:
        ConfigError: an unknown arm, or none; changes of an arm that is not among them.
    """
    if not arms:
        raise ConfigError("--arms is comma-separated; expected at least one arm")
    own = changes or {}
    for name in own:
        if name not in arms:
            raise ConfigError(f"--set {name}.{next(iter(own[name]))}: {name} is none of --arms {', '.join(arms)}")
    rows = [
        Contender(arm.name, arm.title, tuple(checkpoints), own.get(arm.name, {}), branch or {})
        for arm in map(find_arm, arms)
    ]
    return [Contender("fixed", "Main Task Only", tuple(baselines)), *rows] if baselines else rows


def real_time_of(wanted: bool, pairs: Sequence[str], arms: Sequence[str]) -> RealTime | None:
    """["online=4.1"] as the costs of real-time scoring.

    Raises:
        ConfigError: costs without real-time scoring, one that is no number, or of none of the arms.
    """
    if not wanted:
        if pairs:
            raise ConfigError("--forwards is what --real-time charges; give both or neither")
        return None
    costs = parse_settings(list(pairs))
    for arm, cost in costs.items():
        if arm not in arms:
            raise ConfigError(f"--forwards {arm}={cost}: {arm} is none of the arms {', '.join(arms)}")
        if not isinstance(cost, int | float) or isinstance(cost, bool):
            raise ConfigError(f"--forwards {arm}={cost}: expected a number of forward passes, such as {arm}=4")
    return RealTime(costs)


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
    """
    if data == "street" and not Path(data).exists():
        if names:
            raise ConfigError(f"'street' is one clip, got --clips {', '.join(names)}; choose a street with --seed")
        return [find_task(task).adopt(StreetClip(seed or 0, 240 if frames is None else frames, size))]
    for name, value in (("--seed", seed), ("--frames", frames)):
        if value is not None:
            raise ConfigError(f"{name} {value} is of the rendered street, and {data} is not it; adaptation has --seeds")
    return find_task(task).clips(data, names, size, list(classes) or _unnamed(data, default_classes), format)


def _unnamed(data: str, classes: Sequence[str]) -> list[str] | None:
    """`classes`, if `data` are folders of class ids without names."""
    return list(classes) if classes and is_unnamed(data) else None


def check(
    contenders: Sequence[Contender],
    clips: Sequence[Clip],
    config: StreamConfig,
    device: torch.device | str,
    real_time: RealTime | None,
    metric_weights: Path | None = None,
) -> None:
    """Fail before the first run, not hours later: packages are there, checkpoints load and suit arms and classes."""
    for contender in contenders:
        find_arm(contender.arm)
    if not config.carry_weights or config.window == 1:
        raise ConfigError(
            f"the configuration, that of the online arm, has carry_weights={config.carry_weights} and "
            f"window={config.window}; expected both memories. With less there are arms: no-memory, implicit, explicit"
        )
    for package, spelled in (("torchmetrics", "torchmetrics"), ("matplotlib", "matplotlib"), ("PIL", "pillow")):
        if importlib.util.find_spec(package) is None:
            raise missing(spelled, "eval")
    for arm, forwards in (real_time.forwards if real_time else {}).items():
        find_arm(arm)
        stride(forwards)
    for label in (labels := [contender.label for contender in contenders]):
        if labels.count(label) > 1:
            raise ConfigError(f"two rows are called {label!r}; expected every arm once")
    paths = list(dict.fromkeys(path for contender in contenders for path in contender.checkpoints))
    _check_one_task(paths)
    for path in paths:
        checkpoint = load_checkpoint(path, device)
        checkpoint.task.score(weights=metric_weights)  # its checks
        for clip in clips:
            _check_classes(checkpoint, clip, path)
        for contender in contenders:
            if path in contender.checkpoints:
                try:
                    start(find_arm(contender.arm), checkpoint, config, contender.changes).close()
                except ConfigError as error:
                    raise ConfigError(f"{contender.label} on {path.name}: {error}") from error
                if contender.branch and isinstance(checkpoint.branch, MAEBranch):
                    with checkpoint.branch.using(**contender.branch):
                        pass  # its checks
    for clip in clips:
        find_task(read_spec(paths[0]).task).check_clip(clip)


def check_seeds(seeds: Sequence[int], config: StreamConfig) -> None:
    """Raises ConfigError unless there are seeds, each once, and each one that adaptation can take."""
    if not seeds:
        raise ConfigError("--seeds is comma-separated; expected at least one seed")
    if twice := sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        raise ConfigError(
            f"--seeds names {', '.join(map(str, twice))} more than once, and a seed runs once; expected different ones"
        )
    for seed in seeds:
        config.replace(seed=seed)  # its checks


def _check_one_task(paths: Sequence[Path]) -> None:
    """Raises CheckpointError where two files were trained for different tasks."""
    tasks = {read_spec(path).task: path for path in paths}
    if len(tasks) > 1:
        raise CheckpointError(f"one table is of one task: {', '.join(f'{p} is of {t}' for t, p in tasks.items())}")


def describe(contender: Contender) -> dict[str, Any]:
    """What a contender is, for the record."""
    row: dict[str, Any] = {"arm": contender.arm, "checkpoints": fingerprints(contender.checkpoints)}
    if contender.changes:
        row["changes"] = dict(contender.changes)
    if contender.branch:
        row["branch"] = dict(contender.branch)
    return row


def fingerprints(files: Sequence[Path]) -> list[str]:
    """Name and content of files, so that a file that was trained anew is another one."""
    return [f"{file.name} sha256:{file_digest(file)[:16]}" for file in files]


def _check_classes(checkpoint: Checkpoint, clip: Clip, path: Path) -> None:
    if tuple(checkpoint.spec.classes) != tuple(clip.classes):
        raise CheckpointError(
            f"{path} was trained on the classes {', '.join(checkpoint.spec.classes)}; "
            f"clip {clip.name} has {', '.join(clip.classes)}"
        )

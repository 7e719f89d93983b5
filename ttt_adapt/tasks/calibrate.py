"""Calibrate a checkpoint: find stills in a folder or a video, and measure and choose on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.calibration.calibrate import DRIFTS, calibrate
from ttt_adapt.data import Clip, VideoClip, is_unnamed, open_clips, open_frames
from ttt_adapt.data.clip import Sample
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.files import check_place, refuse_existing
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.frames import Preprocess
from ttt_adapt.objectives.mae import MAEBranch
from ttt_adapt.tasks.base import Stills
from ttt_adapt.tasks.checkpoint import Checkpoint, check_is_checkpoint, read_calibration
from ttt_adapt.tasks.lookup import task_of
from ttt_adapt.tasks.spec import ModelSpec

STILLS = 40
"""Stills that a model is calibrated on, unless somebody asks for another number."""


@dataclass(frozen=True)
class SourceStills:
    """Frames to calibrate on.

    Attributes:
        frames: uint8 RGB [H, W, 3] each, as the camera gives them.
        labels: class ids [H, W] of each; None where there are none that the task can use.
        ignore: label id of void.
        of: how many frames they were taken from.
        unlabelled: why there are no labels; "" where there are.
    """

    frames: Sequence[np.ndarray]
    labels: Sequence[np.ndarray] | None = None
    ignore: int = 255
    of: int = 0
    unlabelled: str = ""


def open_stills(
    spec: ModelSpec,
    data: str | Path,
    *,
    count: int = STILLS,
    names: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    labels: bool | None = None,
) -> SourceStills:
    """Stills from anything that clips or videos are read from, evenly spaced over all of its frames.

    Args:
        spec: of the checkpoint, whose classes labels must have.
        data: a folder of labelled clips, a folder of pictures or videos, a video file, or "street" for rendered stills.
        count: how many stills at most.
        names: names of the clips to use; () for all.
        size: (H, W) that frames are resized to; None: as they are.
        labels: True: labels are needed; False: they are not used; None: they are used where there are some.

    Raises:
        ConfigError: labels are needed, and the task has none.
        DataError, VideoError: there are no frames, they cannot be read, or labels are needed and do not fit.
    """
    if count < 1:
        raise ConfigError(f"stills is {count}; expected at least 1, better {STILLS}")
    task = task_of(spec)
    if not task.labelled:
        if labels:
            raise ConfigError(f"labels are asked for, and {task.name} has none: leave them out")
        reason = f"{task.name} has no labels"
    elif labels is False:
        reason = "they are not asked for"
    elif labels is None and Path(data).is_file():
        reason = "a video has none"
    else:
        try:
            return _picked(_labelled(spec, str(data), names, size, count), count)
        except DataError as error:
            if labels:
                raise
            reason = str(error).partition(" (pictures without")[0]
    return _picked(_unlabelled(str(data), names, size, count), count, unlabelled=reason)


def calibration_target(model: Path, out: Path | None, overwrite: bool) -> Path:
    """The file that a calibration of the checkpoint `model` is written to.

    Args:
        model: the checkpoint.
        out: another file; None: `model` itself, which gets a calibration beside its weights.
        overwrite: whether another checkpoint, or the calibration that `model` has, may be replaced.

    Raises:
        ConfigError: the name is no checkpoint's, something would be replaced unasked, or nothing can be written there.
        CheckpointError: `model` cannot be read.
    """
    check_is_checkpoint(model)
    target = model if out is None else out
    if target.suffix != ".safetensors":
        raise ConfigError(f"the checkpoint to write is {target}; expected a file name ending in .safetensors")
    check_place(target)
    if target.exists() and model.exists() and target.samefile(model):
        found = None if overwrite else read_calibration(model)
        if found is not None:
            raise ConfigError(
                f"{model} is calibrated already, on {found.stills} stills: set `overwrite` to replace this "
                "calibration, or name another file with `out`"
            )
    else:
        refuse_existing(target, overwrite)
    return target


def training_stills(opened: Stills, labelled: bool, count: int = STILLS) -> SourceStills:
    """Evenly chosen frames of opened training data, as they are on disk.

    Args:
        opened: the training data.
        labelled: whether their labels are class ids.
        count: how many at most.
    """
    return _picked(opened.samples, count, "" if labelled else "the task has no labels")


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    stills: SourceStills,
    *,
    choose: bool = True,
    steps: bool = False,
    drifts: Sequence[str] = DRIFTS,
    seed: int = 0,
) -> Calibration:
    """Calibrate the model of a checkpoint; the result becomes `checkpoint.calibration`, and its branch's.

    Drifts happen to the frames as the camera gives them, before the task turns them into what the model is shown.

    Args:
        checkpoint: the trained model.
        stills: what to calibrate on.
        choose: choose the rule; False: take the default.
        steps: choose too how gradient steps are taken. It needs a checkpoint with an MAE branch.
        drifts: what to choose on, as `ttt_adapt.data.drift.parse_drift` reads it.
        seed: of drifts and masks.

    Raises:
        ConfigError, FrameError: as for `ttt_adapt.calibrate`; nothing has changed.
    """
    branch = checkpoint.branch if isinstance(checkpoint.branch, MAEBranch) else None
    if steps and branch is None:
        raise ConfigError(
            "steps chooses how gradient steps of the reconstruction are taken, and this checkpoint has no MAE branch: "
            "leave it out, or train the model with one (ttt-adapt train, recipe 'joint')"
        )
    checkpoint.calibration = calibrate(
        checkpoint.model,
        stills.frames,
        stills.labels,
        branch=branch,
        preprocess=_preprocess(checkpoint),
        choose=choose,
        steps=steps,
        drifts=drifts,
        ignore=stills.ignore,
        distribution=checkpoint.task.distribution,
        seed=seed,
    )
    return checkpoint.calibration


def _preprocess(checkpoint: Checkpoint) -> Preprocess:
    """A camera's frame -> what the model takes."""
    task, normalize = checkpoint.task, checkpoint.spec.preprocess(next(checkpoint.model.parameters()).device)
    return lambda frame: normalize(task.see(frame))


# ---- where stills come from


def _labelled(
    spec: ModelSpec, data: str, names: Sequence[str], size: tuple[int, int] | None, count: int
) -> Sequence[Clip] | Sequence[Sample]:
    """Clips (or rendered samples) with labels of the checkpoint's classes.

    Raises:
        DataError: there are none.
    """
    samples: Sequence[Clip] | Sequence[Sample]
    if _is_street(data):
        from ttt_adapt.data.street.scene import CLASSES

        samples, classes = _street(names, size, count), tuple(CLASSES)
    else:
        known = list(spec.classes) if is_unnamed(data) else None
        samples = clips = open_clips(data, list(names) or None, size, classes=known)
        classes = clips[0].classes
    if classes != tuple(spec.classes):
        raise DataError(
            f"the labels of {data} are of the classes {', '.join(classes)}, and the checkpoint was trained on "
            f"{', '.join(spec.classes)}"
        )
    return samples


def _unlabelled(
    data: str, names: Sequence[str], size: tuple[int, int] | None, count: int
) -> Sequence[Clip] | Sequence[Sample]:
    """Pictures and videos."""
    return _street(names, size, count) if _is_street(data) else open_frames(data, list(names) or None, size)


def _is_street(data: str) -> bool:
    return data == "street" and not Path(data).exists()


def _street(names: Sequence[str], size: tuple[int, int] | None, count: int) -> list[Sample]:
    from ttt_adapt.data.street.scene import street_stills

    if names:
        raise ConfigError(f"'street' has no clips, got the names {', '.join(names)}: leave them out")
    return list(street_stills(count, size or (128, 192)))


def _picked(samples: Sequence[Clip] | Sequence[Sample], count: int, unlabelled: str = "") -> SourceStills:
    """Up to `count` of all frames, evenly spaced."""
    pairs: list[Sample]
    if len(samples) and isinstance(samples[0], Clip):
        clips: Any = samples
        pairs, total, ignore = _of_clips(clips, count), sum(map(len, clips)), clips[0].ignore
    else:
        total, ignore = len(samples), 255
        pairs = [samples[i] for i in spread(total, count)]  # type: ignore[misc]
    labels = None if unlabelled else [label for _, label in pairs]
    return SourceStills([frame for frame, _ in pairs], labels, ignore, total, unlabelled)


def _of_clips(clips: Sequence[Clip], count: int) -> list[Sample]:
    """Frames that are evenly spaced over all clips, one after the other."""
    wanted, first = spread(sum(map(len, clips)), count), 0
    found: list[Sample] = []
    for clip in clips:
        found += _read(clip, [place - first for place in wanted if first <= place < first + len(clip)])
        first += len(clip)
    return found


def _read(clip: Clip, places: Sequence[int]) -> Iterable[Sample]:
    """Samples by index; a video is decoded once, and no frame of it is kept beside them."""
    if not isinstance(clip, VideoClip) or not places:
        return [clip[place] for place in places]
    wanted = set(places)
    return [sample for place, sample in enumerate(islice(clip, max(places) + 1)) if place in wanted]


def spread(total: int, count: int) -> list[int]:
    """Up to `count` evenly spaced indices below `total`, half a gap from both ends: (9, 3) -> [1, 4, 7]."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]

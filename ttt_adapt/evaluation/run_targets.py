"""Where `ttt-adapt run` writes: what is refused before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.run_state import RunStates
from ttt_adapt.files import PICTURE_SUFFIXES, VIDEO_SUFFIXES, abandoned_parts, check_place, refuse_existing
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.video import check_format
from ttt_adapt.video.film_parts import missing_part, part_path
from ttt_adapt.video.label_video import SUFFIX as LABEL_VIDEO

ABOUT = "run.json"
MAKER = "ttt-adapt run"
_SUFFIXES = {"labels_out": ".png", "raw_out": ".npz"}
"""Of the files of a frame."""
_FILES = VIDEO_SUFFIXES | PICTURE_SUFFIXES | {".npz", ".npy", ".safetensors", ".json", ".csv", ".txt", ".zip", ".h5"}
"""Endings of files; whoever gives a folder such a name means a file."""


@dataclass(frozen=True)
class Targets:
    """Where a run writes; None for what is not wanted.

    Attributes:
        out: the film.
        labels_out: folder for a label map of every frame, or a video of labels, `.mkv`.
        raw_out: folder for the model's output for every frame.
        overwrite: whether what is there may be replaced.
    """

    out: Path | None
    labels_out: Path | None = None
    raw_out: Path | None = None
    overwrite: bool = False

    @property
    def label_video(self) -> Path | None:
        """The video of labels, if one is wanted."""
        return self.labels_out if self.labels_out is not None and _is_label_video(self.labels_out) else None

    @property
    def films(self) -> dict[str, Path]:
        """The films that are wanted, by the name of their argument."""
        return {name: path for name, path in self._named.items() if name == "out" or path == self.label_video}

    @property
    def folders(self) -> dict[str, Path]:
        """The folders that are wanted, by the name of their argument."""
        return {name: path for name, path in self._named.items() if name not in self.films}

    @property
    def _named(self) -> dict[str, Path]:
        wanted = {"out": self.out, "labels_out": self.labels_out, "raw_out": self.raw_out}
        return {name: path for name, path in wanted.items() if path is not None}

    @property
    def kinds(self) -> dict[str, str]:
        """What is wanted, by the name of its argument: a film or a folder."""
        return {name: "film" if name in self.films else "folder" for name in self._named}

    def check(self, inputs: Sequence[Path], fps: float | None, states: RunStates) -> None:
        """Refuse targets that are inputs, exist already, or cannot be what they are to be.

        Args:
            inputs: what is read.
            fps: frame rate of the films; None: the video's own.
            states: of the run; one that goes on finds its own files.

        Raises:
            ConfigError: one of them is such.
            VideoError: the film is a folder.
        """
        if not self._named:
            raise ConfigError("nothing is to be written: give `out`, `labels_out` or `raw_out`")
        inputs = [*inputs, *([states.path] if states.path is not None else [])]
        for name, path in self._named.items():
            if any(read.exists() and path.exists() and path.samefile(read) for read in inputs):
                raise ConfigError(f"{name} is {path}, which is an input and would be lost; choose another name")
            for other, same in self._named.items():
                if other != name and os.path.realpath(path) == os.path.realpath(same):
                    raise ConfigError(f"{name} is {path}, and so is `{other}`: choose a name for each")
        for name, path in self.films.items():
            if name == "out":
                check_format(path, fps, name)
            check_place(path, name)
            before = states.earlier.films.get(name) if states.earlier is not None else None
            if before is None or not before.joined:
                refuse_existing(path, states.may_replace, name)
            if states.earlier is None and states.kept:
                refuse_existing(part_path(path, 0), self.overwrite, name)
        for name, folder in self.folders.items():
            self._check_folder(name, folder, self.overwrite or states.earlier is not None)

    def _check_folder(self, name: str, folder: Path, overwrite: bool) -> None:
        if folder.suffix.lower() in _FILES and not folder.exists():
            film = f", or a file ending in {LABEL_VIDEO} for a video of labels" if name == "labels_out" else ""
            raise ConfigError(f"{name} is {folder}, the name of a file; expected a folder{film}")
        check_place(folder, name, folder=True)
        refuse_existing(folder, overwrite, name)
        if folder.is_dir() and {*folder.iterdir()} - {*abandoned_parts(folder)} and not _is_ours(folder):
            raise ConfigError(
                f"{name} is {folder}, which holds what no run has written, and nothing of that is replaced: choose "
                "another folder"
            )

    def check_task(self, checkpoint: Checkpoint) -> None:
        """Refuse label maps of a task without classes.

        Raises:
            ConfigError: it has none.
        """
        if self.labels_out is not None and not checkpoint.task.labelled:
            raise ConfigError(
                f"labels_out is {self.labels_out}, and {checkpoint.task.name} has no classes: leave it out; `out` has "
                "the pictures, and `raw_out` what the model returns"
            )


def check_whole(targets: Targets, states: RunStates, names: Sequence[str]) -> None:
    """Refuse to go on where something that an earlier run wrote is gone.

    Args:
        targets: where it was written.
        states: with the state that the run goes on from.
        names: of the frames before the state.

    Raises:
        ConfigError: a file of one of these frames, or a part of a film, is not there as it was.
    """
    assert states.earlier is not None
    gone = [
        missing_part(path, states.earlier.films[name].sizes, states.earlier.films[name].joined)
        for name, path in targets.films.items()
    ]
    for name, folder in targets.folders.items():
        suffix = _SUFFIXES[name]
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        gone += [folder / f"{each}{suffix}" for each in names if f"{each}{suffix}" not in there][:1]
    if lost := [path for path in gone if path is not None]:
        raise ConfigError(
            f"{lost[0]} is not there as it was at the state in {states.path}, so nothing can go on behind it: put it "
            "back, or leave resume out and set `overwrite` to begin anew"
        )


def _is_label_video(path: Path) -> bool:
    return path.suffix.lower() == LABEL_VIDEO


def _is_ours(folder: Path) -> bool:
    """Whether a run has written the folder."""
    try:
        return bool(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["made_by"] == MAKER)
    except (OSError, ValueError, KeyError, TypeError):
        return False

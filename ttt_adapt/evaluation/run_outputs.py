"""What `ttt-adapt run` writes of every frame: a film, label maps, and the model's raw outputs.

Label maps and raw outputs are one file for each frame, in a folder of their own. The file `run.json` in it says what
they are, and whether the run came to its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from ttt_adapt.errors import ConfigError
from ttt_adapt.files import atomic_write, files_in, output_folder, refuse_existing
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.video import VideoWriter, check_format
from ttt_adapt.view.label_map import write_label_map
from ttt_adapt.view.terminal import counted, notice

ABOUT = "run.json"
MAKER = "ttt-adapt run"


@dataclass(frozen=True)
class Targets:
    """Where a run writes; None for what is not wanted.

    Attributes:
        out: the film.
        labels_out: folder for a label map of every frame.
        raw_out: folder for the model's output for every frame.
        overwrite: whether what is there may be replaced.
    """

    out: Path | None
    labels_out: Path | None = None
    raw_out: Path | None = None
    overwrite: bool = False

    @property
    def folders(self) -> dict[str, Path]:
        """The folders that are wanted, by the name of their argument."""
        wanted = {"labels_out": self.labels_out, "raw_out": self.raw_out}
        return {name: folder for name, folder in wanted.items() if folder is not None}

    def check(self, inputs: Sequence[Path], fps: float | None) -> None:
        """Refuse targets that are inputs, exist already, or cannot be what they are to be.

        Raises:
            ConfigError: one of them is such.
            VideoError: the film is a folder.
        """
        if self.out is None and not self.folders:
            raise ConfigError("nothing is to be written: give `out`, `labels_out` or `raw_out`")
        if self.out is not None:
            for read in inputs:
                if read.exists() and self.out.exists() and self.out.samefile(read):
                    raise ConfigError(f"out is {self.out}, which is an input and would be lost; choose another file")
            check_format(self.out, fps)
            refuse_existing(self.out, self.overwrite)
        if len({os.path.realpath(folder) for folder in self.folders.values()}) < len(self.folders):
            raise ConfigError(f"labels_out is {self.labels_out}, and so is `raw_out`: choose a folder for each")
        for name, folder in self.folders.items():
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"{name} is {folder}, a file; expected a folder")
            refuse_existing(folder, self.overwrite, name)
            if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
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


class Outputs:
    """Writes the frames of a run, for use in a `with` block; nothing is there before the first frame.

    When an exception ends the block, what was written stays, and the user is told how much that is.

    Args:
        targets: where to write; checked.
        checkpoint: the model.
        film: opens the film, if one is wanted.
        about: of the run, for `run.json`.
        names: of the frames; None: their numbers.
        total: number of frames; None where that is unknown.
    """

    def __init__(
        self,
        targets: Targets,
        checkpoint: Checkpoint,
        film: Callable[[], VideoWriter] | None,
        about: dict[str, Any],
        names: Sequence[str] | None,
        total: int | None,
    ) -> None:
        self.count, self._begun = 0, False
        self._targets, self._checkpoint, self._open_film = targets, checkpoint, film
        self._about, self._names, self._total = about, names, total
        self._stack = ExitStack()
        self._film: VideoWriter | None = None

    def write(self, output: Tensor, prediction: np.ndarray, picture: np.ndarray | None) -> None:
        """Write one frame.

        Args:
            output: what the model returned, [1, C, H, W].
            prediction: of the task.
            picture: of the film, uint8 RGB [H, W, 3]; None where no film is wanted.

        Raises:
            VideoError, OSError: a file cannot be written.
        """
        name = self._names[self.count] if self._names and self.count < len(self._names) else f"{self.count:06d}"
        if self._targets.labels_out is not None:
            with atomic_write(self._targets.labels_out / f"{name}.png") as part:
                write_label_map(part, prediction, self._about["palette"])
        if self._targets.raw_out is not None:
            with atomic_write(self._targets.raw_out / f"{name}.npz") as part, part.open("wb") as file:
                np.savez(file, output=output[0].detach().float().cpu().numpy())
        if self._film is not None and picture is not None:
            self._film.write(picture)
        self.count += 1

    def begin(self, output: Tensor) -> None:
        """Make the folders and the film, when the first output is there; later calls do nothing.

        Raises:
            ConfigError: a folder cannot be made.
            VideoError: the film cannot be written.
        """
        if self._begun:
            return
        self._begun = True
        if self._targets.out is not None and self._open_film is not None:
            output_folder(self._targets.out.parent)
            self._film = self._stack.enter_context(self._open_film())
        for folder in self._targets.folders.values():
            output_folder(folder)
            for file in files_in(folder, {".png", ".npz"}):  # of the run that this one replaces
                file.unlink()
        self._describe(complete=False)
        if self._targets.raw_out is not None:
            megabytes = output[0].numel() * 4 / 1e6
            every = "" if self._total is None else f", {megabytes * self._total / 1e3:.3g} GB in all"
            notice(f"raw outputs take {megabytes:.3g} MB a frame{every}")

    def _describe(self, complete: bool) -> None:
        """Write what the files of each folder are."""
        contents = {
            "labels_out": "label maps: a PNG of class ids for each frame, of the frame's size",
            "raw_out": f"raw outputs: {self._checkpoint.task.outputs}, float32 [C, H, W], as 'output' of an npz file",
        }
        for name, folder in self._targets.folders.items():
            about = {"made_by": MAKER, "contents": contents[name], **self._about, "complete": complete}
            if self.count:
                about["frames"] = self.count
            with atomic_write(folder / ABOUT) as part:
                part.write_text(json.dumps(about, indent=1), encoding="utf-8")

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if self.count:
            self._describe(complete=error is None)
        if error is not None:
            kept = [self._film.path] if self._film is not None and self._film.finished else []
            kept += self._targets.folders.values() if self.count else []
            many = counted(self.count, "frame") + (f" of {self._total}" if self._total is not None else "")
            for path in kept:
                notice(f"kept in {path}: {many}")


def _is_ours(folder: Path) -> bool:
    """Whether a run has written the folder."""
    try:
        return bool(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["made_by"] == MAKER)
    except (OSError, ValueError, KeyError, TypeError):
        return False

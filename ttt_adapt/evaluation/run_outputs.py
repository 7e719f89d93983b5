"""What `ttt-adapt run` writes of every frame: a film, label maps, and the model's raw outputs.

Label maps and raw outputs are one file for each frame, in a folder of their own. The file `run.json` in it says what
they are, and whether the run came to its end. Label maps may be one video instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from ttt_adapt.errors import TTTAdaptError, warn
from ttt_adapt.evaluation.run_state import FilmState, RunStates
from ttt_adapt.evaluation.run_targets import ABOUT, MAKER, Targets, check_whole
from ttt_adapt.files import abandoned_parts, atomic_write, files_in, output_folder
from ttt_adapt.tasks.checkpoint import Checkpoint
from ttt_adapt.video import LabelVideoWriter, VideoWriter
from ttt_adapt.video.film import uninterrupted
from ttt_adapt.video.film_file import FilmFile
from ttt_adapt.view.label_map import write_label_map
from ttt_adapt.view.terminal import counted, notice


class Outputs:
    """Writes the frames of a run, for use in a `with` block; nothing is there before the first frame.

    A frame is written to all folders or to none, and Ctrl-C waits for it. Where writing to the film `out` fails, a
    video of labels has this frame already, one more than the others. When an exception ends the block, what was written
    stays, and the user is told how much that is.

    Args:
        targets: where to write; checked.
        checkpoint: the model.
        about: of the run, for `run.json` and the video of labels.
        states: of the run; where it goes on from one, so do the outputs.
    """

    def __init__(self, targets: Targets, checkpoint: Checkpoint, about: dict[str, Any], states: RunStates) -> None:
        self.count = states.frames
        self._targets, self._checkpoint, self._about, self._states = targets, checkpoint, about, states
        self._rate: float | None = None
        self._names: Sequence[str] | None = None
        self._total: int | None = None
        self._begun = self._finished = False
        self._made: list[Path] = []
        self._films: dict[str, FilmFile] = {}

    def expect(self, rate: float | None, names: Sequence[str] | None, total: int | None) -> None:
        """Say what comes.

        Args:
            rate: frames per second; None where that is unknown.
            names: of the frames; None: their numbers.
            total: number of frames; None where that is unknown.
        """
        self._rate, self._names, self._total = rate, names, total
        if self.count:
            check_whole(self._targets, self._states, [f"{self._name(index)}" for index in range(self.count)])

    def begin(self, output: Tensor) -> None:
        """Make the folders, when the first output is there, and say how much raw outputs take; later do nothing.

        Raises:
            ConfigError: a folder cannot be made.
            VideoError: a film cannot be written.
        """
        if self._begun:
            return
        self._begun = True
        with uninterrupted():
            self._states.begin()
            if self._states.earlier is not None:
                self._remove_abandoned()
            for name, path in {**self._targets.films, **self._targets.folders}.items():
                is_folder = name in self._targets.folders
                made = path if is_folder else path.parent
                if not made.exists():
                    self._made.append(made)
                output_folder(path, name, folder=is_folder)
            if self.count:
                self._clear()
            self._begin_films()
        if self._targets.raw_out is not None:
            megabytes = output[0].numel() * 4 / 1e6
            every = "" if self._total is None else f", {megabytes * self._total / 1e3:.3g} GB in all"
            notice(f"raw outputs take {megabytes:.3g} MB a frame{every}")

    def write(self, output: Tensor, prediction: np.ndarray, picture: np.ndarray | None) -> None:
        """Write one frame.

        Args:
            output: what the model returned, [1, C, H, W].
            prediction: of the task.
            picture: of the film, uint8 RGB [H, W, 3]; None where no film is wanted.

        Raises:
            VideoError, OSError: a file cannot be written. Then the folders hold nothing of this frame.
        """
        with uninterrupted():
            if not self.count:
                self._clear()
            files: list[Path] = []
            try:
                self._write_files(files, output, prediction)
                if "labels_out" in self._films:
                    self._films["labels_out"].write(prediction)
                if "out" in self._films and picture is not None:
                    self._films["out"].write(picture)
            except BaseException:
                for file in files:
                    file.unlink(missing_ok=True)
                raise
            self.count += 1

    def _write_files(self, files: list[Path], output: Tensor, prediction: np.ndarray) -> None:
        """Write the files of one frame, and add them to `files`."""
        name = self._name(self.count)
        folders = self._targets.folders
        if "labels_out" in folders:
            files.append(folders["labels_out"] / f"{name}.png")
            with atomic_write(files[-1]) as part:
                write_label_map(part, prediction, self._about["palette"])
        if "raw_out" in folders:
            files.append(folders["raw_out"] / f"{name}.npz")
            with atomic_write(files[-1]) as part, part.open("wb") as file:
                np.savez(file, output=output[0].detach().float().cpu().numpy())

    def _name(self, index: int) -> str:
        """The name of a frame, without a suffix."""
        return self._names[index] if self._names and index < len(self._names) else f"{index:06d}"

    def state(self) -> dict[str, Any]:
        """Complete the parts of the films, and say what `RunState` has of them.

        Raises:
            VideoError: a part cannot be completed.
        """
        return {"films": {name: FilmState(film.cut()) for name, film in self._films.items()}, "rate": self._rate}

    def finish(self) -> None:
        """Complete everything: all frames are there.

        Raises:
            VideoError: a film has no frame, or cannot be completed.
        """
        with uninterrupted():
            if not self._begun and not self._states.is_joined:  # no frame came behind the state
                self._begin_films()
            self._close_films()
            self._finished = True
            self._describe()

    def _remove_abandoned(self) -> None:
        """Remove what a process that was killed in the middle of a file has left."""
        for path in (*self._targets.films.values(), self._states.path):
            for part in abandoned_parts(path.parent, path.name) if path is not None else ():
                part.unlink(missing_ok=True)
        for folder in self._targets.folders.values():
            for part in abandoned_parts(folder) if folder.is_dir() else ():
                part.unlink(missing_ok=True)

    def _begin_films(self) -> None:
        earlier = self._states.earlier
        for name, path in self._targets.films.items():
            self._films[name] = film = self._film(name, path)
            if self._states.kept:
                before = FilmState([]) if earlier is None or not self.count else earlier.films[name]
                film.go_on_in_parts(before.sizes, self.count, before.joined)

    def _close_films(self) -> None:
        """Complete the films; where the run keeps its state, it knows at any time which files they are in."""
        if self._states.kept and self._films:
            self._states.change(may_replace=True)  # from now on, a file that is there may be the new one
        for film in self._films.values():
            film.close()
        if self._states.kept and self._films:
            sizes = {name: [film.path.stat().st_size] for name, film in self._films.items()}
            self._states.change(films={name: FilmState(each, joined=True) for name, each in sizes.items()})
            for film in self._films.values():
                film.remove_parts()

    def _film(self, name: str, path: Path) -> FilmFile:
        if name == "out":
            return VideoWriter(path, self._rate)
        contents = "label maps: the grey of each pixel is its class id"
        about = {"made_by": MAKER, "contents": contents, **self._about}
        return LabelVideoWriter(path, self._rate, len(self._checkpoint.spec.classes), about)

    def _clear(self) -> None:
        """Remove files of the run that this one replaces, or what is newer than the state; say that a run goes on."""
        kept = {self._name(index) for index in range(self.count)}
        for folder in self._targets.folders.values():
            names = _names_in(folder / ABOUT)
            for file in files_in(folder, {".png", ".npz"}):
                is_frame = file.stem.isdigit() if names is None else file.stem in names
                if is_frame and file.stem not in kept:  # what somebody else put there stays
                    file.unlink()
        self._describe()

    def _describe(self) -> None:
        """Write what the files of each folder are."""
        contents = {
            "labels_out": "label maps: a PNG of class ids for each frame, of the frame's size",
            "raw_out": f"raw outputs: {self._checkpoint.task.outputs}, float32 [C, H, W], as 'output' of an npz file",
        }
        for name, folder in self._targets.folders.items():
            about = {"made_by": MAKER, "contents": contents[name], **self._about, "complete": self._finished}
            about["names"] = None if self._names is None else list(self._names)
            if self.count:
                about["frames"] = self.count
            with atomic_write(folder / ABOUT) as part:
                part.write_text(json.dumps(about, indent=1), encoding="utf-8")

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (self._states.earlier is not None and not self._begun):  # nothing was touched
            return
        with uninterrupted():
            if self._states.kept:
                self._end_films()
            for film in () if self._states.kept else self._films.values():
                film.__exit__(kind, error, trace)
            if self.count:
                with suppress(OSError):  # such as a full disk, which is what ended the run
                    self._describe()
                self._tell()
            for folder in () if self.count else reversed(self._made):
                with suppress(OSError):  # it holds something of somebody else
                    folder.rmdir()

    def _end_films(self) -> None:
        """Join the films of a run that was stopped, where its state is of this moment; otherwise their parts stay."""
        free = not any(film.path.exists() for film in self._films.values())
        try:
            if self._films and free and self._states.saved == self.count > 0:
                self._close_films()
            for film in self._films.values():
                film.cut()
        except TTTAdaptError as error:  # must not hide the exception that ended the run
            warn(str(error))

    def _tell(self) -> None:
        """Say how many frames are kept, and where, and how the run goes on."""
        if self._states.saved is not None:
            notice(
                f"the state of frame {self._states.saved} is in {self._states.path}: the same command with --resume "
                "goes on"
            )
        kept = [(film.path, film.count) for film in self._films.values() if film.finished]
        kept += [(folder, self.count) for folder in self._targets.folders.values()]
        for path, number in kept:
            notice(f"kept in {path}: {counted(number, 'frame')}{'' if self._total is None else f' of {self._total}'}")


def _names_in(about: Path) -> set[str] | None:
    """Names of the frames that a run wrote, by its description; None: they were numbers, or nothing is there."""
    try:
        names = json.loads(about.read_text(encoding="utf-8")).get("names")
    except (OSError, ValueError, AttributeError):
        return None
    return set(map(str, names)) if isinstance(names, list) else None

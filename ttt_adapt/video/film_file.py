"""A file that a film grows in: what is on disk while it is written, and when something ends it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ttt_adapt.errors import ConfigError, StateError, VideoError, warn
from ttt_adapt.video.film import CONTAINERS, Encoding, Film, join_films, uninterrupted
from ttt_adapt.video.film_parts import go_on_in_parts, part_path, remove_parts
from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import VideoFrame
    from typing_extensions import Self

DEFAULT_FPS = 25


class FilmFile:
    """Base class of what writes films, for use in a `with` block.

    The film is `NAME.partial.SUFFIX` beside the target while it is written (`NAME.partial-2.SUFFIX` where there is one
    already), and takes the target's name when it is complete. It can be played at any time: a process that is killed
    leaves it, up to the last few frames. When an exception or Ctrl-C ends the block, the frames so far get the target's
    name, or keep the partial one where a file of the target's name exists: a failed run destroys nothing.

    Args:
        path: the target.
        fps: frames per second; None means 25.

    Attributes:
        path: where the file is, or will be.
        encoding: of its pictures.
        count: number of frames written.
        finished: whether the file at `path` is complete, with all frames.
    """

    encoding: Encoding

    def __init__(self, path: str | os.PathLike[str], fps: float | Fraction | None) -> None:
        self.path = Path(path)
        self.count, self.finished = 0, False
        self._rate = _exact_rate(DEFAULT_FPS if fps is None else fps)
        self._files: list[Path] = []  # the film so far
        self._in_parts = False
        self._film: Film | None = None
        self._closed = False

    def _image(self, frame: np.ndarray) -> VideoFrame:
        """The frame as the encoder takes it; raises where it is none."""
        raise NotImplementedError

    def _check_target(self) -> None:
        check_format(self.path)
        _check_folder(self.path.parent)

    def write(self, frame: np.ndarray) -> None:
        """Append one frame.

        Raises:
            FrameError, FrameTypeError: it is no frame of this film.
            VideoError: it cannot be encoded or written, such as on a full disk.
            StateError: the writer is closed.
        """
        if self._closed:
            raise StateError(
                f"The writer of {self.path} is closed. Make another {type(self).__name__} to write another video."
            )
        with uninterrupted():  # an encoded frame that is not written would leave a gap in the video
            image = self._image(frame)
            try:
                if self._film is None:
                    self._files.append(self._new_file())
                    self._film = Film(self._files[-1], self._rate, (image.height, image.width), self.encoding)
                self._film.write(image)
            except (import_av().FFmpegError, OSError) as error:
                raise VideoError(f"Frame {self.count} of {self.path} cannot be written: {error}") from error
            self.count += 1

    def go_on_in_parts(self, sizes: Sequence[int] = (), frames: int = 0, joined: bool = False) -> None:
        """Grow in parts, `NAME.part-000.SUFFIX`, ..., from which another process can go on; before the first frame.

        Parts behind those that are kept are removed. `close` joins the parts, and leaves them for `remove_parts`.

        Args:
            sizes: bytes of the parts that are there, from `cut`.
            frames: how many frames they have.
            joined: whether they were joined into the target.
        """
        self._in_parts, self.count = True, frames
        self._files = go_on_in_parts(self.path, sizes, joined)

    def cut(self) -> list[int]:
        """Complete the part that is written: the next frame begins another one. Returns the bytes of each part.

        Raises:
            VideoError: it cannot be completed.
        """
        film, self._film = self._film, None
        try:
            if film is not None:
                with uninterrupted():
                    film.close()
            return [file.stat().st_size for file in self._files]
        except (import_av().FFmpegError, OSError) as error:
            raise VideoError(f"{self._files[-1]} cannot be completed: {error}") from error

    def remove_parts(self) -> None:
        """Remove the parts, after `close` has joined them."""
        remove_parts(self.path)

    def _new_file(self) -> Path:
        return part_path(self.path, len(self._files)) if self._in_parts else _new_partial(self.path)

    def close(self) -> None:
        """Finish the file and put it at `path`. Idempotent.

        Raises:
            VideoError: no frame was written, or the file cannot be finished.
        """
        if self._closed:
            return
        if not self.count:
            self._discard()
            raise VideoError(f"No frame was written to {self.path}, so there is no file.")
        self._finish(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._closed:
            return
        elif not self.count:
            self._discard()
        else:
            self._keep_partial()

    def _keep_partial(self) -> None:
        target = self.path
        if target.exists():
            target = self._files[0]
            warn(f"{self.path} exists and stays; the {self.count} new frames are in {target}.")
        try:
            self._finish(target)
        except VideoError as error:  # must not hide the exception that ended the block
            warn(str(error))

    def _finish(self, target: Path) -> None:
        """Make the film so far the file `target`; if that fails, the film stays under its partial name."""
        self._closed = True
        with uninterrupted():
            try:
                if self._film is not None:
                    self._film.close()
                join_films(self._files, target, self._rate)
                if not self._in_parts and self._files[0] != target:
                    self._files[0].unlink()
            except (import_av().FFmpegError, OSError) as error:
                self.path = self._files[0]
                raise VideoError(
                    f"{target} cannot be finished: {error}. The frames so far can be played: {self._files[0]}"
                    + (" and those of the numbers behind it" if len(self._files) > 1 else "")
                ) from error
            self.path, self.finished = target, True

    def _discard(self) -> None:
        """Remove a film without a frame."""
        self._closed = True
        film, self._film = self._film, None
        with suppress(import_av().FFmpegError, OSError):  # it is thrown away, so it need not be complete
            if film is not None:
                film.close()
        for file in self._files:
            file.unlink(missing_ok=True)


def _new_partial(path: Path) -> Path:
    """Make an empty file for the film of `path` while it is written; the films of earlier runs stay."""
    for number in count(1):
        name = f"{path.stem}.partial{'' if number == 1 else f'-{number}'}{path.suffix}"
        with suppress(FileExistsError):
            path.with_name(name).open("xb").close()
            return path.with_name(name)
    raise AssertionError("unreachable")


def _exact_rate(fps: float | Fraction) -> Fraction:
    """The fraction that `fps` stands for. Broadcast rates have the denominator 1001."""
    if not 0 < fps < 10_000:  # also refuses nan
        raise ConfigError(f"fps is {fps}, expected a number of frames per second above 0 and below 10000.")
    rate = Fraction(fps) if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    if not rate:
        raise ConfigError(f"fps is {fps}, expected at least 1/1001.")
    return rate


def check_format(path: Path, fps: float | Fraction | None = None, what: str = "path") -> None:
    """Refuse a file name or a frame rate that no video can have.

    Args:
        path: of the film.
        fps: frames per second; None: not known yet.
        what: the name of the argument that names the film.

    Raises:
        ConfigError: the suffix names no known container, or the rate is out of range.
        VideoError: `path` is a folder.
    """
    if path.suffix.lower() not in CONTAINERS:
        kind = (
            "a folder" if path.is_dir() else f"with the suffix {path.suffix!r}" if path.suffix else "without a suffix"
        )
        raise ConfigError(
            f"{what} is {path}, {kind}; expected the name of a film, with one of the suffixes {', '.join(CONTAINERS)}"
        )
    if path.is_dir():
        raise VideoError(f"{what} is {path}, a folder; expected the name of a file")
    if fps is not None:
        _exact_rate(fps)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist. Create it first"
        raise VideoError(f"{folder} {what}.")
    if not os.access(folder, os.W_OK):
        raise VideoError(f"The folder {folder} is not writable.")

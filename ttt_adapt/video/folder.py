"""Frames from pictures: those of a folder, or the pages of one file."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np

from ttt_adapt.errors import DataError, VideoError, warn
from ttt_adapt.files import LABEL_FOLDERS, PICTURE_SUFFIXES, UNREAD_SUFFIXES, VIDEO_SUFFIXES, files_in, natural_key
from ttt_adapt.video.labels_beside import frame_folder, frames_and_labels
from ttt_adapt.video.pictures import header, read_pages, read_picture
from ttt_adapt.video.sources import RESIZE_HINT, Kind
from ttt_adapt.view.terminal import counted


class ImageFolder:
    """The pictures of a folder in natural order, without other files and hidden ones. A `FrameSource`.

    Every picture is read by `ttt_adapt.video.pictures.read_picture`. Labels that lie beside the frames are left out,
    and this is said. Of a clip with `images/` (or `frames/`) beside `labels/`, the frames are read.
    """

    kind: Kind = "film"
    restarts = True
    patience: float | None = None
    fps: float | None = None
    sounds = 0
    uneven = False

    def __init__(self, folder: Path) -> None:
        self.name = folder.name or str(folder)
        folder = frame_folder(folder)
        files, labels = frames_and_labels(files_in(folder, PICTURE_SUFFIXES))
        if not files:
            raise VideoError(f"{folder} holds no images.{_what_is_there(folder)}")
        if videos := files_in(folder, VIDEO_SUFFIXES):
            warn(
                f"{folder} holds {counted(len(files), 'picture')} and {counted(len(videos), 'video')}, such as "
                f"{videos[0].name}: the pictures are the frames; name a video itself to read it"
            )
        if labels:
            one = len(labels) == 1
            lie = "lies beside a frame as its label and is" if one else "lie beside frames as their labels and are"
            warn(
                f"{folder}: {counted(len(labels), 'picture')} such as {labels[0].name} {lie} left out; put frames "
                "into a folder of their own"
            )
        if unread := files_in(folder, UNREAD_SUFFIXES):
            warn(
                f"{folder}: {counted(len(unread), 'picture')} of a format that is not read, such as {unread[0].name}: "
                "left out; convert to JPEG or PNG what should be frames"
            )
        # Unlike the order of files_in, this one ignores upper case and compares suffixes: a.jpg, a.png, B.jpg.
        self._files = sorted(files, key=lambda file: (natural_key(file.name.lower()), file.name))
        stems = [file.stem for file in self._files]
        alike = len({stem.lower() for stem in stems}) < len(stems)  # a.jpg beside a.png
        self.names = tuple(file.name for file in self._files) if alike else tuple(stems)
        self.length: int | None = len(files)
        self.size: tuple[int, int] = _read(self._files[0], 0).shape[:2]

    def frames(self, any_size: bool = False) -> Generator[np.ndarray, None, None]:
        """Yield uint8 RGB [H, W, 3], one file at a time."""
        for index, file in enumerate(self._files):
            frame = _read(file, index)
            if frame.shape[:2] != self.size and not any_size:
                (h, w), (height, width) = frame.shape[:2], self.size
                raise VideoError(
                    f"{file} (frame {index}) is {h} x {w} pixels high and wide, the first image, "
                    f"{self._files[0].name}, {height} x {width}. Resize all images of the folder to one size. "
                    f"{RESIZE_HINT}"
                )
            yield frame

    def interrupt(self) -> None:
        """Do nothing: the files are there."""

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""


def _read(file: Path, index: int) -> np.ndarray:
    try:
        return read_picture(file)
    except DataError as error:
        raise VideoError(str(error).replace(str(file), f"{file} (frame {index})", 1)) from error


def _what_is_there(folder: Path) -> str:
    """What a message says of a folder without pictures."""
    known = f" Known suffixes: {' '.join(sorted(PICTURE_SUFFIXES))}."
    near = (f for depth in ("*/*", "*/*/*") for f in folder.glob(depth))  # CLIP/a.png, CLIP/images/a.png
    inner = sorted({f.parent for f in near if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file()})
    inner = [place for place in inner if place.name.lower() not in LABEL_FOLDERS] or inner
    if inner:
        return f" There are some in {' and '.join(map(str, inner[:3]))}: pass that folder.{known}"
    if videos := files_in(folder, VIDEO_SUFFIXES):
        return f" There are videos, such as {videos[0]}: pass one of them.{known}"
    if phone := files_in(folder, {".heic", ".heif"}):
        return f" {phone[0].name} is a HEIF picture, which Pillow does not read: convert it to JPEG.{known}"
    return known


class PictureFile:
    """All pages of one picture, such as a TIFF stack or an animated WebP. A `FrameSource`."""

    kind: Kind = "film"
    restarts = True
    patience: float | None = None
    sounds = 0
    uneven = False

    def __init__(self, file: Path) -> None:
        self.name, self._file = file.name, file
        try:
            known = header(file)
            self.size: tuple[int, int] = next(read_pages(file)).shape[:2]
        except DataError as error:
            raise VideoError(str(error)) from error
        self.length: int | None = known.pages
        self.fps = 1 / known.seconds if known.seconds else None

    def frames(self, any_size: bool = False) -> Generator[np.ndarray, None, None]:
        """Yield uint8 RGB [H, W, 3], page by page."""
        index = 0
        try:
            for frame in read_pages(self._file):
                if frame.shape[:2] != self.size and not any_size:
                    raise VideoError(
                        f"{self._file} changes its size at page {index}: {frame.shape[0]} x {frame.shape[1]} pixels "
                        f"high and wide after {self.size[0]} x {self.size[1]}. Save the pages as single pictures. "
                        f"{RESIZE_HINT}"
                    )
                yield frame
                index += 1
        except DataError as error:
            raise VideoError(f"{error} (page {index}; the {index} pages before it were delivered)") from error

    def interrupt(self) -> None:
        """Do nothing: the file is there."""

    def close(self) -> None:
        """Do nothing: the file is open only while it is read."""

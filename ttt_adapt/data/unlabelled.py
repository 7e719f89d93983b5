"""Frames without labels: any folder of pictures or videos, for tasks whose label is the frame itself.

All folders below the given one are searched. Every folder of pictures is a clip and has the folder's name, or the name
of the folder above where it is called `images` or `frames`. Every video file is a clip and has the file's name. Where a
name is taken already, the path is the name, with a number where that is taken too. Folders of labels (`labels`,
`Annotations`, `panoptic`, ...) are left out, and so are labels that lie beside their frames, such as a `NAME.png`
beside a `NAME.jpg`: see `ttt_adapt.video.labels_beside`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.errors import DataError, nearest
from ttt_adapt.files import FRAME_FOLDERS, LABEL_FOLDERS, PICTURE_SUFFIXES, VIDEO_SUFFIXES, files_in, folders_in
from ttt_adapt.video.labels_beside import frames_and_labels
from ttt_adapt.video.pictures import GREY_MODES, header, pillow, read_picture
from ttt_adapt.video.reader import open_video


class PictureClip(Clip):
    """The pictures of one folder, in natural order. The labels mean nothing: every pixel has the class id 0.

    With a `size`, a picture is scaled until it covers that size, and its middle is cut out: nothing is distorted.
    """

    def __init__(self, name: str, files: Sequence[Path], size: tuple[int, int] | None = None) -> None:
        super().__init__(name, size=size)
        self._files = list(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        return _sample(_fit(pillow().fromarray(read_picture(self._files[index])), self.size))

    def place(self, index: int) -> str:
        """The picture's file."""
        return str(self._files[index])

    @property
    def files(self) -> list[Path]:
        """The pictures."""
        return list(self._files)

    def but_grey(self) -> PictureClip:
        """The clip without the pictures that are stored in grey, as their headers say."""
        return PictureClip(self.name, [file for file in self.files if header(file).mode not in GREY_MODES], self.size)

    def sizes(self) -> dict[tuple[int, int], Path]:
        """(H, W) of the samples, as the headers say, each with the first picture that has it."""
        if self.size is not None:
            return dict.fromkeys([self.size], self._files[0])
        return {header(file).size: file for file in reversed(self._files)}


class VideoClip(Clip):
    """The frames of a video file. The labels mean nothing: every pixel has the class id 0.

    Iterating decodes frame by frame. Reading by index decodes the frames up to that index and keeps them in a temporary
    file. A process that gets the clip by a fork, or by pickling, decodes for itself.

    Args:
        name: the clip's name.
        file: the video.
        size: (height, width) of the samples, as for `PictureClip`.
        frames: use only this many frames, from the first on; None for all.
    """

    def __init__(self, name: str, file: Path, size: tuple[int, int] | None = None, frames: int | None = None) -> None:
        with open_video(file) as video:
            fps = video.fps
        super().__init__(name, size=size, fps=fps)
        self._file, self._limit = file, frames
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @cached_property
    def _length(self) -> int:
        with open_video(self._file) as video:
            whole = video.length or 0
        return whole if self._limit is None else min(whole, self._limit)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """A sample.

        Raises:
            DataError: fewer frames can be decoded than the file announces.
        """
        index = range(len(self))[index]
        if self._kept is None or self._kept.process != os.getpid():
            if self._kept is not None:
                _FORKED.append(self._kept)
            self._kept = _Kept(frame for frame, _ in self)
        frame = self._kept.frame(index)
        if frame is None:
            raise DataError(
                f"{self._file} announces {len(self)} frames, but only {len(self._kept)} can be decoded: frame {index} "
                "is missing. Write the file anew (ffmpeg -i IN OUT), or use its pictures"
            )
        return _sample(frame)

    def __iter__(self) -> Iterator[Sample]:
        with open_video(self._file) as video:
            for index, frame in enumerate(video):
                if index == self._limit:
                    break
                yield _sample(_fit(pillow().fromarray(frame), self.size))

    @property
    def files(self) -> list[Path]:
        """The video file."""
        return [self._file]


_FORKED: list[_Kept] = []
"""Decoders that a forked process got from its parent. Their threads are missing, so that closing one would hang."""


class _Kept:
    """The frames of an iteration, by index. Decoded frames lie in a temporary file, not in memory.

    Attributes:
        process: id of the only process that may use it.
    """

    def __init__(self, frames: Iterator[np.ndarray]) -> None:
        self.process, self._frames = os.getpid(), frames
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as this lives
        self._places: list[tuple[int, tuple[int, ...]]] = []  # (offset, shape)
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def frame(self, index: int) -> np.ndarray | None:
        """The frame at `index`, uint8 [H, W, 3], or None where there are fewer frames."""
        while len(self._places) <= index:
            frame = next(self._frames, None)
            if frame is None:
                return None
            self._file.seek(self._end)
            self._file.write(frame.tobytes())
            self._places.append((self._end, frame.shape))
            self._end += frame.nbytes
        offset, shape = self._places[index]
        self._file.seek(offset)
        return np.frombuffer(self._file.read(int(np.prod(shape))), np.uint8).reshape(shape)


def open_frames(
    source: str | Path,
    names: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> list[Clip]:
    """Opens all pictures and videos under `source`.

    Args:
        source: a folder, or one video file.
        names: open only these clips, in this order.
        size: (height, width) of the samples.
        frames: open only this many frames of every clip, from the first on; None for all.

    Raises:
        DataError: there are no pictures and no videos, or no clip of that name. Reading raises it for a file that is
            no picture.
        VideoError: a video cannot be opened.
    """
    root = Path(source)
    if not root.exists():
        raise DataError(f"{root} does not exist; expected pictures or videos")
    found: dict[str, tuple[Path, list[Path]]] = {}
    for place, files in [(root, [])] if root.is_file() else walk(root):
        found[_free_name(place, root, found)] = (place, files)
    if not found:
        raise DataError(f"no picture and no video was found in {root}; known suffixes: {_suffixes()}")
    for name in names or ():
        if name not in found:
            raise DataError(f"no clip {name!r} in {source}; {nearest(name, found)}")
    chosen = list(found) if names is None else list(names)
    return [
        PictureClip(name, found[name][1][:frames], size)
        if found[name][1]
        else VideoClip(name, found[name][0], size, frames)
        for name in chosen
    ]


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """All clips below a folder, in natural order: (folder, its pictures), or (video file, []). Labels are left out."""
    files, _ = frames_and_labels(files_in(folder, PICTURE_SUFFIXES))
    if files:
        yield folder, files
    for video in files_in(folder, VIDEO_SUFFIXES):
        yield video, []
    for inner in folders_in(folder):
        if inner.name.lower() not in LABEL_FOLDERS:
            yield from walk(inner)


def _name(place: Path) -> str:
    if place.name in FRAME_FOLDERS:
        return place.resolve().parent.name
    return place.resolve().stem if place.is_file() else place.resolve().name


def _free_name(place: Path, root: Path, taken: Container[str]) -> str:
    """The place's name. Where it is taken: its path below the root, with a number where that is taken too."""
    plain, path = _name(place), "-".join(place.relative_to(root).parts)
    names = chain([plain, path], (f"{path}-{number}" for number in count(2)))
    return next(name for name in names if name and name not in taken)


def _suffixes() -> str:
    return " ".join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))


def _fit(image: Any, size: tuple[int, int] | None) -> np.ndarray:
    """The middle of the picture, scaled to cover `size`; bilinear with antialiasing."""
    if size is None or (image.height, image.width) == size:
        return np.asarray(image)
    scale = max(size[0] / image.height, size[1] / image.width)
    height, width = min(size[0] / scale, image.height), min(size[1] / scale, image.width)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return np.asarray(image.resize(size[::-1], pillow().Resampling.BILINEAR, box=box))


def _sample(frame: np.ndarray) -> Sample:
    return np.array(frame), np.zeros(frame.shape[:2], dtype=np.uint8)

"""Labelled clips: frames and class ids in image files, read from disk when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ttt_adapt.data.classes import class_names
from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.data.images import (
    UNLABELLED,
    check_ids,
    match,
    no_folder,
    read_ids,
    read_mask,
)
from ttt_adapt.data.index import Index, Palette, read_index
from ttt_adapt.errors import DataError
from ttt_adapt.files import FRAME_FOLDERS, PICTURE_SUFFIXES, files_in
from ttt_adapt.video.labels_beside import frames_and_labels
from ttt_adapt.video.pictures import header, pillow, read_picture

BINARY_CLASSES = ("background", "foreground")


class ImageClip(Clip):
    """A clip whose frames and labels are image files, read from disk when they are asked for.

    Attributes:
        palette: the colours that the files of the labels give the classes; () where they give none.

    Args:
        name: the clip's name.
        files: the (frame, label) files.
        read: label file -> class ids, `uint8 [H, W]`.
        classes: class names.
        ignore: the id of void pixels; None: 255.
        size: (height, width) to resize to: frames bilinear with antialiasing, labels to the nearest pixel.
        fps: labelled frames per second.
        times: seconds of every frame.
        sources: other files that the labels are made from, such as COCO's JSON.
        palette: one colour for each class; () where there are none.

    Raises:
        ConfigError: `size` is no pair. Reading raises DataError for a broken file, labels of another size than their
            frame, and an id outside the class list; each names the file.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[tuple[Path, Path]],
        read: Callable[[Path], np.ndarray],
        *,
        classes: Sequence[str],
        ignore: int | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        times: tuple[float, ...] | None = None,
        sources: Sequence[Path] = (),
        palette: Palette = (),
    ) -> None:
        super().__init__(name, classes=classes, ignore=ignore, size=size, fps=fps, times=times)
        self._files, self._read, self._sources = list(files), read, tuple(sources)
        self.palette = palette

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        frame_file, label_file = self._files[index]
        frame = read_picture(frame_file)
        ids = self._labels(frame_file, label_file, frame.shape[:2])
        if self.size is not None:
            library = pillow()
            sides, resampling = self.size[::-1], library.Resampling
            frame = np.array(library.fromarray(frame).resize(sides, resampling.BILINEAR))
            ids = np.array(library.fromarray(ids).resize(sides, resampling.NEAREST))
        return frame, ids

    def place(self, index: int) -> str:
        """The frame's file."""
        return str(self._files[index][0])

    @property
    def files(self) -> list[Path]:
        """Every frame, each with its label behind it, and what else the labels are made from."""
        return [*(file for pair in self._files for file in pair), *self._sources]

    def check_labels(self) -> None:
        """Read the labels of all frames once; of the frames it reads the sizes alone, from their headers.

        Raises:
            DataError: a label cannot be read, has another size than its frame, or an id outside the class list; the
                message names the file.
        """
        for frame_file, label_file in self._files:
            self._labels(frame_file, label_file, header(frame_file).size)

    def _labels(self, frame_file: Path, label_file: Path, size: tuple[int, int]) -> np.ndarray:
        """The class ids of a frame of that size on disk, checked."""
        ids = self._read(label_file)
        if ids.shape != size:
            turned = header(frame_file).orientation
            stored = f" once it is turned upright (its EXIF orientation is {turned})" if turned > 1 else ""
            raise DataError(
                f"{label_file} is {ids.shape[0]} x {ids.shape[1]}, its frame {frame_file.name} is "
                f"{size[0]} x {size[1]} (height x width){stored}; labels must have their frame's size"
            )
        allowed = {*range(len(self.classes)), self.ignore}
        check_ids(ids, allowed, f"0..{len(self.classes) - 1} or {self.ignore}", label_file)
        return ids


class LabelledClip(ImageClip):
    """The frames and labels of one folder.

    The folder holds either `images/` (or `frames/`) beside `labels/`, or `NAME.jpg` beside `NAME.png` in one place.
    Labels are palette or grayscale PNG files of class ids, with the stems of their frames. Frames come in natural order
    (`2.jpg` before `10.jpg`). An `index.json` with `classes`, `ignore` and `clips` in the parent folder gives the class
    names, the ignore id and the times. Arguments take precedence over it.

    Attributes:
        binary: the labels are object masks of 0 and 255.
        index: the `index.json` beside the clip; None where there is none with class names.

    Args:
        folder: where the clip lies.
        name: another name for it; by default the folder's.
        classes: class names, for a clip without an index.
        ignore: the id of void pixels; 255 without an index.
        binary: the label images are object masks of 0 and 255 (DAVIS): 0 becomes class 0 and 255 becomes class 1,
            and no pixel is void. The classes are then background and foreground unless two others are given.
        size: (height, width) to resize to.

    Raises:
        DataError: the folder or its frames are missing, a frame has no label or a label no frame, or the class
            names are unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        ignore: int | None = None,
        binary: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        folder = Path(folder)
        index = read_index(folder.parent)
        files = pair_files(folder)
        super().__init__(
            name or folder.name,
            files,
            read_mask if binary else read_ids,
            classes=_class_names(folder, classes, binary, index),
            ignore=index.ignore() if index is not None and ignore is None else ignore,
            size=size,
            fps=None if index is None else index.fps(folder.name),
            times=None if index is None else index.times(folder.name, [frame.name for frame, _ in files]),
        )
        self.binary, self.index = binary, index


def pair_files(folder: Path) -> list[tuple[Path, Path]]:
    """The (frame, label) files of a clip folder in natural order.

    Raises:
        DataError: the folder, its frames or its labels are missing or do not match.
    """
    if not folder.is_dir():
        raise DataError(f"{no_folder(folder)}; expected a clip of frames and labels")
    frame_folder = next((folder / name for name in FRAME_FOLDERS if (folder / name).is_dir()), folder)
    label_folder = folder if frame_folder == folder else folder / "labels"
    if not label_folder.is_dir():
        raise DataError(f"{frame_folder} has no labels beside it; expected {label_folder} {UNLABELLED}")
    suffixes = PICTURE_SUFFIXES - {".png"} if label_folder == frame_folder else PICTURE_SUFFIXES
    frames, _ = frames_and_labels(files_in(frame_folder, suffixes))
    if not frames:
        raise DataError(
            f"no frames in {frame_folder}; expected images/ (or frames/) beside labels/, or NAME.jpg beside NAME.png "
            f"{UNLABELLED}"
        )
    labels = {file.stem: file for file in files_in(label_folder, {".png"})}
    return match(frames, labels.values(), lambda frame: labels.get(frame.stem, label_folder / f"{frame.stem}.png"))


def _class_names(folder: Path, given: Sequence[str] | None, binary: bool, index: Index | None) -> tuple[str, ...]:
    names = class_names(given, f"clip {folder}") or (BINARY_CLASSES if binary else ())
    names = names or (index.classes() if index is not None else ())
    if not names:
        file = folder.parent / "index.json"
        bare = f"; {file} is there, and has no classes" if file.is_file() else ""
        raise DataError(
            f"the classes of {folder} are unknown: give their names in the order of the ids (`classes`), or "
            f'put {file} there with {{"classes": [...]}}{bare}. Masks of 0 and 255 are binary=True'
        )
    if binary and len(names) != 2:
        raise DataError(
            f"binary=True got {len(names)} class names ({', '.join(names)}); expected 2, background and foreground"
        )
    return names

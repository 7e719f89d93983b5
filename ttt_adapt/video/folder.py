"""Frames from a folder of images."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np

from ttt_adapt.errors import VideoError, missing
from ttt_adapt.files import PICTURE_SUFFIXES, files_in, natural_key
from ttt_adapt.video.pictures import rgb8

SUFFIXES = PICTURE_SUFFIXES | {".gif"}


class ImageFolder:
    """The images of a folder in natural order, without other files and hidden ones. A `FrameSource`.

    Images are turned upright as their EXIF data say, and converted to RGB by `ttt_adapt.video.pictures.rgb8`. Of an
    animated image the first frame is used.
    """

    live = False
    fps: float | None = None
    sounds = 0
    uneven = False

    def __init__(self, folder: Path) -> None:
        self.name = folder.name or str(folder)
        files = files_in(folder, SUFFIXES)
        if not files:
            inner = sorted({f.parent for f in folder.glob("*/*") if f.suffix.lower() in SUFFIXES and f.is_file()})
            hint = f" There are some in {' and '.join(map(str, inner[:3]))}." if inner else ""
            raise VideoError(f"{folder} holds no images.{hint} Known suffixes: {' '.join(sorted(SUFFIXES))}.")
        # Unlike the order of files_in, this one ignores upper case and compares suffixes: a.jpg, a.png, B.jpg.
        self._files = sorted(files, key=lambda file: (natural_key(file.name.lower()), file.name))
        stems = [file.stem for file in self._files]
        alike = len({stem.lower() for stem in stems}) < len(stems)  # a.jpg beside a.png
        self.names = tuple(file.name for file in self._files) if alike else tuple(stems)
        self.length: int | None = len(files)
        self.size: tuple[int, int] = _read(self._files[0], 0).shape[:2]

    def frames(self) -> Generator[np.ndarray, None, None]:
        """Yield uint8 RGB [H, W, 3], one file at a time."""
        for index, file in enumerate(self._files):
            frame = _read(file, index)
            if frame.shape[:2] != self.size:
                (h, w), (height, width) = frame.shape[:2], self.size
                raise VideoError(
                    f"{file} (frame {index}) is {h} x {w} pixels high and wide, the first image, "
                    f"{self._files[0].name}, {height} x {width}. Resize all images of the folder to one size."
                )
            yield frame

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""


def _read(file: Path, index: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("pillow", "video") from error
    try:
        with Image.open(file) as image:
            return rgb8(image, file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{file} (frame {index}) cannot be read as an image: {error}") from error

"""`LabelVideoWriter`: label maps as one video file without loss, in the place of a folder of pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError
from ttt_adapt.video.film import Encoding
from ttt_adapt.video.film_file import FilmFile
from ttt_adapt.video.sources import import_av

if TYPE_CHECKING:
    from av import VideoFrame

SUFFIX = ".mkv"
"""Of a video of labels: Matroska holds FFV1 and texts of any name."""
_BYTES = 256
"""Class ids that fit into 8 bits."""


class LabelVideoWriter(FilmFile):
    """Writes class ids [H, W] as grey levels with FFV1, which loses nothing; for use in a `with` block.

    A pixel's grey is its class id: 8 bits, or 16 bits where there are more than 256 classes. Every frame stands alone,
    so that a reader can begin at any of them. See `FilmFile` for what is on disk while it is written, and when
    something ends it. To read it, with PyAV::

        with av.open("labels.mkv") as video:
            classes = json.loads(video.metadata["CLASSES"])
            for frame in video.decode(video=0):
                ids = frame.to_ndarray()  # [H, W]

    Args:
        path: the target, `.mkv`. Its folder must exist.
        fps: frames per second; None means 25.
        classes: number of classes.
        about: what else the file is to say, by name: texts, and what JSON can hold.

    Raises:
        ConfigError: `fps`, `classes` or the suffix is out of range.
        VideoError: the target cannot be written. Nothing has been written then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction | None,
        classes: int,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path, fps)
        if self.path.suffix.lower() != SUFFIX:
            raise ConfigError(f"{self.path} has the suffix {self.path.suffix!r}, expected {SUFFIX} for labels.")
        if not 1 <= classes <= _BYTES**2:
            raise ConfigError(f"classes is {classes}, expected 1 to {_BYTES**2}.")
        self._check_target()
        self._classes = classes
        self._size: tuple[int, ...] | None = None
        tags = {
            name.upper(): text if isinstance(text, str) else json.dumps(text) for name, text in (about or {}).items()
        }
        alone = {"g": "1", "level": "3", "slicecrc": "1"}
        self.encoding = Encoding("ffv1", "gray" if classes <= _BYTES else "gray16le", alone, colours=False, tags=tags)

    def write(self, frame: np.ndarray) -> None:
        """Append the class ids of one frame, integers [H, W] from 0.

        Raises:
            FrameError: its shape differs from that of the frames before, or an id is none of the classes.
            FrameTypeError: they are no integers.
            VideoError: it cannot be encoded or written, such as on a full disk.
            StateError: the writer is closed.
        """
        super().write(frame)

    def _image(self, frame: np.ndarray) -> VideoFrame:
        self._check(frame)
        grey = np.ascontiguousarray(frame, dtype=np.uint8 if self._classes <= _BYTES else np.uint16)
        return import_av().VideoFrame.from_ndarray(grey, format=self.encoding.pixels)

    def _check(self, labels: np.ndarray) -> None:
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
            what = f"{labels.dtype} array" if isinstance(labels, np.ndarray) else type(labels).__name__
            raise FrameTypeError(f"The labels are a {what}, expected a NumPy array of integers, [H, W].")
        if labels.ndim != 2 or 0 in labels.shape:
            raise FrameError(f"The labels have shape {list(labels.shape)}, expected [H, W].")
        self._size = self._size or labels.shape
        if labels.shape != self._size:
            raise FrameError(f"The labels have shape {list(labels.shape)}, expected {list(self._size)} as before.")
        if labels.min() < 0 or labels.max() >= self._classes:
            raise FrameError(
                f"The labels hold ids from {labels.min()} to {labels.max()}, expected 0 to {self._classes - 1}."
            )

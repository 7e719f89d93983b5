"""What a clip is: frames with their labels, in order, and what an evaluation asks about them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ttt_adapt.data.classes import class_names, ignore_id
from ttt_adapt.errors import ConfigError
from ttt_adapt.files import file_digest

Sample: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A frame, `uint8 [H, W, 3]` RGB, and its labels, `uint8 [H, W]` class ids."""


class Clip(ABC):
    """The frames of one clip with their labels, in order: a sequence of `Sample`.

    A kind of clip defines `__len__` and `__getitem__`. Where labels lie in files, it also defines `check_labels`.

    Attributes:
        name: the clip's name.
        classes: class names; the position is the class id. () where the labels mean nothing.
        ignore: the id of void pixels.
        size: (height, width) of the samples, or None for the size on disk.
        fps: labelled frames per second, or None where unknown.
        times: seconds of every frame from the start, or None where unknown.

    Raises:
        ConfigError: `size` is no pair of (height, width).
        DataError: the class names or the ignore id cannot be, see `ttt_adapt.data.classes`.
    """

    def __init__(
        self,
        name: str,
        *,
        classes: Sequence[str] = (),
        ignore: int | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        times: tuple[float, ...] | None = None,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"size is {size}; expected (height, width), both at least 1")
        where = f"clip {name}"
        self.name, self.classes, self.ignore = name, class_names(classes, where), ignore_id(ignore, where)
        self.size = size
        self.fps, self.times = fps, times

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at this place; a negative index counts from the end.

        Raises:
            IndexError: there is none.
            DataError: its files cannot be read, or their contents do not fit; the message names the file.
        """

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """What messages call the sample at `index`, such as the name of its file."""
        return f"frame {index} of clip {self.name}"

    @property
    def files(self) -> Sequence[Path]:
        """The files that the samples are read from; none for a clip that is computed."""
        return ()

    def check_labels(self) -> None:  # noqa: B027 - labels that lie in no file need no check
        """Read the labels of all frames once.

        Raises:
            DataError: one is wrong; the message names the file.
        """

    def describe(self) -> dict[str, Any]:
        """What a score of this clip depends on, for the record: the names and contents of all its files.

        The contents count, because a label that is painted anew often keeps its size. This reads every file once.
        Decoding the same files, as every arm does, takes several times as long.
        """
        digest = hashlib.sha256(repr((self.classes, self.ignore, self.fps)).encode())
        for file in dict.fromkeys(self.files):
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
        return {"frames": len(self), "size": list(self.size or ()), "content": f"sha256:{digest.hexdigest()[:16]}"}

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.name!r}, frames={len(self)}, classes={len(self.classes)}, size={self.size})"

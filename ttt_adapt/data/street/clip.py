"""The rendered street as a labelled clip: `StreetClip`."""

from __future__ import annotations

from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.data.street.scene import CLASSES, IGNORE, street_stream
from ttt_adapt.data.street.weather import Weather, drift
from ttt_adapt.errors import ConfigError

FPS = 10.0
"""Frames per second."""
_FIRST = 1000
"""Number of the street with seed 0: no clip shows a street that a model was trained on."""


class StreetClip(Clip):
    """A drive through night, fog and rain with clear days between; `ttt-adapt demo` shows it for the same seed.

    Args:
        seed: which street, 0 or more.
        frames: length of the stream.
        size: (height, width) of the pictures; by default the renderer's.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, seed: int = 0, frames: int = 240, size: tuple[int, int] | None = None) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"the street's seed is {seed!r}; expected a whole number from 0 on")
        times = tuple(i / FPS for i in range(max(frames, 0)))
        super().__init__(f"street-{seed}", classes=CLASSES, ignore=IGNORE, size=size, fps=FPS, times=times)
        self._stream = street_stream(frames, size or (128, 192), seed + _FIRST, FPS)
        self._count = frames
        self._drawn: list[Sample] = []

    def __len__(self) -> int:
        return self._count

    def weather(self, index: int) -> Weather:
        """The weather of a frame; a negative index counts from the end.

        Raises:
            IndexError: there is no such frame.
        """
        return drift(range(len(self))[index] / max(len(self) - 1, 1))

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        while len(self._drawn) <= index:  # drawn once, kept for the next arm
            self._drawn.append(next(self._stream))
        frame, labels = self._drawn[index]
        return frame.copy(), labels.copy()

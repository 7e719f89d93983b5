"""The strip below the pictures of a film that says which class has which colour."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from ttt_adapt.view.overlay import legend, names_that_fit

LARGEST_SHARE = 0.3
"""Of a picture's height that the strip may add."""


class Legend:
    """Adds a strip with the classes' names and colours to every picture of a film; all pictures stay of one size.

    Where there are too many classes for a small strip, it names the largest of each frame, in the order of their ids.

    Args:
        names: of the classes.
        palette: their colours, uint8 RGB [n, 3].
    """

    def __init__(self, names: Sequence[str], palette: np.ndarray) -> None:
        self._names, self._palette = list(names), palette
        self._strip: np.ndarray | None = None
        self._all = True

    def below(self, picture: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The picture with the strip below it.

        Args:
            picture: uint8 RGB [H, W, 3], of the size of all others.
            prediction: class ids [h, w].

        Raises:
            ConfigError: the picture is too narrow for the longest name.
        """
        height, width = picture.shape[:2]
        if self._strip is None:
            self._strip = legend(self._names, self._palette, width)
            self._strip = np.pad(self._strip, ((0, len(self._strip) % 2), (0, 0), (0, 0)), mode="edge")  # H.264: even
            self._all = len(self._strip) <= LARGEST_SHARE * height
        if self._all:
            return np.concatenate([picture, self._strip])
        counts = np.bincount(prediction.ravel(), minlength=len(self._names))
        largest = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
        strip_height = 2 * round(LARGEST_SHARE / 2 * height)

        def too_many(number: int) -> bool:
            return not names_that_fit([self._names[index] for index in sorted(largest[:number])], width, strip_height)

        # In the order of the ids, so that a name keeps about its place from frame to frame.
        shown = sorted(largest[: max(bisect_left(range(1, len(largest) + 1), True, key=too_many), 1)])
        names = [self._names[index] for index in shown]
        return np.concatenate([picture, legend(names, self._palette[shown], width, height=strip_height)])

"""A picture of what changed between two predictions: which pixels became right, and which became wrong."""

from __future__ import annotations

import numpy as np

from ttt_adapt.errors import FrameError
from ttt_adapt.view.overlay import check_image

RIGHT_NOW = (40, 210, 110)
"""Colour of pixels that were wrong before and are right now."""
WRONG_NOW = (225, 45, 40)
"""Colour of pixels that were right before and are wrong now."""


def changes_image(
    frame: np.ndarray, labels: np.ndarray, before: np.ndarray, after: np.ndarray, ignore: int | None = 255
) -> np.ndarray:
    """The frame in dark grey, green where a prediction became right, and red where it became wrong.

    Pixels that both predictions have right, or both wrong, stay grey.

    Args:
        frame: uint8 RGB [H, W, 3].
        labels: the true class ids, integers [H, W].
        before: class ids of the one prediction, integers [H, W].
        after: class ids of the other, integers [H, W].
        ignore: the label of pixels that do not count; None where there is none.

    Returns:
        uint8 RGB [H, W, 3].

    Raises:
        FrameError: labels or predictions are not [H, W] of the frame.
        FrameTypeError: the frame is not a uint8 array.
    """
    check_image(frame, "frame")
    for name, ids in (("labels", labels), ("before", before), ("after", after)):
        if np.shape(ids) != frame.shape[:2]:
            raise FrameError(f"{name} has shape {list(np.shape(ids))}, expected {list(frame.shape[:2])} as the frame.")
    grey = frame.mean(axis=2, keepdims=True)  # [H, W, 1]
    picture = np.repeat(0.45 * grey + 20.0, 3, axis=2)
    was, now = np.equal(before, labels), np.equal(after, labels)
    counts = np.ones(was.shape, bool) if ignore is None else np.not_equal(labels, ignore)
    for where, colour in ((now & ~was, RIGHT_NOW), (was & ~now, WRONG_NOW)):
        where &= counts
        picture[where] = 0.3 * grey[where] + 0.7 * np.array(colour)
    return np.round(picture).astype(np.uint8)

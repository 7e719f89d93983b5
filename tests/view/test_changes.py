"""The picture of what changed: green where a prediction became right, red where it became wrong, grey elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from ttt_adapt.errors import FrameError, FrameTypeError
from ttt_adapt.view.changes import RIGHT_NOW, WRONG_NOW, changes_image

FRAME = np.full((1, 5, 3), 100, np.uint8)
LABELS = np.array([[0, 1, 2, 3, 255]], np.uint8)
BEFORE = np.array([[0, 0, 2, 0, 0]], np.uint8)  # right, wrong, right, wrong, void
AFTER = np.array([[0, 1, 0, 1, 255]], np.uint8)  # right, right, wrong, wrong, void


def nearest(pixel: np.ndarray) -> str:
    colours = {"right now": RIGHT_NOW, "wrong now": WRONG_NOW, "as before": (65, 65, 65)}
    return min(colours, key=lambda name: np.abs(pixel.astype(int) - colours[name]).sum())


def test_pixels_that_became_right_are_green_and_those_that_became_wrong_are_red():
    out = changes_image(FRAME, LABELS, BEFORE, AFTER)
    assert (out.shape, out.dtype) == (FRAME.shape, np.uint8)
    assert [nearest(pixel) for pixel in out[0]] == ["as before", "right now", "wrong now", "as before", "as before"]
    assert {tuple(out[0, k]) for k in (0, 3, 4)} == {(65, 65, 65)}


def test_a_void_label_counts_where_none_is_ignored():
    assert nearest(changes_image(FRAME, LABELS, BEFORE, AFTER, ignore=None)[0, 4]) == "right now"


def test_equal_predictions_leave_a_grey_picture_and_the_frame_as_it_is():
    frame = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    labels = np.zeros((4, 5), np.uint8)
    kept = frame.copy()
    out = changes_image(frame, labels, labels, labels)
    assert (out == out[..., :1]).all()
    assert np.array_equal(frame, kept)


def test_what_does_not_fit_the_frame_is_refused():
    with pytest.raises(FrameError, match=r"after has shape \[2, 5\], expected \[1, 5\]"):
        changes_image(FRAME, LABELS, BEFORE, np.zeros((2, 5), int))
    with pytest.raises(FrameTypeError, match="float64"):
        changes_image(FRAME / 255, LABELS, BEFORE, AFTER)

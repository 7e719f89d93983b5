"""The strip below a film: all classes where there is room, else the largest of each frame, each in its place."""

from __future__ import annotations

import numpy as np
import pytest

from ttt_adapt.view.legend import Legend
from ttt_adapt.view.overlay import default_palette

pytest.importorskip("PIL", reason='needs Pillow: pip install "ttt-adapt[video]"')
SIZE = (120, 320)


def colours_below(picture: np.ndarray, palette: np.ndarray) -> list[int]:
    """The classes whose colours the strip shows, from left to right and row by row."""
    strip = picture[SIZE[0] :].astype(int)
    found = []
    for index, colour in enumerate(palette):
        rows, columns = np.nonzero((strip == colour).all(-1))
        if rows.size >= 16:  # a square; the edges of letters have single pixels of any colour
            found.append((rows.min(), columns.min(), index))
    return [index for _, _, index in sorted(found)]


def test_few_classes_are_all_named_in_the_order_of_their_ids():
    palette = default_palette(5)
    picture = Legend(["a", "b", "c", "d", "e"], palette).below(np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, int))
    assert colours_below(picture, palette) == [0, 1, 2, 3, 4]


def test_of_many_classes_the_largest_of_the_frame_are_named_in_the_order_of_their_ids():
    palette = default_palette(90)
    strip = Legend([f"a longer name {index}" for index in range(90)], palette)
    prediction = np.repeat(np.arange(60)[::-1], range(1, 61))  # class 0 is the largest, class 59 one pixel
    frames = [
        strip.below(np.zeros((*SIZE, 3), np.uint8), labels) for labels in (prediction, prediction[prediction < 3])
    ]
    assert {frame.shape for frame in frames} == {(SIZE[0] + 36, SIZE[1], 3)}
    many, few = (colours_below(frame, palette) for frame in frames)
    assert few == [0, 1, 2]
    assert many == list(range(len(many)))
    assert 4 <= len(many) < 20
    turned = strip.below(np.zeros((*SIZE, 3), np.uint8), 59 - prediction)  # the largest have the last ids
    assert colours_below(turned, palette) == sorted(colours_below(turned, palette))
    assert colours_below(turned, palette)[-1] == 59

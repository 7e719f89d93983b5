"""Masks in COCO's two ways of writing them: polygons, and run lengths as numbers or as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttt_adapt.errors import DataError, missing

_FAR = 100
"""How many times the frame's longer side a corner may be away; drawing takes time that grows with the distance."""


def draw_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as `bool [height, width]`; polygons are drawn by pycocotools.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or {"size": [height, width], "counts": run lengths}. Runs go
            down the columns and begin with zeros; they are numbers, or in COCO's text coding.
        height: of the frame, in pixels.
        width: of the frame, in pixels.

    Raises:
        DataError: the run lengths are of another size than the frame, or it is no segmentation.
        MissingPackageError: pycocotools is not installed.
    """
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise DataError(f"a mask is {str(segmentation)[:60]}; expected polygons, or size and counts")
    runs, size = _runs(segmentation["counts"]), segmentation.get("size")
    covered = sum(runs)
    if size != [height, width] or covered != height * width:
        raise DataError(f"a mask of {size} covers {covered} pixels; expected {[height, width]}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _draw_polygons(polygons: list[Any], height: int, width: int) -> np.ndarray:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise missing("pycocotools", "eval") from error
    limit = _FAR * max(height, width)
    for corners in polygons:
        known = isinstance(corners, list) and len(corners) >= 6 and len(corners) % 2 == 0
        if not known or not all(isinstance(c, (int, float)) and abs(c) <= limit for c in corners):
            raise DataError(
                f"a polygon is {str(corners)[:60]}; expected x and y of at least three corners, in pixels of the frame"
            )
    if not polygons:
        return np.zeros((height, width), bool)
    return mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))).astype(bool)


def _runs(counts: Any) -> list[int]:
    """Run lengths as numbers."""
    runs = _from_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise DataError(f"the counts of a mask are {str(counts)[:60]}; expected run lengths, whole numbers from 0")
    return runs


def _from_text(text: str) -> list[int]:
    """COCO's text coding: 5 bits a character, from the lowest, and a bit that says whether more of the number follows.

    From the fourth number on, differences to the number before the last are stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DataError(f"the counts of a mask hold {character!r}; expected COCO's text coding of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise DataError("the counts of a mask break off; expected COCO's text coding of run lengths")
    return runs

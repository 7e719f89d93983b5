"""Panoptic label images: reading them, and panoptic quality.

A panoptic PNG numbers every pixel's segment as R + 256 G + 65536 B; a list beside it names the category of every
segment. Pixels of no listed segment are void.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttt_adapt_openmmlab.datasets.clips import read_colour

MATCH_IOU = 0.5
"""Above this IoU, at most one predicted segment can match a true one (Kirillov et al. 2019, section 4.1)."""


def segment_ids(colour: np.ndarray) -> np.ndarray:
    """Segment ids of a panoptic image.

    Args:
        colour: `uint8 [H, W, 3]`, RGB.

    Returns:
        `int32 [H, W]`.
    """
    parts = colour.astype(np.int32)
    return parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]


def read_segment_ids(file: str | Path) -> np.ndarray:
    """Segment ids of a panoptic PNG, `int32 [H, W]`.

    Raises:
        DataError: the file cannot be read or is no RGB image.
    """
    return segment_ids(read_colour(file))


def panoptic_counts(
    truth: np.ndarray,
    truth_segments: Sequence[tuple[int, int, bool]],
    prediction: np.ndarray,
    predicted_segments: Sequence[tuple[int, int]],
    classes: int,
) -> np.ndarray:
    """What panoptic quality is made of, for one frame.

    A predicted and a true segment of one class match if their IoU exceeds 0.5, where void pixels of the ground truth
    count neither in the intersection nor in the union. Unmatched true segments are false negatives, unmatched
    predicted ones false positives. Crowds match nothing and are not missed, and a prediction that lies by more than
    half in void or in crowds of its class is no false positive (Kirillov et al., Panoptic Segmentation, CVPR 2019,
    sections 4.1 and 4.2, and the crowd rule of the COCO panoptic task).

    Args:
        truth: segment ids `[H, W]`.
        truth_segments: (id, class, crowd) of every true segment; pixels of other ids are void.
        prediction: segment ids `[H, W]`.
        predicted_segments: (id, class) of every predicted segment; pixels of other ids are void.
        classes: number of classes.

    Returns:
        `float64 [4, classes]`: sums of the IoU of matches, true positives, false positives, false negatives.
    """
    ids, labels, crowd = (np.array([item[i] for item in truth_segments], np.int64) for i in range(3))
    guess_ids, guess_labels = (np.array([item[i] for item in predicted_segments], np.int64) for i in range(2))
    rows, columns = _places(truth, ids), _places(prediction, guess_ids)
    shape = (len(ids) + 1, len(guess_ids) + 1)
    overlap = np.bincount((rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    pairs, area = overlap[1:, 1:], overlap.sum(0)[1:]
    union = overlap.sum(1)[1:, None] + area - pairs - overlap[0, 1:]
    iou = pairs / np.maximum(union, 1)
    same = labels[:, None] == guess_labels
    match = same & (iou > MATCH_IOU) & ~crowd.astype(bool)[:, None]
    excused = overlap[0, 1:] + (pairs * (same & crowd.astype(bool)[:, None])).sum(0)
    missed = ~match.any(1) & ~crowd.astype(bool)
    wrong = ~match.any(0) & (excused <= 0.5 * area)
    found = np.where(match, iou, 0.0).sum(1)
    hits = match.any(1)
    return np.stack(
        [
            np.bincount(labels, found, classes),
            np.bincount(labels, hits.astype(float), classes),
            np.bincount(guess_labels, wrong.astype(float), classes),
            np.bincount(labels, missed.astype(float), classes),
        ]
    )


def panoptic_quality(counts: np.ndarray, classes: np.ndarray) -> tuple[float, float, float]:
    """PQ, SQ and RQ: means over those of the classes that have a segment, true or wrongly predicted.

    Args:
        counts: `[4, classes]` as `panoptic_counts` gives them, added over frames.
        classes: class ids to average over.

    Returns:
        Three fractions, NaN where no class has a segment.
    """
    iou, hits, wrong, missed = counts[:, classes]
    weight = hits + 0.5 * wrong + 0.5 * missed
    there = weight > 0
    if not there.any():
        return float("nan"), float("nan"), float("nan")
    iou, hits, weight = iou[there], hits[there], weight[there]
    return float((iou / weight).mean()), float((iou / np.maximum(hits, 1)).mean()), float((hits / weight).mean())


def _places(ids: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Where every pixel's id stands in the list, counted from 1; 0 for other ids."""
    if not len(listed):
        return np.zeros(ids.shape, np.int64)
    order = np.argsort(listed)
    ordered = listed[order]
    place = np.minimum(np.searchsorted(ordered, ids), len(listed) - 1)
    return np.where(ordered[place] == ids, order[place] + 1, 0)

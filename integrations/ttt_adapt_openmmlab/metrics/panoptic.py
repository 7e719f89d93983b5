"""Panoptic quality, by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.registry import METRICS

from ttt_adapt.errors import DataError
from ttt_adapt_openmmlab.datasets.frame_order import file_of
from ttt_adapt_openmmlab.datasets.label_images import read_segment_ids
from ttt_adapt_openmmlab.metrics.base import Scores, StreamMetric, size_text

MATCH_IOU = 0.5
"""Above this IoU, at most one predicted segment can match a true one (Kirillov et al. 2019, section 4.1)."""


@METRICS.register_module()
class StreamPQMetric(StreamMetric):
    """Panoptic quality by its definition (Kirillov et al., Panoptic Segmentation, CVPR 2019), with COCO's crowd rule.

    `PQ`, `SQ` and `RQ` average over all classes with a segment, `PQ_th` and so on over things, `PQ_st` over stuff. As
    in the official code a class that is only predicted counts as 0, also in the PQ of a single frame (`PQ_frames`).
    Predictions are mmdetection's `pred_panoptic_seg` (instance x 1000 + label; label `num_classes` is void). Ground
    truth is the panoptic PNG at `seg_map_path` with the `segments_info` of the data sample; name both in the
    `meta_keys` of `PackDetInputs`. A thing class that is no thing there is a crowd; pixels of no listed segment are
    void.

    Args:
        **options: `collect_device` and `prefix`, as for `StreamMetric`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(("PQ", "SQ", "RQ"), **options)

    def measure(self, sample: dict) -> np.ndarray:
        """Sums of IoU, true positives, false positives and false negatives of a frame, `float64 [4, classes]`."""
        from mmdet.evaluation import INSTANCE_OFFSET

        file, classes = file_of(sample), self.class_count()
        if sample.get("segments_info") is None or sample.get("seg_map_path") is None:
            raise DataError(
                f"{file} comes without ground truth; expected segments_info and seg_map_path in the data sample. Load "
                "them with LoadPanopticSegments and name both in the meta_keys of PackDetInputs"
            )
        guess = sample["pred_panoptic_seg"]
        ids = guess["sem_seg"].squeeze(0).cpu().numpy()
        void = {classes, guess.get("ignore_index", classes)}
        predicted = [(int(i), int(i) % INSTANCE_OFFSET) for i in np.unique(ids)]
        truth = read_segment_ids(sample["seg_map_path"])
        if truth.shape != ids.shape:
            raise DataError(
                f"{file} is predicted as {size_text(ids)} and labelled as {size_text(truth)} (height x width) in "
                f"{sample['seg_map_path']}; both must have the frame's own size"
            )
        things = self._things()
        segments = [
            (item["id"], item["category"], item["category"] in things and not item["is_thing"])
            for item in sample["segments_info"]
        ]
        return panoptic_counts(truth, segments, ids, [item for item in predicted if item[1] not in void], classes)

    def score(self, values: Sequence[np.ndarray]) -> Scores:
        """The scores of these frames together, in percent."""
        counts, things = np.sum(values, axis=0), self._things()
        every = range(self.class_count())
        groups = {"": every, "_th": [i for i in every if i in things], "_st": [i for i in every if i not in things]}
        scores = {}
        for suffix, group in groups.items():
            for name, value in zip(("PQ", "SQ", "RQ"), panoptic_quality(counts, np.array(group, int)), strict=True):
                scores[name + suffix] = 100 * value
        return scores

    def _things(self) -> set[int]:
        names = set(self._meta("thing_classes"))
        return {label for label, name in enumerate(self._meta("classes")) if name in names}


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

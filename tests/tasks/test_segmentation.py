"""Scores against a per-pixel reference, and their corner cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt_adapt.errors import ConfigError, DataError, FrameError, FrameTypeError, StateError
from ttt_adapt.tasks.segmentation.score import SegmentationScore

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")


def reference_iou(prediction: np.ndarray, labels: np.ndarray, ignore: int) -> dict[int, float]:
    """IoU by set operations on pixels, for the classes in the labels."""
    valid = labels != ignore
    iou = {}
    for index in np.unique(labels[valid]):
        hit = valid & (prediction == index) & (labels == index)
        either = valid & ((prediction == index) | (labels == index))
        iou[int(index)] = hit.sum() / either.sum()
    return iou


def random_clip(frames: int = 6, classes: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    for frame in range(frames):
        labels = rng.integers(0, classes - frame % 3, (13, 17))
        prediction = np.where(rng.random((13, 17)) < 0.6, labels, rng.integers(0, classes, (13, 17)))
        labels[rng.random((13, 17)) < 0.15] = 255
        yield prediction, labels


def scored(*frames, num_classes: int = 3) -> SegmentationScore:
    score = SegmentationScore(num_classes)
    for prediction, labels in frames:
        score.update(np.array(prediction), np.array(labels))
    return score


def test_scores_equal_a_per_pixel_reference():
    clip = list(random_clip())
    score = SegmentationScore(7)
    for prediction, labels in clip:
        value = score.update(prediction, labels.astype(np.uint8))
        assert value == pytest.approx(np.mean(list(reference_iou(prediction, labels, 255).values())))
    whole = reference_iou(*(np.concatenate(parts) for parts in zip(*clip, strict=True)), 255)
    frames = [np.mean(list(reference_iou(*frame, 255).values())) for frame in clip]
    right = sum(((p == y) & (y != 255)).sum() for p, y in clip) / sum((y != 255).sum() for _, y in clip)
    result = score.result()
    assert result["miou"] == pytest.approx(np.mean(list(whole.values())))
    assert result["miou_frames"] == pytest.approx(np.mean(frames))
    assert result["pixel_accuracy"] == pytest.approx(right)
    assert result["per_class"] == pytest.approx({str(index): iou for index, iou in whole.items()})
    assert result["frames"] == 6
    np.testing.assert_allclose(score.per_frame(), frames)


def test_arrays_and_tensors_of_any_integer_type_score_alike():
    prediction, labels = next(random_clip())
    values = set()
    for dtype in (np.uint8, np.int16, np.int64):
        values.add(SegmentationScore(7).update(prediction.astype(dtype), labels.astype(dtype)))
    values.add(SegmentationScore(7).update(torch.tensor(prediction), torch.tensor(labels, dtype=torch.uint8)))
    assert len(values) == 1


def test_the_classes_that_count_depend_on_the_labels_alone():
    # Class 2 is predicted but never there: the mean is over classes 0 and 1, whatever is predicted.
    result = scored(([[0, 0, 1, 2]], [[0, 0, 1, 1]])).result()
    assert result["miou"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["per_class"] == {"0": 1.0, "1": 0.5, "2": None}


def test_a_missed_class_counts_as_zero():
    assert scored(([[0, 0, 0, 0]], [[0, 0, 0, 1]])).result()["miou"] == pytest.approx((3 / 4 + 0) / 2)


def test_void_pixels_are_in_neither_intersection_nor_union():
    result = scored(([[0, 0, 1, 1]], [[0, 255, 1, 255]])).result()
    assert (result["miou"], result["pixel_accuracy"]) == (1.0, 1.0)


def test_an_all_void_frame_is_left_out_of_the_mean_and_marked():
    score = scored(([[0, 1]], [[0, 0]]), ([[0, 1]], [[255, 255]]), ([[0, 1]], [[0, 1]]))
    np.testing.assert_array_equal(score.per_frame(), [0.5, np.nan, 1.0])
    result = score.result()
    assert result["miou_frames"] == pytest.approx(0.75)
    assert result["frames"] == 3


def test_dataset_level_and_mean_over_frames_are_different_measures():
    result = scored(([[0, 0, 0, 1]], [[0, 0, 0, 0]]), ([[1, 1, 1, 1]], [[1, 1, 1, 0]])).result()
    assert result["miou"] == pytest.approx((3 / 5 + 3 / 5) / 2)
    assert result["miou_frames"] == pytest.approx((3 / 4 + (3 / 4 + 0) / 2) / 2)


def test_another_ignore_id_may_lie_inside_the_classes():
    score = SegmentationScore(3, ignore=0, classes=("void", "road", "car"))
    score.update(np.array([[1, 2, 2]]), np.array([[1, 0, 2]]))
    assert score.result()["per_class"] == {"void": None, "road": 1.0, "car": 1.0}


def test_a_score_of_nothing_is_an_error_not_nan():
    with pytest.raises(StateError, match="update"):
        SegmentationScore(3).result()
    with pytest.raises(DataError, match="void"):
        scored(([[0]], [[255]])).result()


@pytest.mark.parametrize(
    ("prediction", "labels", "error", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), FrameError, r"prediction is \[2, 3\], labels are \[3, 2\]"),
        (np.zeros((1, 2, 3), int), np.zeros((2, 3), int), FrameError, r"prediction has shape \[1, 2, 3\]"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), FrameTypeError, "prediction has dtype torch.float64"),
        ([[0]], np.zeros((1, 1), int), FrameTypeError, "prediction is a list"),
        (np.full((2, 3), 3), np.zeros((2, 3), int), FrameError, r"from 3 to 3; expected class ids in 0\.\.2"),
        (np.full((2, 3), -1), np.zeros((2, 3), int), FrameError, "from -1 to -1"),
        (np.zeros((2, 3), int), np.full((2, 3), 9), DataError, r"label ids go from 9 to 9; .* 0\.\.2 or 255"),
    ],
)
def test_wrong_input_is_refused_and_leaves_the_score_as_it_was(prediction, labels, error, message):
    score = scored(([[0, 1]], [[0, 1]]))
    with pytest.raises(error, match=message):
        score.update(prediction, labels)
    assert score.result()["frames"] == 1
    assert score.confusion.sum() == 2


def test_class_names_must_fit():
    with pytest.raises(ConfigError, match="3 different names, got 2"):
        SegmentationScore(3, classes=("a", "b"))
    with pytest.raises(ConfigError, match="at least 2"):
        SegmentationScore(1)


def test_j_is_the_iou_of_the_foreground_over_the_clip_and_per_frame():
    score = SegmentationScore(2)
    pairs = [
        ([[0, 1, 1, 1]], [[0, 0, 1, 1]]),  # 2 / 3
        ([[0, 0, 0, 0]], [[0, 0, 0, 1]]),  # 0 / 1
        ([[0, 0, 0, 0]], [[0, 0, 0, 0]]),  # nothing there, nothing found: 1, as in DAVIS' code
        ([[0, 1, 1, 1]], [[255, 255, 1, 1]]),  # void: 2 / 2
        ([[1, 1, 1, 1]], [[255, 255, 255, 255]]),  # all void: no frame
    ]
    for prediction, labels in pairs:
        score.update(np.array(prediction), np.array(labels))
    result = score.result()
    assert result["j"] == pytest.approx(4 / 6)
    assert result["j_frames"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert result["j"] == result["per_class"]["1"]


def test_j_is_not_defined_for_more_classes_or_without_foreground():
    score = SegmentationScore(3)
    score.update(np.array([[0, 1]]), np.array([[0, 1]]))
    assert (score.result()["j"], score.result()["j_frames"]) == (None, None)
    empty = SegmentationScore(2)
    empty.update(np.array([[0, 0]]), np.array([[0, 0]]))
    assert (empty.result()["j"], empty.result()["j_frames"]) == (None, 1.0)

"""Scores of semantic segmentation: mIoU, pixel accuracy and region similarity, the same for every way to run a model.

Pixels whose label is the ignore id do not count. Over the other pixels,

    IoU(c) = |prediction = c and label = c| / |prediction = c or label = c|

- **dataset-level mIoU** (`miou`): IoU from the counts of the whole clip, averaged over the classes in its
  labels;
- **mean over frames** (`miou_frames`): IoU from the counts of one frame, averaged over the classes in that frame's
  labels, then averaged over frames.

With two classes, background and foreground, there is also the **region similarity J** of DAVIS (Perazzi et al., 2016;
the part of its J & F measure that looks at regions, not boundaries): the IoU of class 1 alone, over the clip (`j`), and
per frame, averaged over all frames that have a labelled pixel (`j_frames`). A frame without foreground in labels and
prediction counts 1, as in the code of DAVIS. There, the first and the last frame do not count, because the first is
given to the method; here it is not given, so all frames count.

Instance and panoptic scores (AP, PQ) are for models that predict instances: `StreamAPMetric` and `StreamPQMetric` of
the OpenMMLab integration.

The labels alone decide which classes are averaged, so every way to run a model is divided by the same number. To
predict a class that is not there still costs: its pixels are missing from the classes that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.errors import ConfigError, DataError, FrameError, FrameTypeError, StateError, missing


class Scores(TypedDict):
    """What `SegmentationScore.result` returns. Every score is in [0, 1].

    Keys:
        miou: dataset-level mIoU.
        miou_frames: mean over frames of the per-frame mIoU; frames that are all void are left out.
        pixel_accuracy: share of the clip's labelled pixels that are predicted right.
        per_class: IoU over the clip by class name; None for a class that is not in the labels.
        frames: number of frames, those that are all void included.
        j: region similarity of class 1 over the clip; None unless there are two classes, and foreground in the clip.
        j_frames: its mean over frames; None unless there are two classes.
    """

    miou: float
    miou_frames: float
    pixel_accuracy: float
    per_class: dict[str, float | None]
    frames: int
    j: float | None
    j_frames: float | None


class SegmentationScore:
    """Counts the right and wrong pixels of one clip, frame by frame.

    Attributes:
        confusion: `int64 [C, C]` pixel counts over the clip so far, rows = labels, columns = predictions.

    Args:
        num_classes: number of classes C; ids are 0..C-1.
        ignore: label id of void pixels.
        classes: class names by id; by default the ids themselves.

    Raises:
        ConfigError: fewer than 2 classes, or the number of names is not `num_classes`.
    """

    def __init__(self, num_classes: int, ignore: int = 255, classes: Sequence[str] | None = None) -> None:
        if num_classes < 2:
            raise ConfigError(f"num_classes is {num_classes}; expected at least 2")
        names = [str(index) for index in range(num_classes)] if classes is None else list(classes)
        if len(names) != num_classes or len(set(names)) != num_classes:
            raise ConfigError(f"classes must be {num_classes} different names, got {len(names)}: {', '.join(names)}")
        self.num_classes, self.ignore, self.classes = num_classes, ignore, tuple(names)
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        self._per_frame: list[float] = []
        self._regions: list[float] = []

    def update(self, prediction: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> float:
        """Adds one frame.

        Args:
            prediction: integer class ids `[H, W]` in 0..C-1, on any device.
            labels: integer class ids `[H, W]` in 0..C-1, or the ignore id.

        Returns:
            The mIoU of this frame in [0, 1]; NaN if it is all void.

        Raises:
            FrameError: the shapes differ or are not [H, W], or a predicted id is out of range.
            FrameTypeError: the ids are not integers.
            DataError: a label id is out of range.
            MissingPackageError: torchmetrics is not installed.
        """
        predicted, truth = _class_ids(prediction, "prediction"), _class_ids(labels, "labels")
        if predicted.shape != truth.shape:
            raise FrameError(f"prediction is {[*predicted.shape]}, labels are {[*truth.shape]}; expected one [H, W]")
        last = self.num_classes - 1
        low, high = (int(bound) for bound in predicted.aminmax())
        if low < 0 or high > last:
            raise FrameError(f"predicted ids go from {low} to {high}; expected class ids in 0..{last}")
        counted = truth[truth != self.ignore]
        if counted.numel():
            low, high = (int(bound) for bound in counted.aminmax())
            if low < 0 or high > last:
                raise DataError(f"label ids go from {low} to {high}; expected class ids in 0..{last} or {self.ignore}")
        confusion = self._confusion(predicted, truth)
        self.confusion += confusion
        self._per_frame.append(_mean_iou(confusion))
        if self.num_classes == 2 and confusion.any():
            self._regions.append(_region_similarity(confusion))
        return self._per_frame[-1]

    def per_frame(self) -> np.ndarray:
        """The mIoU of every frame, `float64 [frames]` in [0, 1]; NaN where a frame is all void."""
        return np.array(self._per_frame, dtype=np.float64)

    def result(self) -> Scores:
        """The scores of all frames so far.

        Raises:
            StateError: no frame was added.
            DataError: every pixel of every frame was void.
        """
        frames = self.per_frame()
        if not frames.size:
            raise StateError("there is nothing to score yet; call update(prediction, labels) for every frame first")
        if not self.confusion.any():
            raise DataError(f"no labelled pixel: all {frames.size} frames are void (label {self.ignore} everywhere)")
        per_class = [None if np.isnan(iou) else float(iou) for iou in _iou(self.confusion)]
        return {
            "miou": _mean_iou(self.confusion),
            "miou_frames": float(np.nanmean(frames)),
            "pixel_accuracy": float(np.trace(self.confusion) / self.confusion.sum()),
            "per_class": dict(zip(self.classes, per_class, strict=True)),
            "frames": frames.size,
            "j": per_class[1] if self._regions else None,
            "j_frames": float(np.mean(self._regions)) if self._regions else None,
        }

    def _confusion(self, predicted: Tensor, truth: Tensor) -> np.ndarray:
        try:
            from torchmetrics.functional.classification import multiclass_confusion_matrix
        except ImportError as error:
            raise missing("torchmetrics", "eval") from error
        counts = multiclass_confusion_matrix(
            predicted, truth, self.num_classes, ignore_index=self.ignore, validate_args=False
        )
        return counts.numpy()


def _region_similarity(confusion: np.ndarray) -> float:
    """IoU of class 1 from counts `[2, 2]` (rows = labels); 1 where neither labels nor prediction have it."""
    union = confusion.sum() - confusion[0, 0]
    return float(confusion[1, 1] / union) if union else 1.0


def _class_ids(ids: np.ndarray | Tensor, what: str) -> Tensor:
    """Class ids `[H, W]` as `int64` on the CPU."""
    if not isinstance(ids, (np.ndarray, Tensor)):
        raise FrameTypeError(f"{what} is a {type(ids).__name__}; expected an array or tensor of class ids [H, W]")
    tensor = torch.as_tensor(ids)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise FrameTypeError(
            f"{what} has dtype {tensor.dtype}; expected integer class ids, such as logits.argmax(1)[0]"
        )
    if tensor.ndim != 2 or not tensor.numel():
        raise FrameError(f"{what} has shape {[*tensor.shape]}; expected [H, W] with at least one pixel")
    return tensor.detach().cpu().long()


def _iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of every class from counts `[C, C]` (rows = labels): `[C]`, NaN for classes without a label."""
    truth, hits = confusion.sum(axis=1), np.diagonal(confusion)
    union = truth + confusion.sum(axis=0) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=truth > 0)


def _mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the classes with labels; NaN if there are none."""
    iou = _iou(confusion)
    return float(iou[~np.isnan(iou)].mean()) if confusion.any() else float("nan")

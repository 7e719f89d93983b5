"""Mean intersection over union of semantic segmentation, counted by mmsegmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import METRICS

from ttt_adapt.errors import DataError
from ttt_adapt_openmmlab.datasets.frame_order import file_of
from ttt_adapt_openmmlab.metrics.base import Scores, StreamMetric, mean, size_text


@METRICS.register_module()
class StreamIoUMetric(StreamMetric):
    """Mean intersection over union, with mmsegmentation's own `IoUMetric` counting.

    `mIoU`, `mAcc` and `aAcc` are what `IoUMetric` reports: its mIoU averages over the classes that occur in ground
    truth or prediction. `mIoU_present` averages over the classes that occur in the ground truth only, so that one wrong
    pixel of an absent class costs no whole class, which weighs most in single frames. Both have all readings, each
    under its own name: `mIoU_frames` and `mIoU_present_frames`, and so on. Void pixels count nowhere.

    Args:
        ignore_index: the label of void pixels.
        **options: `collect_device` and `prefix`, as for `StreamMetric`.
    """

    def __init__(self, ignore_index: int = 255, **options: Any) -> None:
        super().__init__(("mIoU", "mIoU_present"), **options)
        self.ignore_index = ignore_index

    def measure(self, sample: dict) -> np.ndarray:
        """Areas of a frame in pixels, `float64 [4, classes]`: intersection, union, prediction, ground truth."""
        from mmseg.evaluation import IoUMetric

        file, classes = file_of(sample), self.class_count()
        if "gt_sem_seg" not in sample or "data" not in sample["gt_sem_seg"]:
            raise DataError(f"{file} comes without gt_sem_seg; put LoadAnnotations behind Resize in the test pipeline")
        prediction, truth = (sample[key]["data"].squeeze(0) for key in ("pred_sem_seg", "gt_sem_seg"))
        if prediction.shape != truth.shape:
            raise DataError(
                f"{file} is predicted as {size_text(prediction)} and labelled as {size_text(truth)} (height x width); "
                "the test pipeline must load annotations behind Resize, so that both have the frame's own size"
            )
        wrong = truth[(truth != self.ignore_index) & ((truth < 0) | (truth >= classes))]
        if wrong.numel():
            raise DataError(
                f"{file} is labelled with class {int(wrong[0])}; expected 0..{classes - 1} or {self.ignore_index}, and "
                "classes as the model has them"
            )
        areas = IoUMetric.intersect_and_union(prediction, truth.to(prediction), classes, self.ignore_index)
        return torch.stack(list(areas)).double().numpy()

    def score(self, values: Sequence[np.ndarray]) -> Scores:
        """The scores of these frames together, in percent."""
        from mmseg.evaluation import IoUMetric

        areas = torch.from_numpy(np.sum(values, axis=0))
        measured = IoUMetric.total_area_to_metrics(*areas, metrics=["mIoU"])
        iou, present = measured["IoU"], areas[3].numpy() > 0
        return {
            "mIoU": 100 * mean(iou),
            "mAcc": 100 * mean(measured["Acc"]),
            "aAcc": 100 * float(measured["aAcc"]),
            "mIoU_present": 100 * mean(iou[present]),
        }

"""Metrics of streams: mIoU, AP and PQ, over the data set, over frames and over videos.

Every arm is scored by the same function, and every score comes in three readings:

- `NAME`: all frames together, as mmsegmentation, mmdetection and COCO score a data set;
- `NAME_frames`: the mean of the scores of single frames, over the frames that have one;
- `NAME_videos`: the mean of the videos' scores, each weighted by its number of frames.

With several videos there are `VIDEO/NAME` and `VIDEO/NAME_frames` too. All scores are percent, not rounded; a score
without anything to score is NaN. Frames may come in any order and from any rank: scores do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.samplers import file_of, frame_key, video_of
from ttt_adapt_openmmlab.metrics.instances import IOU_TYPES, Frame, average_precision, detections_of, truth_of
from ttt_adapt_openmmlab.metrics.panoptic import panoptic_counts, panoptic_quality, read_segment_ids

Scores = dict[str, float]


class StreamMetric(BaseMetric):
    """The base: keeps one value per frame, and scores data set, frames and videos by one function.

    Args:
        averaged: which scores get the readings over frames and videos.
        collect_device: "cpu" or "gpu", as MMEngine takes it.
        prefix: put before the names of the scores.
    """

    default_prefix = "stream"

    def __init__(self, averaged: Sequence[str], collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.averaged = averaged

    def measure(self, sample: dict) -> Any:
        """What the score needs to know of one frame: small, and able to travel between processes."""
        raise NotImplementedError

    def score(self, values: Sequence[Any]) -> Scores:
        """The scores of these frames together, in percent."""
        raise NotImplementedError

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Measures the frames of a batch.

        Raises:
            DataError: a sample lacks ground truth or predictions, or they do not fit each other.
        """
        for sample in data_samples:
            place = {"video": video_of(sample), "key": frame_key(sample), "file": file_of(sample)}
            self.results.append({**place, "value": self.measure(sample)})

    def compute_metrics(self, results: list) -> Scores:
        """All readings of all scores, from the frames of all ranks."""
        videos = _by_video(results)
        if not videos:
            raise DataError("no frame was scored; expected a test loop over at least one")
        single = {name: [self.score([value]) for value in video] for name, video in videos.items()}
        whole = {name: self.score(video) for name, video in videos.items()}
        lengths = [len(video) for video in videos.values()]
        together = [value for video in videos.values() for value in video]
        scores = self.score(together) if len(videos) > 1 else dict(whole[next(iter(videos))])
        for name in self.averaged:
            scores[f"{name}_frames"] = _mean([frame[name] for video in single.values() for frame in video])
            scores[f"{name}_videos"] = _mean([video[name] for video in whole.values()], lengths)
        if len(videos) > 1:
            for video, label in _labels(videos).items():
                for name in self.averaged:
                    scores[f"{label}/{name}"] = whole[video][name]
                    scores[f"{label}/{name}_frames"] = _mean([frame[name] for frame in single[video]])
        headline = ", ".join(f"{name} {value:.2f}" for name, value in scores.items() if "/" not in name)
        MMLogger.get_current_instance().info(f"{sum(lengths)} frames of {len(videos)} videos, percent: {headline}")
        return scores

    def class_count(self) -> int:
        """How many classes the data set has."""
        return len(self._meta("classes"))

    def _meta(self, key: str) -> Sequence[str]:
        meta = self.dataset_meta or {}
        if key not in meta:
            raise ConfigError(f"{type(self).__name__} needs {key!r} in the metainfo of the test data set; it has none")
        return meta[key]


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
                f"{file} is predicted as {_size(prediction)} and labelled as {_size(truth)} (height x width); the test "
                "pipeline must load annotations behind Resize, so that both have the frame's own size"
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
            "mIoU": 100 * _mean(iou),
            "mAcc": 100 * _mean(measured["Acc"]),
            "aAcc": 100 * float(measured["aAcc"]),
            "mIoU_present": 100 * _mean(iou[present]),
        }


@METRICS.register_module()
class StreamAPMetric(StreamMetric):
    """COCO's average precision of masks and boxes, by pycocotools' `COCOeval`.

    `segm_mAP` is AP at IoU 0.50:0.95, with `_50` and `_75`, and `_s`, `_m`, `_l` by area; `bbox_mAP` likewise. Ground
    truth is `instances` of the data sample (mmdetection's form, with masks), or else the things of `segments_info` in
    the panoptic PNG `seg_map_path`; name these in the `meta_keys` of `PackDetInputs`. Stuff is left out. Crowds are
    ignored as COCO does. For masks, void (`bbox_label` -1, or pixels of no listed segment) is a crowd of every class; a
    box around void would hide true errors, so boxes have none. Frames without a true instance that is no crowd have no
    AP of their own and are left out of `_frames`.

    Args:
        metric: "segm", "bbox" or both.
        **options: `collect_device` and `prefix`, as for `StreamMetric`.

    Raises:
        ConfigError: an unknown metric.
    """

    def __init__(self, metric: str | Sequence[str] = "segm", **options: Any) -> None:
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if not self.metrics or set(self.metrics) - set(IOU_TYPES):
            raise ConfigError(f"metric is {metric!r}; expected {' or '.join(IOU_TYPES)}, or a list of both")
        super().__init__([f"{kind}_mAP" for kind in self.metrics], **options)

    def measure(self, sample: dict) -> Frame:
        """The true instances and the detections of a frame."""
        masks, (height, width) = "segm" in self.metrics, sample["ori_shape"][:2]
        things = self._meta("thing_classes" if "thing_classes" in (self.dataset_meta or {}) else "classes")
        labels = {label for label, name in enumerate(self._meta("classes")) if name in set(things)}
        return Frame(height, width, truth_of(sample, labels, masks), detections_of(sample, labels, masks))

    def score(self, values: Sequence[Frame]) -> Scores:
        """The scores of these frames together, in percent."""
        return {
            f"{kind}_{name}": 100 * value
            for kind in self.metrics
            for name, value in average_precision(values, kind, self.class_count()).items()
        }


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
                f"{file} is predicted as {_size(ids)} and labelled as {_size(truth)} (height x width) in "
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


def _by_video(results: Sequence[dict]) -> dict[str, list[Any]]:
    """The values of every video in order, each frame once: samplers may repeat frames to give ranks equal lengths."""
    once = {(result["video"], result["key"], result["file"]): result["value"] for result in results}
    videos: dict[str, list[Any]] = {}
    for place in sorted(once):
        videos.setdefault(place[0], []).append(once[place])
    return videos


def _labels(videos: Mapping[str, Any]) -> dict[str, str]:
    """A short name for every video: the last part of its path where that is enough."""
    short = {video: Path(video).name or video for video in videos}
    return short if len(set(short.values())) == len(short) else {video: video for video in videos}


def _mean(values: Sequence[float] | np.ndarray, weights: Sequence[float] | None = None) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    numbers = np.asarray(values, float)
    defined = ~np.isnan(numbers)
    if not defined.any():
        return float("nan")
    return float(np.average(numbers[defined], weights=None if weights is None else np.asarray(weights)[defined]))


def _size(image: Any) -> str:
    return " x ".join(map(str, image.shape))

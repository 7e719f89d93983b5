"""Average precision of instances, through pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.registry import METRICS
from torch import Tensor

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.frame_order import file_of
from ttt_adapt_openmmlab.datasets.label_images import read_segment_ids
from ttt_adapt_openmmlab.metrics.base import Scores, StreamMetric

IOU_TYPES = ("segm", "bbox")
MOST = 100
"""How many detections of a frame count, those of the highest scores first: COCO's limit for AP."""
ANY = -1
"""The label of void. Detections there are ignored, whatever their class."""

_AREAS = {"": "all", "_s": "small", "_m": "medium", "_l": "large"}


@dataclass(frozen=True)
class Frame:
    """True instances and detections of one frame, in COCO's form without ids.

    Attributes:
        height: of the frame.
        width: of the frame.
        truth: dictionaries of category_id, bbox (x, y, width, height), area, iscrowd and segmentation.
        detections: dictionaries of category_id, bbox or segmentation by metric, and scores.
    """

    height: int
    width: int
    truth: list[dict]
    detections: list[dict]


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


def truth_of(sample: dict, labels: Collection[int], masks: bool) -> list[dict]:
    """The true instances of these labels in a data sample; void has the label `ANY`.

    Raises:
        DataError: the sample has no ground truth, or masks are wanted and not there.
    """
    instances = sample.get("instances")
    if sample.get("segments_info") is not None and sample.get("seg_map_path") is not None:
        return _from_segments(sample, labels)
    if instances is None:
        raise DataError(
            f"{file_of(sample)} comes without ground truth; expected instances, or segments_info and seg_map_path, in "
            "the data sample. Name them in the meta_keys of PackDetInputs"
        )
    size = sample["ori_shape"][:2]
    return [_true_instance(item, size, masks, sample) for item in instances if item["bbox_label"] in {*labels, ANY}]


def detections_of(sample: dict, labels: Collection[int], masks: bool) -> list[dict]:
    """The detections of these labels in a data sample.

    Raises:
        DataError: the sample has no detections, or masks are wanted and not there.
    """
    found = sample.get("pred_instances")
    if found is None or (masks and "masks" not in found):
        raise DataError(
            f"{file_of(sample)} comes without pred_instances{' with masks' if masks else ''}; the model must predict "
            "instances (for Mask2Former, test_cfg with instance_on=True)"
        )
    boxes, scores, classes = (found[key].detach().cpu().numpy() for key in ("bboxes", "scores", "labels"))
    mask_scores = found["mask_scores"].detach().cpu().numpy() if "mask_scores" in found else scores
    shapes = found["masks"] if masks else None
    if isinstance(shapes, Tensor):
        shapes = shapes.detach().cpu().numpy()
    rows = [row for row in range(len(classes)) if int(classes[row]) in labels]
    detections = []
    for row in rows:
        x1, y1, x2, y2 = map(float, boxes[row])
        item = {"category_id": int(classes[row]), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(scores[row])}
        if shapes is not None:
            item |= {"segmentation": _encode(shapes[row]), "mask_score": float(mask_scores[row])}
        detections.append(item)
    return detections


def average_precision(frames: Sequence[Frame], kind: str, classes: int) -> dict[str, float]:
    """COCO's AP of frames.

    Args:
        frames: the frames to score together.
        kind: "segm" or "bbox".
        classes: number of classes.

    Returns:
        `mAP` (IoU 0.50:0.95), `mAP_50`, `mAP_75`, and `mAP_s`, `mAP_m`, `mAP_l`; fractions, NaN where there is no true
        instance that is no crowd.
    """
    from pycocotools.cocoeval import COCOeval

    present = sorted({item["category_id"] for frame in frames for item in frame.truth if not item["iscrowd"]})
    if not present:
        return {f"mAP{suffix}": float("nan") for suffix in ("", "_50", "_75", "_s", "_m", "_l")}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(frames, [_truth(frame, kind) for frame in frames], classes)
        evaluation = COCOeval(truth, _results(truth, frames, kind, classes), kind)
        evaluation.params.catIds = present  # classes without ground truth have no precision in COCO either
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, params = evaluation.eval["precision"], evaluation.params  # [iou, recall, class, area, most detections]
    at = {"": slice(None), "_50": slice(0, 1), "_75": slice(5, 6)}
    scores = {f"mAP{name}": _precision(precision[rows, :, :, 0, -1]) for name, rows in at.items()}
    for name in ("_s", "_m", "_l"):
        scores[f"mAP{name}"] = _precision(precision[:, :, :, params.areaRngLbl.index(_AREAS[name]), -1])
    return scores


def _true_instance(item: dict, size: Sequence[int], masks: bool, sample: dict) -> dict:
    from pycocotools import mask as rle

    x1, y1, x2, y2 = map(float, item["bbox"])
    box = [x1, y1, x2 - x1, y2 - y1]
    result: dict[str, Any] = {"category_id": int(item["bbox_label"]), "bbox": box, "area": box[2] * box[3]}
    result["iscrowd"] = int(item.get("ignore_flag", 0))
    mask = item.get("mask")
    if mask is None and masks:
        raise DataError(
            f"an instance of {file_of(sample)} has no mask; expected one for metric 'segm'. For a panoptic data set "
            "name segments_info and seg_map_path in the meta_keys of PackDetInputs"
        )
    if mask is not None:
        if isinstance(mask, list):
            mask = rle.merge(rle.frPyObjects(mask, *size))
        elif isinstance(mask["counts"], list):
            mask = rle.frPyObjects(mask, *size)
        result |= {"segmentation": mask, "area": float(rle.area(mask))}
    return result


def _from_segments(sample: dict, labels: Collection[int]) -> list[dict]:
    """The things of a panoptic PNG; a thing category that is no thing there is a crowd."""
    ids = read_segment_ids(sample["seg_map_path"])
    segments = sample["segments_info"]
    truth = [
        _from_mask(ids == item["id"], item["category"], crowd=not item["is_thing"])
        for item in segments
        if item["category"] in labels
    ]
    void = ~np.isin(ids, [item["id"] for item in segments])
    return [*truth, _from_mask(void, ANY, crowd=True)] if void.any() else truth


def _from_mask(mask: np.ndarray, label: int, crowd: bool) -> dict:
    from pycocotools import mask as rle

    code = _encode(mask)
    box = [float(value) for value in rle.toBbox(code)]
    area = float(mask.sum())
    return {"category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd), "segmentation": code}


def _encode(mask: np.ndarray | dict) -> dict:
    """A run-length code of a mask `[H, W]`, or the code itself if it is one."""
    from pycocotools import mask as rle

    if isinstance(mask, dict):
        return mask
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))


def _truth(frame: Frame, kind: str) -> list[dict]:
    """The true instances of a frame; void becomes a crowd of every class that is detected there."""
    plain = [item for item in frame.truth if item["category_id"] != ANY]
    if kind == "bbox":
        return plain
    detected = sorted({item["category_id"] for item in frame.detections})
    voids = [item for item in frame.truth if item["category_id"] == ANY]
    return plain + [{**void, "category_id": label} for void in voids for label in detected]


def _results(truth: Any, frames: Sequence[Frame], kind: str, classes: int) -> Any:
    score, shape = ("mask_score", "segmentation") if kind == "segm" else ("score", "bbox")
    found = [
        {"image_id": i, "category_id": item["category_id"], "score": item[score], shape: item[shape]}
        for i, frame in enumerate(frames)
        for item in frame.detections
    ]
    return truth.loadRes(found) if found else _coco(frames, [[] for _ in frames], classes)


def _coco(frames: Sequence[Frame], annotations: Sequence[Sequence[dict]], classes: int) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    items = [(i, item) for i, frame in enumerate(annotations) for item in frame]
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": frame.height, "width": frame.width} for i, frame in enumerate(frames)],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        # pycocotools takes the id 0 for "no match"
        "annotations": [{**item, "id": number, "image_id": i} for number, (i, item) in enumerate(items, start=1)],
    }
    coco.createIndex()
    return coco


def _precision(values: np.ndarray) -> float:
    """The mean over defined entries; pycocotools marks the others by -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")

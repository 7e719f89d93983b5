"""Transforms that read panoptic label images, for mmsegmentation and mmdetection pipelines."""

from __future__ import annotations

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ttt_adapt.errors import DataError
from ttt_adapt_openmmlab.datasets.kitti_step import CLASSES, PANOPTIC_ORDER, THINGS
from ttt_adapt_openmmlab.datasets.label_images import VOID, check_ids, read_colour, segment_ids


@TRANSFORMS.register_module()
class LoadPanopticSegments(BaseTransform):
    """Loads boxes, labels, masks and a class map from a panoptic PNG and its `segments_info`.

    It does for COCO's panoptic data sets what mmdetection's `LoadPanopticAnnotations` does, without `panopticapi`.

    Reads `seg_map_path` and `segments_info` (id, category, is_thing). Adds `gt_masks` (`BitmapMasks`), `gt_bboxes`
    (`HorizontalBoxes`, x1 y1 x2 y2), `gt_bboxes_labels` and `gt_ignore_flags` of the things that are no crowd, and
    `gt_seg_map` (`uint8 [H, W]`, 255 = void).

    Raises:
        DataError: the PNG is missing or of another encoding, or a listed segment has no pixel.
    """

    def transform(self, results: dict) -> dict:
        """Adds the annotations to the results of earlier transforms."""
        if results.get("segments_info") is None or results.get("seg_map_path") is None:
            raise DataError(
                f"{results.get('img_path')} comes without segments_info and seg_map_path; LoadPanopticSegments needs a "
                "panoptic data set (CocoPanopticDataset with data_prefix seg, CocoVideos with task='panoptic')"
            )
        return self._add(results, segment_ids(read_colour(results["seg_map_path"])))

    def _add(self, results: dict, ids: np.ndarray) -> dict:
        from mmdet.structures.bbox import HorizontalBoxes
        from mmdet.structures.mask import BitmapMasks

        classes = np.full(ids.shape, VOID, np.uint8)
        masks, labels = [], []
        for segment in results["segments_info"]:
            mask = ids == segment["id"]
            if not mask.any():
                raise DataError(f"{results['seg_map_path']} has no pixel of the listed segment {segment['id']}")
            classes[mask] = segment["category"]
            if segment["is_thing"]:
                masks.append(mask)
                labels.append(segment["category"])
        stack = np.stack(masks).astype(np.uint8) if masks else np.zeros((0, *ids.shape), np.uint8)
        results["gt_masks"] = BitmapMasks(stack, *ids.shape)
        results["gt_bboxes"] = HorizontalBoxes(np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4))
        results["gt_bboxes_labels"] = np.array(labels, np.int64)
        results["gt_ignore_flags"] = np.zeros(len(masks), bool)
        results["gt_seg_map"] = classes
        return results


@TRANSFORMS.register_module()
class LoadKittiStepAnnotations(LoadPanopticSegments):
    """Loads a KITTI-STEP label image, for the task of the data set.

    The PNG holds train ids 0..18 or 255 = void in red, and 256 x green + blue numbers the instances of person and car;
    their pixels without a number are a crowd. For the semantic task it adds `gt_seg_map` (`uint8 [H, W]`, train ids);
    for the panoptic task `segments_info`, with `id` as R + 256 G + 65536 B, and all that `LoadPanopticSegments` adds.

    Raises:
        DataError: the PNG is missing, of another encoding, holds an unknown class, or numbers instances of stuff.
    """

    def transform(self, results: dict) -> dict:
        """Adds the annotations to the results of earlier transforms."""
        file = results["seg_map_path"]
        colour = read_colour(file)
        semantic = check_ids(colour[..., 0], len(CLASSES), file)
        if results["task"] == "semantic":
            results["gt_seg_map"] = semantic.copy()
            results["seg_fields"].append("gt_seg_map")
            return results
        ids = segment_ids(colour)
        results["segments_info"] = kitti_segments(ids, str(file))
        return self._add(results, ids)


def kitti_segments(ids: np.ndarray, file: str) -> list[dict]:
    """The segments of a KITTI-STEP label image, void left out.

    Args:
        ids: `int32 [H, W]`, R + 256 G + 65536 B.
        file: its name, for errors.

    Returns:
        id, category (0 person, 1 car, then stuff) and is_thing of every segment.

    Raises:
        DataError: a class that is no thing has an instance number.
    """
    segments = []
    for value in map(int, np.unique(ids)):
        train_id, numbered = value % 256, value >= 256
        if train_id == VOID:
            continue
        if numbered and train_id not in THINGS:
            raise DataError(
                f"{file} numbers an instance of {CLASSES[train_id]}; only {' and '.join(CLASSES[i] for i in THINGS)} "
                "have instances. Is it a KITTI-STEP panoptic map?"
            )
        segments.append({"id": value, "category": PANOPTIC_ORDER.index(train_id), "is_thing": numbered})
    return segments


def _box(mask: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 around a mask, the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]

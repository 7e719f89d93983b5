"""mmdet's panoptic models without COCO's development kit."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

import miniatures
import ttt_adapt_openmmlab  # noqa: F401
from ttt_adapt_openmmlab import panoptic_kit as kit

stand_in = pytest.mark.skipif(
    getattr(importlib.util.find_spec("panopticapi"), "origin", None) is not None, reason="panopticapi is installed"
)


def test_colours_and_segment_ids_are_each_others_inverse():
    ids = np.random.default_rng(0).integers(0, 256**3, (5, 7))
    assert np.array_equal(kit.rgb2id(kit.id2rgb(ids)), ids)
    assert kit.id2rgb(ids).dtype == np.uint8
    assert kit.rgb2id((1, 2, 3)) == 1 + 2 * 256 + 3 * 65536
    assert kit.id2rgb(1 + 2 * 256 + 3 * 65536) == [1, 2, 3]


@stand_in
def test_mmdet_loads_panoptic_labels_without_the_kit(tmp_path):
    from mmdet.datasets.transforms import LoadPanopticAnnotations

    ids = miniatures.boxed((2, 2, 10, 14, 70000), (12, 2, 18, 10, 301))
    path = miniatures.panoptic(tmp_path / "labels.png", ids)
    segments = [
        {"id": 70000, "category": 1, "is_thing": True},
        {"id": 301, "category": 4, "is_thing": False},
    ]
    load = LoadPanopticAnnotations(with_bbox=False, with_label=False)
    found = load({"seg_map_path": str(path), "segments_info": segments, "ori_shape": ids.shape})
    assert np.array_equal(found["gt_seg_map"], np.select([ids == 70000, ids == 301], [1, 4], 255))
    assert np.array_equal(found["gt_masks"].masks, (ids == 70000)[None])


@stand_in
def test_mmdet_predicts_panoptic_colours_without_the_kit_and_refuses_its_scores():
    from mmdet.apis import det_inferencer
    from mmdet.evaluation.metrics import coco_panoptic_metric

    assert (det_inferencer.VOID, det_inferencer.id2rgb) == (0, kit.id2rgb)
    with pytest.raises(RuntimeError, match="panopticapi is not installed"):
        coco_panoptic_metric.CocoPanopticMetric()


def test_an_installed_kit_is_left_alone(monkeypatch):
    installed = type(sys)("panopticapi")
    installed.__spec__ = importlib.machinery.ModuleSpec("panopticapi", None, origin="panopticapi.py")
    monkeypatch.setitem(sys.modules, "panopticapi", installed)
    kit.stand_in_for_panopticapi()
    assert sys.modules["panopticapi"] is installed

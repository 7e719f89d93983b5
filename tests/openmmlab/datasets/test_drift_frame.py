"""DriftFrame: the drifts of the library in pipelines of mmseg and mmdet."""

from __future__ import annotations

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS

import tiny
from ttt_adapt.data.drift import Drift
from ttt_adapt.errors import ConfigError, DataError


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_frame_becomes_what_the_library_makes_of_it_in_rgb(kind):
    frame = tiny.frame()
    transform = TRANSFORMS.build({"type": "DriftFrame", "drift": "night:3", "seed": 2})
    results = transform({"img": frame.astype(kind), "frame_id": 5, "gt_seg_map": frame[..., 0]})
    expected = Drift("night", 3, 2).apply(np.ascontiguousarray(frame[..., ::-1]), 5)[..., ::-1]
    assert results["img"].dtype == kind
    assert np.array_equal(results["img"], expected)
    assert np.array_equal(results["gt_seg_map"], frame[..., 0])


def test_no_drift_leaves_the_frame_and_a_wrong_one_is_named():
    frame = tiny.frame()
    assert np.array_equal(TRANSFORMS.build({"type": "DriftFrame", "drift": "none"})({"img": frame})["img"], frame)
    with pytest.raises(ConfigError, match="nearest: 'night'"):
        TRANSFORMS.build({"type": "DriftFrame", "drift": "nigth:3"})
    with pytest.raises(DataError, match="behind LoadPicture or LoadImageFromFile"):
        TRANSFORMS.build({"type": "DriftFrame", "drift": "fog"})({})

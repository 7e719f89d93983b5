"""A transform that puts the frames of a stream under a synthetic drift."""

from __future__ import annotations

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ttt_adapt.errors import DataError
from ttt_adapt.integration import parse_drift


@TRANSFORMS.register_module()
class DriftFrame(BaseTransform):
    """Puts a frame under a drift of `ttt_adapt.data.drift`, such as "night:3"; labels stay.

    It belongs behind LoadPicture or LoadImageFromFile. The drift of a frame depends on its `frame_id`, 0 where there
    is none.

    Args:
        drift: NAME or NAME:SEVERITY.
        seed: of the drift.

    Raises:
        ConfigError: there is no such drift.
        DataError: no image was loaded.
    """

    def __init__(self, drift: str, seed: int = 0) -> None:
        self.drift = parse_drift(drift, seed)

    def transform(self, results: dict) -> dict:
        """Change `img`, BGR [H, W, 3] with values 0 to 255; its type stays."""
        image = results.get("img")
        if image is None:
            raise DataError("there is no image to drift: put DriftFrame behind LoadPicture or LoadImageFromFile")
        pixels = np.ascontiguousarray(image.round().clip(0, 255).astype(np.uint8)[..., ::-1])
        changed = self.drift.apply(pixels, int(results.get("frame_id") or 0))
        results["img"] = np.ascontiguousarray(changed[..., ::-1]).astype(image.dtype)
        return results

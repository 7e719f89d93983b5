"""A transform that reads pictures as the rest of the library does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ttt_adapt.integration import read_picture


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Begins a pipeline in the place of mmcv's `LoadImageFromFile`, and shows the picture that `ttt-adapt run` shows.

    The two differ where a picture is not plain 8-bit colour or grey: `LoadImageFromFile` leaves TIFF files as they lie,
    shows the colours behind transparent pixels, where this transform shows white, and has other formulas for print
    colours (CMYK).

    Reads `img_path`. Adds `img`, uint8 BGR [H, W, 3] and upright, and `img_shape` and `ori_shape`, (H, W).

    Args:
        to_float32: make `img` float32, with values 0 to 255.

    Raises:
        DataError: the file is missing, broken or no picture; the message names it.
    """

    def __init__(self, to_float32: bool = False) -> None:
        self.to_float32 = to_float32

    def transform(self, results: dict) -> dict:
        """Adds the picture to the results."""
        image = np.ascontiguousarray(read_picture(Path(results["img_path"]))[..., ::-1])
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        return f"LoadPicture(to_float32={self.to_float32})"

"""Image files of every kind as 8-bit RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.errors import DataError, missing

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of pictures without colour."""


def rgb8(image: Any, file: Path) -> np.ndarray:
    """A picture as it is meant to be seen, `uint8 [H, W, 3]` RGB: upright, and on white where it is transparent.

    Grey, palette, RGBA, CMYK and YCbCr pictures are converted; of 16-bit grey the upper 8 bits are used.

    Raises:
        DataError: the picture holds real numbers, or its kind does not say which values are black and white.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing("pillow", "video") from error

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise DataError(f"{file} holds values from {values.min()} to {values.max()}; expected 16-bit grey")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        raise DataError(f"{file} has mode {image.mode}; expected a picture of 8 or 16 bits: convert it first")
    return np.array(image.convert("RGB"))

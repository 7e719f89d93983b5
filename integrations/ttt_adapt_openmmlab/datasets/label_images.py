"""Images of labels: class ids, and segment ids of panoptic images.

A panoptic image numbers every pixel's segment as R + 256 G + 65536 B; a list beside it names the category of every
segment. Pixels of no listed segment are void.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ttt_adapt.errors import DataError
from ttt_adapt.integration import picture_header

VOID = 255
"""The label of void pixels and the category of ignored segments."""


def read_labels(file: str | Path, classes: int) -> np.ndarray:
    """A palette or grayscale PNG of class ids.

    Returns:
        `uint8 [H, W]`, values 0..classes-1, and 255 = void.

    Raises:
        DataError: the file cannot be read, has another encoding or holds another id.
    """
    return check_ids(_decode(file, ("P", "L"), "a palette or 8-bit grayscale image of class ids"), classes, file)


def read_colour(file: str | Path) -> np.ndarray:
    """A PNG of three 8-bit channels that encode ids.

    Returns:
        `uint8 [H, W, 3]`, RGB.

    Raises:
        DataError: the file cannot be read or has another encoding.
    """
    return _decode(file, ("RGB",), "ids in three 8-bit channels")


def check_ids(ids: np.ndarray, classes: int, file: str | Path) -> np.ndarray:
    """The same ids, if all are 0..classes-1 or 255.

    Raises:
        DataError: another id is there.
    """
    wrong = [value for value in np.bincount(ids.ravel(), minlength=256).nonzero()[0] if classes <= value != VOID]
    if wrong:
        raise DataError(
            f"{file} holds class id {', '.join(map(str, wrong))}; expected 0..{classes - 1} or {VOID} (void). "
            "Is it a label image of this data set?"
        )
    return ids


def segment_ids(colour: np.ndarray) -> np.ndarray:
    """Segment ids of a panoptic image.

    Args:
        colour: `uint8 [H, W, 3]`, RGB.

    Returns:
        `int32 [H, W]`.
    """
    parts = colour.astype(np.int32)
    return parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]


def read_segment_ids(file: str | Path) -> np.ndarray:
    """Segment ids of a panoptic PNG, `int32 [H, W]`.

    Raises:
        DataError: the file cannot be read or is no RGB image.
    """
    return segment_ids(read_colour(file))


def _decode(file: str | Path, modes: tuple[str, ...], encoding: str) -> np.ndarray:
    if (turned := picture_header(Path(file)).orientation) > 1:  # OpenMMLab's own readers of labels would not turn it
        raise DataError(f"{file} has the EXIF orientation {turned}; expected a label image that is stored upright")
    try:
        with Image.open(file) as image:
            if image.mode not in modes:
                raise DataError(
                    f"{file} has mode {image.mode}; expected {' or '.join(modes)}, {encoding}. "
                    "Use the original PNG files, not converted ones"
                )
            return np.array(image)
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error

"""Label images: how they are read, and how frames find them. Frames are read by `ttt_adapt.video.pictures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.errors import DataError
from ttt_adapt.video.pictures import header, picture, upright


def read_ids(file: Path) -> np.ndarray:
    """The class ids of a palette or grey image, `uint8 [H, W]`, turned upright where it has an EXIF orientation.

    Grey images of 1, 2, 4 and 16 bits hold ids as they are stored: they are not stretched to 0..255.

    Raises:
        DataError: it is another kind of image, or holds an id above 255.
    """
    with picture(file) as image:
        stored = _stored_bits(image)
        image = upright(image)
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise DataError(
                f"{file} has mode {image.mode}; expected a palette or 8-bit grayscale image of class "
                "ids: write the id of every pixel's class in the place of its colour"
            )
        ids = np.asarray(image)
    if ids.size and not 0 <= ids.min() <= ids.max() <= 255:
        raise DataError(f"{file} holds ids from {ids.min()} to {ids.max()}; expected class ids from 0 to 255")
    ids = ids.astype(np.uint8)
    return ids // (255 // (2**stored - 1)) if stored in (2, 4) else ids


def _stored_bits(image: Any) -> int | None:
    """Bits of a pixel of a grey PNG with fewer than 8, which Pillow stretches to 0..255; else None."""
    kind = image.tile[0][3] if image.mode == "L" and image.tile else None
    return {"L;2": 2, "L;4": 4}.get(kind) if isinstance(kind, str) else None


def read_rgb(file: Path) -> np.ndarray:
    """An image whose three channels together encode ids, `uint8 [H, W, 3]`.

    Raises:
        DataError: it is another kind of image.
    """
    with picture(file) as image:
        image = upright(image)
        if image.mode not in ("RGB", "RGBA"):
            raise DataError(f"{file} has mode {image.mode}; expected an RGB image whose channels hold ids")
        return np.asarray(image)[..., :3]


def read_mask(file: Path) -> np.ndarray:
    """An object mask of 0 and 255, or of one bit, as class ids 0 and 1, `uint8 [H, W]`.

    Raises:
        DataError: it holds other values than 0 and 255.
    """
    ids = read_ids(file)
    if header(file).mode == "1":
        return ids
    check_ids(ids, {0, 255}, "0 and 255 (binary=True)", file)
    return (ids == 255).astype(np.uint8)


def read_objects(file: Path) -> np.ndarray:
    """An annotation of DAVIS, 0 and 255 (2016) or ids of objects (2017), as class ids 0 and 1, `uint8 [H, W]`."""
    return (read_ids(file) != 0).astype(np.uint8)


def check_ids(ids: np.ndarray, allowed: set[int], expected: str, file: Path) -> None:
    """Raises DataError if `ids` holds an id that is not `allowed`; `expected` names those in the message."""
    wrong = sorted(set(np.bincount(ids.ravel()).nonzero()[0].tolist()) - allowed)
    if wrong:
        raise DataError(f"{file} holds label id {', '.join(map(str, wrong))}; expected {expected}")


UNLABELLED = "(pictures without labels do for --task colorization)"
"""What messages about missing labels add."""


def no_folder(path: Path) -> str:
    """What a message says of a path that should have been a folder."""
    return f"{path} {'is not a folder' if path.exists() else 'does not exist'}"


def match(
    frames: list[Path], labels: Iterable[Path], expected: Callable[[Path], Path], every_label: bool = True
) -> list[tuple[Path, Path]]:
    """The (frame, label) files of a clip, in the order of the frames.

    Args:
        frames: image files.
        labels: the label files that are there.
        expected: from a frame's file to the place of its label.
        every_label: whether a label without a frame is an error too.

    Raises:
        DataError: a frame has no label, or a label has no frame.
    """
    known, used = set(labels), set()
    for frame in frames:
        if expected(frame) not in known:
            none = "" if known & set(map(expected, frames)) else f" {UNLABELLED}"
            raise DataError(f"frame {frame} has no label; expected {expected(frame)}{none}")
        used.add(expected(frame))
    for label in sorted(known - used) if every_label else ():
        raise DataError(
            f"label {label} has no frame in {frames[0].parent if frames else 'its clip'}; remove it, or add the frame"
        )
    return [(frame, expected(frame)) for frame in frames]

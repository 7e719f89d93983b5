"""Pictures of every kind as 8-bit RGB. Streams, clips, calibration and training all read pictures here.

| picture | frame |
|---|---|
| grey, 1-bit, palette, YCbCr, LAB, HSV | the same colours as RGB |
| 16-bit grey | its upper 8 bits; said once per folder |
| RGBA, LA, a palette or one colour that is transparent | on white; said once per folder |
| CMYK | RGB, without its colour profile; said once per folder |
| with an EXIF orientation | turned upright, mirrored where the orientation says so |
| several pages, or animated | the first one, and this is said once per folder; `read_pages` reads all |
| real numbers, 32-bit integers beyond 16 bits | refused |
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_adapt.errors import DataError, TTTAdaptError, missing, warn

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of pictures without colour."""
_COLOUR_MODES = ("P", "RGB", "RGBA", "RGBX", "RGBa", "PA", "CMYK", "YCbCr", "LAB", "HSV")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa")
_ORIENTATION = 0x0112
"""The EXIF tag that says how the stored picture lies."""
_WHITE = (255, 255, 255, 255)


class Header(NamedTuple):
    """What a picture's file says of it, without its pixels.

    Attributes:
        mode: Pillow's name of the kind of pixels.
        size: (H, W) of the upright picture.
        orientation: EXIF's number of how it is stored, 1 (upright) to 8.
        pages: how many pictures the file holds.
        seconds: how long the first one is shown; None where the file does not say.
    """

    mode: str
    size: tuple[int, int]
    orientation: int
    pages: int = 1
    seconds: float | None = None


def pillow(extra: str = "video") -> Any:
    """The module `PIL.Image`; `extra` is what the message tells the user to install.

    Raises:
        MissingPackageError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("pillow", extra) from error
    return Image


def read_picture(file: Path) -> np.ndarray:
    """A picture as it is meant to be seen, `uint8 [H, W, 3]` RGB; of several pages the first.

    Raises:
        DataError: the file is missing, broken, too large or no picture, or `rgb8` refuses it; the message names it.
    """
    with picture(file) as image:
        if getattr(image, "is_animated", False):
            _say_once(file, "holds several pictures: the first is used")
        return rgb8(image, file)


def decode_picture(data: bytes, kinds: Sequence[str], pixels: int) -> np.ndarray:
    """A picture that came as bytes, as `read_picture` gives one of a file.

    Args:
        data: all of it.
        kinds: Pillow's names of the formats that are taken, such as "JPEG".
        pixels: how many it has at most; this is checked before they are decoded.

    Raises:
        DataError: it is broken, of another kind, too large, or `rgb8` refuses it.
    """
    what, library = Path("the picture"), pillow()
    try:
        with library.open(io.BytesIO(data), formats=kinds) as image:
            if image.width * image.height > pixels:
                raise DataError(
                    f"the picture has {image.height} x {image.width} pixels; expected {pixels} at most: make it smaller"
                )
            return rgb8(image, what)
    except TTTAdaptError:
        raise
    except Exception as error:  # broken pictures make decoders raise whatever they stumble over
        other = type(error).__name__ == "UnidentifiedImageError"
        reason = "it is something else" if other else str(error) or type(error).__name__
        raise DataError(f"the picture cannot be read as {' or '.join(kinds)}: {reason}") from error


def read_pages(file: Path) -> Iterator[np.ndarray]:
    """Every page of a picture, one after the other, as `read_picture` gives the first.

    Raises:
        DataError: as for `read_picture`. Pages before a broken one are yielded.
    """
    with picture(file) as image:
        for page in count():
            try:
                image.seek(page)
            except EOFError:  # how Pillow says that there are no more
                return
            yield rgb8(image, file)


def header(file: Path) -> Header:
    """Kind and size of a picture, read without decoding it.

    Raises:
        DataError: the file is missing or no picture.
    """
    with picture(file) as image:
        turn, mode, pages = orientation(image), image.mode, getattr(image, "n_frames", 1)
        if turn > 4 and image.format == "TIFF":  # some versions of Pillow swap the sides of TIFF by themselves
            image.load()
            sides = (image.width, image.height) if orientation(image) > 4 else (image.height, image.width)
        else:
            sides = (image.width, image.height) if turn > 4 else (image.height, image.width)
        if pages > 1 and image.format in ("WEBP", "AVIF"):  # these say how long a picture is shown once it is decoded
            image.load()
        shown = image.info.get("duration")
        return Header(mode, sides, turn, pages, shown / 1000 if shown else None)


@contextmanager
def picture(file: Path) -> Iterator[Any]:
    """The open PIL image of a file. Whatever goes wrong in the block is the file's fault.

    Raises:
        DataError: the file cannot be opened, or the block fails.
    """
    library = pillow()
    try:
        with library.open(file) as image:
            yield image
    except TTTAdaptError:
        raise
    except Exception as error:  # broken files make decoders raise whatever they stumble over
        raise DataError(f"{file} cannot be read as a picture: {_reason(file, error)}") from error


def _reason(file: Path, error: Exception) -> str:
    if not file.exists():
        return "it does not exist"
    if file.is_dir():
        return "it is a folder"
    if not file.stat().st_size:
        return "it is empty (0 bytes)"
    if type(error).__name__ == "DecompressionBombError":
        return f"it is too large ({error}); expected a picture of a camera: make it smaller, or cut it into tiles"
    if type(error).__name__ == "UnidentifiedImageError":
        newer = " (AVIF needs pillow 11.3 or newer)" if file.suffix.lower() == ".avif" else ""
        return f"its contents are of no kind that Pillow knows{newer}; convert it to PNG"
    return f"{error or type(error).__name__}; is the copy complete?"


def orientation(image: Any) -> int:
    """EXIF's number of how a picture is stored, 1 (upright) to 8; 1 too where its EXIF data cannot be read."""
    try:
        number = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data do not break the pixels
        return 1
    return number if number in range(1, 9) else 1


def upright(image: Any) -> Any:
    """A PIL image, turned and mirrored as its EXIF orientation says."""
    image.load()  # a TIFF may be turned here, and has no orientation any more
    number = orientation(image)
    if number == 1:
        return image
    turn = pillow().Transpose
    turns = (
        turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_270,
        turn.TRANSVERSE, turn.ROTATE_90,
    )  # fmt: skip
    return image.transpose(turns[number - 2])


def rgb8(image: Any, file: Path) -> np.ndarray:
    """A PIL image as it is meant to be seen, `uint8 [H, W, 3]` RGB: upright, and on white where it is transparent.

    Args:
        image: of any kind in the table above.
        file: where it is from, for messages.

    Raises:
        DataError: the picture holds real numbers, or its kind does not say which values are black and white.
    """
    image = upright(image)
    if image.mode.startswith("I"):  # `convert` would clip it at 255
        return _upper_bits(image, file)
    if image.mode not in (*GREY_MODES, *_COLOUR_MODES):
        raise DataError(f"{file} has mode {image.mode}; expected a picture of 8 or 16 bits: convert it first")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _on_white(image, file)
    if image.mode == "CMYK":
        _say_once(file, "has colours for print (CMYK): they become RGB without a colour profile")
    return np.array(image.convert("RGB"))


def _upper_bits(image: Any, file: Path) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise DataError(
            f"{file} holds values from {values.min()} to {values.max()}; expected 16-bit grey, 0 to 65535: scale it"
        )
    _say_once(file, "is 16-bit grey: its upper 8 bits are used")
    grey = (values >> 8).astype(np.uint8)
    if (hidden := image.info.get("transparency")) is not None:
        grey[values == hidden] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _on_white(image: Any, file: Path) -> np.ndarray:
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return np.array(image.convert("RGB"))
    _say_once(file, "has transparent pixels: they are shown on white")
    library = pillow()
    return np.array(library.alpha_composite(library.new("RGBA", image.size, _WHITE), image).convert("RGB"))


_SAID: set[tuple[Path, str]] = set()
"""The remarks that were made, each with the folder of the pictures."""


def _say_once(file: Path, what: str) -> None:
    """Warn of what was done to a picture, unless the same was said of another one in its folder."""
    if (file.parent, what) not in _SAID:
        _SAID.add((file.parent, what))
        warn(f"{file} {what}")

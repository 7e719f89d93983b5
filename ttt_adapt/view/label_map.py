"""Label maps as PNG files of class ids: other programs read them as they are, and viewers show the classes' colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ttt_adapt.errors import ConfigError, missing

LARGEST_PALETTE = 256


def write_label_map(path: Path | BinaryIO, labels: np.ndarray, palette: np.ndarray | Sequence[Sequence[int]]) -> None:
    """Write class ids without loss: as a palette PNG, or as 16-bit grey where there are more than 256 classes.

    Args:
        path: the file to write, by its name or open; a PNG whatever its suffix is.
        labels: class ids, integers [H, W] from 0.
        palette: RGB colours of the classes, [n, 3] in 0 to 255.

    Raises:
        ConfigError: the palette is no list of colours.
        OSError: the file cannot be written.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("pillow", "video") from error
    colours = np.asarray(palette, dtype=np.uint8)
    if colours.ndim != 2 or colours.shape[1] != 3:
        raise ConfigError(f"palette has shape {list(colours.shape)}; expected [classes, 3]")
    if len(colours) > LARGEST_PALETTE:
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels.astype(np.uint8), mode="P")
        image.putpalette(np.pad(colours, ((0, LARGEST_PALETTE - len(colours)), (0, 0))).tobytes())  # 8 bits a pixel
    image.save(path, format="png")

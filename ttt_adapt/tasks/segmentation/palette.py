"""The colours that a data set gives its classes: in `index.json`, in COCO's JSON, or in palettes of label images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.data.clip import Clip
from ttt_adapt.data.index import Palette, read_index
from ttt_adapt.data.labelled import ImageClip, LabelledClip


def find_palette(data: str | Path, clips: Sequence[Clip]) -> Palette:
    """One colour for each class of labelled clips; () where the data set says none.

    The `palette` of `index.json` comes first, then the colours of COCO's categories, each if it has as many classes as
    the clips, and then the palette of the first label image. The latter counts if its ids are the class ids, and if it
    tells the classes apart: a label image of greys has no colours.

    Args:
        data: the folder that the clips were opened from.
        clips: opened clips, all with the same classes.

    Raises:
        DataError: `index.json` cannot be read, or its `palette` is no list of one colour for each class.
    """
    first = clips[0]
    index = first.index if isinstance(first, LabelledClip) else read_index(Path(data))
    palette = () if index is None else index.palette()
    listed = first.palette if isinstance(first, ImageClip) else ()
    found = (colours for colours in (palette, listed) if colours and len(colours) == len(first.classes))
    return next(found, None) or _of_image(first, len(first.classes))


def _of_image(clip: Clip, count: int) -> Palette:
    """The palette of a clip's first label image; () where it says nothing about the classes."""
    if len(clip.files) < 2 or clip.files[1].suffix.lower() != ".png":
        return ()
    from PIL import Image

    image: Any = Image.open(clip.files[1])
    if image.mode != "P":
        return ()
    levels = image.getpalette() or []
    colours = np.array(levels[: 3 * count], dtype=np.uint8).reshape(-1, 3)
    grey = (colours == colours[:, :1]).all()
    if len(colours) < count or grey or len(np.unique(colours, axis=0)) < count:
        return ()
    if clip.size is not None:
        image = image.resize(clip.size[::-1], Image.Resampling.NEAREST)
    if not np.array_equal(np.asarray(image), clip[0][1]):  # the ids of the image are not those of the classes
        return ()
    return tuple((int(red), int(green), int(blue)) for red, green, blue in colours)

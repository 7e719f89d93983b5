"""The colours that a data set gives its classes: in its `index.json`, or in the palettes of its label images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.data.clip import Clip
from ttt_adapt.errors import DataError

Palette = tuple[tuple[int, int, int], ...]


def find_palette(data: str | Path, clips: Sequence[Clip]) -> Palette:
    """One colour for each class of labelled clips; () where the data set says none.

    The `palette` of `index.json` comes first, then the palette of the first label image. The latter counts if its ids
    are the class ids, and if it tells the classes apart: a label image of greys has no colours.

    Args:
        data: the folder that the clips were opened from.
        clips: opened clips, all with the same classes.

    Raises:
        DataError: the `palette` of `index.json` is no list of one colour for each class.
    """
    classes = clips[0].classes
    for folder in (Path(data), Path(data).parent):
        index = _read(folder / "index.json")
        if "palette" in index and len(index.get("classes", ())) == len(classes):
            return _of_index(index["palette"], classes, folder / "index.json")
    return _of_image(clips[0], len(classes))


def _read(file: Path) -> dict[str, Any]:
    """An index; {} where there is none. The clips were opened with it, so it can be read."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _of_index(given: Any, classes: Sequence[str], file: Path) -> Palette:
    """The palette as an index has it: a list of colours, or colours by class name."""
    expected = f"expected one colour [red, green, blue] from 0 to 255 for each of the {len(classes)} classes"
    if isinstance(given, dict):
        if missing := [name for name in classes if name not in given]:
            raise DataError(f"the palette in {file} has no colour for {', '.join(missing)}; {expected}")
        given = [given[name] for name in classes]
    if not isinstance(given, list) or len(given) != len(classes) or not all(map(_is_colour, given)):
        raise DataError(f"the palette in {file} is {str(given)[:80]}; {expected}")
    return tuple((colour[0], colour[1], colour[2]) for colour in given)


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(level) is int and 0 <= level <= 255 for level in value)
    )


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

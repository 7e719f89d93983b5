"""COCO's JSON formats as semantic labels.

- `panoptic.json` (or one file per video, `annotations/CLIP.json` or `annotations/SPLIT/CLIP.json`) lists segments. The
  id of a segment is R + 256 G + 65536 B of its pixels in the label images. Those lie in `panoptic/`,
  `panoptic_images/CLIP/` or a folder with the name of the JSON.
- `instances.json` holds masks as polygons or run lengths. Larger masks are drawn first, smaller ones over them.

Frames lie in `images/` or `raw_images/`; where there are several videos, each has its folder. The classes are the
categories of the JSON in their order, without category 255. Pixels of no segment, of category 255 and of unknown
categories are void. Categories may have a `color`, [red, green, blue] as in COCO's panoptic files, or "#rrggbb".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.data.classes import class_names
from ttt_adapt.data.clip import Clip
from ttt_adapt.data.coco_masks import draw_mask
from ttt_adapt.data.images import read_rgb
from ttt_adapt.data.index import Palette, is_colour
from ttt_adapt.data.labelled import ImageClip
from ttt_adapt.errors import DataError
from ttt_adapt.files import natural_key
from ttt_adapt.video.pictures import header

VOID = 255
_FRAMES = ("raw_images", "images")
_LABELS = ("panoptic_images", "panoptic")
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "images": {"id": (int, str), "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"image_id": (int, str)},
}
"""The lists of a file, and what every entry must have."""


def is_coco(root: Path) -> bool:
    """Whether a folder looks like a data set of this format."""
    return any((root / name).is_dir() for name in _FRAMES) and bool(_annotations(root))


def find_coco(
    root: Path, size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool
) -> dict[str, Callable[[], Clip]]:
    """How to open every clip of the data set, by name of the clip.

    Raises:
        DataError: there are no annotations.
    """
    files = _annotations(root)
    if not files:
        raise DataError(f"{root} holds no COCO annotations; expected panoptic.json, instances.json or annotations/")

    def opener(name: str, file: Path) -> Callable[[], Clip]:
        return lambda: _open(name, root, file, size, classes)

    openers: dict[str, Callable[[], Clip]] = {}
    for file in files:
        name = root.name if file.parent == root else file.stem
        name = f"{file.parent.name}-{name}" if name in openers else name
        openers[name] = opener(name, file)
    return openers


def _annotations(root: Path) -> list[Path]:
    single = [root / name for name in ("panoptic.json", "instances.json") if (root / name).is_file()]
    below = (root / "annotations").rglob("*.json") if (root / "annotations").is_dir() else ()
    return single[:1] or sorted(below, key=lambda file: natural_key(file.stem))


def _open(name: str, root: Path, file: Path, size: tuple[int, int] | None, classes: Sequence[str] | None) -> Clip:
    data = _read(file)
    images = sorted(data["images"], key=lambda image: natural_key(Path(image["file_name"]).stem))
    if not images:
        raise DataError(f"{file} lists no images; expected the frames of a clip")
    categories = [category for category in data["categories"] if category["id"] != VOID]
    names = class_names([category["name"] for category in categories], str(file))
    ids = {category["id"]: place for place, category in enumerate(categories)}
    frames = [_locate(root, _FRAMES, file, image["file_name"]) for image in images]
    if any("segments_info" in entry for entry in data["annotations"]):
        labels, read = _panoptic(root, file, data, images, ids)
    else:
        labels, read = frames, _instances(file, data, images, frames, ids)
    pairs = list(zip(frames, labels, strict=True))
    palette = _palette(file, categories)
    return ImageClip(name, pairs, read, classes=classes or names, size=size, sources=[file], palette=palette)


def _palette(file: Path, categories: Sequence[dict[str, Any]]) -> Palette:
    """The colours of the categories; () unless each has one.

    Raises:
        DataError: what a category has is no colour.
    """
    given = [category.get("color") for category in categories]
    colours = [
        _colour(file, category, colour)
        for category, colour in zip(categories, given, strict=True)
        if colour is not None
    ]
    return tuple(colours) if len(colours) == len(categories) else ()


def _colour(file: Path, category: dict[str, Any], given: Any) -> tuple[int, int, int]:
    if isinstance(given, str) and re.fullmatch("#[0-9a-fA-F]{6}", given):
        given = list(bytes.fromhex(given[1:]))
    if not is_colour(given):
        raise DataError(
            f"{file} gives category {category['name']!r} the color {str(given)[:60]!r}; expected [red, green, blue] "
            "from 0 to 255, or '#rrggbb': mend it, or leave it out"
        )
    return given[0], given[1], given[2]


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The images, categories and annotations of a file, each checked for what every entry must have.

    Raises:
        DataError: the file is no JSON, a part is missing or of another kind, or an id or a file comes twice.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_coco(file, f"{type(error).__name__}: {error}") from error
    if not isinstance(data, dict):
        raise _no_coco(file, f"it holds a {type(data).__name__}")
    for part, fields in _PARTS.items():
        _check_entries(file, part, data.get(part), fields)
    for part, key in (("images", "id"), ("images", "file_name"), ("categories", "id")):
        value, times = next(iter(Counter(entry[key] for entry in data[part]).most_common(1)), (None, 0))
        if times > 1:
            raise _no_coco(file, f"{part} has the {key} {value!r} {times} times")
    return data


def _check_entries(file: Path, part: str, entries: Any, fields: Mapping[str, Any]) -> None:
    """Raises DataError where `entries` is no list of objects with these fields."""
    if not isinstance(entries, list):
        raise _no_coco(file, f"{part} is {'missing' if entries is None else 'no list'}")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise _no_coco(file, f"{part}[{place}] is no object")
        for field, kind in fields.items():
            value = entry.get(field)
            if not isinstance(value, kind) or isinstance(value, bool) or value == "":
                raise _no_coco(file, f"{part}[{place}] has the {field} {str(value)[:60]!r}")


def _no_coco(file: Path, why: str) -> DataError:
    return DataError(
        f"{file} is no COCO annotation ({why}); expected images, categories, and annotations with segments_info or "
        "segmentation"
    )


def _locate(root: Path, kinds: Sequence[str], file: Path, name: str) -> Path:
    """Where a file that the JSON names lies: in one of the folders, directly or in the folder of its video."""
    places = [root / kind / inner for kind in kinds for inner in (name, f"{file.stem}/{Path(name).name}")]
    for place in places:
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):  # a name that no file can have
            continue
    raise DataError(
        f"{file} names the file {name[:200]}, and it is missing; expected "
        f"{' or '.join(str(place)[:300] for place in places)}"
    )


def _panoptic(
    root: Path, file: Path, data: dict[str, Any], images: list[dict[str, Any]], ids: dict[int, int]
) -> tuple[list[Path], Callable[[Path], np.ndarray]]:
    """The label images in the order of `images`, and how to read one."""
    by_image = {entry["image_id"]: entry for entry in data["annotations"]}
    labels: list[Path] = []
    segments: dict[Path, dict[int, int]] = {}
    for image in images:
        entry = by_image.get(image["id"])
        if entry is None:
            raise DataError(f"frame {image['file_name']} has no annotation in {file}; expected one for every frame")
        _check_entries(file, f"annotation of image {image['id']}", [entry], {"file_name": str, "segments_info": list})
        part = f"segments_info of image {image['id']}"
        _check_entries(file, part, entry["segments_info"], {"id": int, "category_id": int})
        label = _locate(root, (*_LABELS, file.stem), file, entry["file_name"])
        if label in segments:
            raise _no_coco(file, f"two images have the label {entry['file_name']}")
        labels.append(label)
        segments[label] = {s["id"]: ids.get(s["category_id"], VOID) for s in entry["segments_info"]}

    def read(label: Path) -> np.ndarray:
        codes = read_rgb(label).astype(np.int64) @ np.array([1, 256, 65536])
        values, places = np.unique(codes, return_inverse=True)
        table = np.array([segments[label].get(int(value), VOID) for value in values], dtype=np.uint8)
        return table[places].reshape(codes.shape)

    return labels, read


def _instances(
    file: Path, data: dict[str, Any], images: list[dict[str, Any]], frames: list[Path], ids: dict[int, int]
) -> Callable[[Path], np.ndarray]:
    """How to draw the labels of a frame from its instances."""
    _check_entries(file, "images", images, {"height": int, "width": int})
    _check_entries(file, "annotations", data["annotations"], {"category_id": int, "segmentation": (list, dict)})
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for place, entry in enumerate(data["annotations"]):
        if entry["image_id"] not in by_image:
            raise _no_coco(file, f"annotations[{place}] is of image {entry['image_id']!r}, which is not listed")
        by_image[entry["image_id"]].append(entry)
    known = dict(zip(frames, images, strict=True))

    def read(frame: Path) -> np.ndarray:
        image = known[frame]
        size = (image["height"], image["width"])
        if size != header(frame).size:
            raise DataError(
                f"{frame} is {' x '.join(map(str, header(frame).size))} pixels high and wide, and {file} says "
                f"{' x '.join(map(str, size))}; labels must have their frame's size"
            )
        canvas = np.full(size, VOID, dtype=np.uint8)
        for entry in _largest_first(by_image[image["id"]]):
            try:
                mask = draw_mask(entry["segmentation"], *size)
            except DataError as error:
                raise DataError(f"{file}: annotation {entry.get('id')} of {frame.name}: {error}") from error
            canvas[mask] = ids.get(entry["category_id"], VOID)
        return canvas

    return read


def _largest_first(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Instances in the order in which they are drawn; those without an area come last."""

    def area(entry: dict[str, Any]) -> float:
        given = entry.get("area", 0)
        return float(given) if isinstance(given, (int, float)) and given == given else 0.0

    return iter(sorted(entries, key=area, reverse=True))

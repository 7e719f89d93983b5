"""COCO's JSON formats as semantic labels.

- `panoptic.json` (or one file per video, `annotations/CLIP.json` or `annotations/SPLIT/CLIP.json`) lists segments. The
  id of a segment is R + 256 G + 65536 B of its pixels in the label images. Those lie in `panoptic/`,
  `panoptic_images/CLIP/` or a folder with the name of the JSON.
- `instances.json` holds masks as polygons or run lengths. Larger masks are drawn first, smaller ones over them.

Frames lie in `images/` or `raw_images/`; where there are several videos, each has its folder. The classes are the
categories of the JSON in their order, without category 255. Pixels of no segment, of category 255 and of unknown
categories are void.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.data.clip import Clip
from ttt_adapt.data.images import read_rgb
from ttt_adapt.data.labelled import ImageClip
from ttt_adapt.errors import DataError, missing
from ttt_adapt.files import natural_key

VOID = 255
_FRAMES = ("raw_images", "images")
_LABELS = ("panoptic_images", "panoptic")


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
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        images = sorted(data["images"], key=lambda image: natural_key(Path(image["file_name"]).stem))
        categories = [category for category in data["categories"] if category["id"] != VOID]
        ids = {category["id"]: place for place, category in enumerate(categories)}
        names = [category["name"] for category in categories]
        panoptic = bool(data["annotations"]) and "segments_info" in data["annotations"][0]
        frames = [_locate(root, _FRAMES, file.stem, image["file_name"]) for image in images]
        if panoptic:
            labels, read = _panoptic(root, file, data, images, ids)
        else:
            labels, read = frames, _instances(data, images, frames, ids)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} is no COCO annotation ({type(error).__name__}: {error}); expected images, categories, and "
            "annotations with segments_info or segmentation"
        ) from error
    if not images:
        raise DataError(f"{file} lists no images; expected the frames of a clip")
    pairs = list(zip(frames, labels, strict=True))
    return ImageClip(name, pairs, read, classes=classes or names, size=size, sources=[file])


def _locate(root: Path, kinds: Sequence[str], video: str, name: str) -> Path:
    """Where a file that the JSON names lies: in one of the folders, directly or in the folder of its video."""
    places = [root / kind / inner for kind in kinds for inner in (name, f"{video}/{Path(name).name}")]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"{video}.json names the file {name}, and it is missing; expected {' or '.join(str(place) for place in places)}"
    )


def _panoptic(
    root: Path, file: Path, data: dict[str, Any], images: list[dict[str, Any]], ids: dict[int, int]
) -> tuple[list[Path], Callable[[Path], np.ndarray]]:
    """The label images in the order of `images`, and how to read one."""
    by_image = {entry["image_id"]: entry for entry in data["annotations"]}
    labels, segments = [], {}
    for image in images:
        entry = by_image.get(image["id"])
        if entry is None:
            raise DataError(f"frame {image['file_name']} has no annotation in {file}; expected one for every frame")
        label = _locate(root, (*_LABELS, file.stem), file.stem, entry["file_name"])
        labels.append(label)
        segments[label] = {s["id"]: ids.get(s["category_id"], VOID) for s in entry["segments_info"]}

    def read(label: Path) -> np.ndarray:
        codes = read_rgb(label).astype(np.int64) @ np.array([1, 256, 65536])
        values, places = np.unique(codes, return_inverse=True)
        table = np.array([segments[label].get(int(value), VOID) for value in values], dtype=np.uint8)
        return table[places].reshape(codes.shape)

    return labels, read


def _instances(
    data: dict[str, Any], images: list[dict[str, Any]], frames: list[Path], ids: dict[int, int]
) -> Callable[[Path], np.ndarray]:
    """How to draw the labels of a frame from its instances."""
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for entry in data["annotations"]:
        by_image[entry["image_id"]].append(entry)
    known = dict(zip(frames, images, strict=True))

    def read(frame: Path) -> np.ndarray:
        image = known[frame]
        canvas = np.full((image["height"], image["width"]), VOID, dtype=np.uint8)
        for entry in sorted(by_image[image["id"]], key=lambda entry: -entry.get("area", 0)):
            canvas[draw_mask(entry["segmentation"], *canvas.shape)] = ids.get(entry["category_id"], VOID)
        return canvas

    return read


def draw_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as `bool [height, width]`, drawn by pycocotools.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or {"size": [height, width], "counts": run lengths}. Runs go
            down the columns and begin with zeros; they are numbers, or in COCO's text coding.
        height: of the frame, in pixels.
        width: of the frame, in pixels.

    Raises:
        DataError: the run lengths are of another size than the frame.
        MissingPackageError: pycocotools is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise missing("pycocotools", "eval") from error
    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width))).astype(bool)
    counts = segmentation["counts"]
    covered = height * width if isinstance(counts, str) else sum(counts)
    if list(segmentation["size"]) != [height, width] or covered != height * width:
        raise DataError(f"a mask of {segmentation['size']} covers {covered} pixels; expected {[height, width]}")
    runs = segmentation if isinstance(counts, str) else mask.frPyObjects(segmentation, height, width)
    return mask.decode(runs).astype(bool)

"""Checks a downloaded data set: what is missing or wrong, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets import camvid, coco_videos, kitti_step
from ttt_adapt_openmmlab.datasets.clips import Clip, listed, subfolders
from ttt_adapt_openmmlab.datasets.coco_videos import LABELS, THING_IDS
from ttt_adapt_openmmlab.datasets.label_images import (
    VOID,
    check_ids,
    read_colour,
    read_labels,
    read_segment_ids,
    segment_ids,
)
from ttt_adapt_openmmlab.datasets.transforms import kitti_segments

CITYSCAPES_LAYOUT = (
    "leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png and gtFine/{train,val}/CITY/NAME_gtFine_labelTrainIds.png"
)
COCO_LAYOUT = (
    "{train,val}2017/*.jpg, annotations/{instances,panoptic}_{train,val}2017.json and "
    "annotations/panoptic_{train,val}2017/*.png; or images/*.jpg, instances.json, panoptic.json and panoptic/*.png"
)


def check_tree(kind: str, root: str | Path) -> list[str]:
    """The problems of a data set on disk; every label image is read.

    Nothing on disk says how long a sequence of KITTI-STEP or how large a city of Cityscapes was: what is missing at the
    end, images and labels both, is not noticed. CamVid's index and COCO's JSON files name all of their frames.

    Args:
        kind: camvid, kitti-step, coco-videos, cityscapes or coco.
        root: the folder that a config names as `data_root`.

    Returns:
        A sentence for every problem, with counts and file names; empty if none was found.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in _KINDS:
        raise ConfigError(f"no data set {kind!r}; expected one of {', '.join(_KINDS)}")
    layout, find = _KINDS[kind]
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is no folder; expected {layout}"]
    problems: list[str] = []
    try:
        problems.extend(find(root))  # keeps the problems that were found before an error
    except DataError as error:
        problems.append(f"{error} (layout: {layout})")
    return problems


def _camvid(root: Path) -> Iterator[str]:
    clips = camvid.camvid_clips(root)
    if not clips:
        yield f"{root / 'index.json'} lists no clip; expected {camvid.LAYOUT}"
    for clip in clips.values():
        yield from _clip_problems(clip, lambda file: read_labels(file, len(camvid.CLASSES)))


def _kitti_step(root: Path) -> Iterator[str]:
    for split, sequences in (("val", kitti_step.PAPER_VAL), ("train", kitti_step.PAPER_TEST)):
        clips = kitti_step.kitti_clips(root, split)
        missing = [name for name in sequences if name not in clips]
        if missing:
            yield (
                f"{len(missing)} of the {len(sequences)} sequences of {root / 'images' / split} are missing: "
                f"{', '.join(missing)}; the paper's {'test' if split == 'train' else 'validation'} set is all of them"
            )
        for clip in clips.values():
            yield from _clip_problems(clip, _read_kitti)


def _coco_videos(root: Path) -> Iterator[str]:
    found = False
    for split in ("train", "val"):
        if not (root / "annotations" / split).is_dir():
            continue
        for clip in coco_videos.coco_clips(root, split).values():
            found = True
            yield from _coco_video(root, split, clip)
    if not found:
        yield f"{root / 'annotations'} holds no VIDEO.json in train or val; expected {coco_videos.LAYOUT}"


def _coco_video(root: Path, split: str, clip: Clip) -> Iterator[str]:
    file = coco_videos.annotation_file(root, split, clip.name)
    problems = list(clip.problems())
    yield from problems
    if not clip.frames:
        return
    wrong = list(coco_videos.annotation_problems(file, clip))
    yield from wrong
    if problems or wrong:
        return
    segments = coco_videos.read_annotations(file)
    pairs = [(label, segments[number]) for number, label in enumerate(clip.labels, start=1)]
    yield from _segment_problems(f"video {clip.name}", file, pairs)
    bare = sum(
        1
        for items in segments.values()
        for item in items
        if item["category_id"] in (*THING_IDS, VOID) and not item.get("segmentation")
    )
    if bare:
        yield f"{file} has {bare} thing segments without segmentation; instance segmentation needs it"


def _cityscapes(root: Path) -> Iterator[str]:
    for split in ("train", "val"):
        images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
        cities = subfolders(images)
        if not cities:
            yield f"{images} holds no city; expected {CITYSCAPES_LAYOUT}"
        for city in cities:
            frames = tuple(sorted(city.glob("*_leftImg8bit.png")))
            stems = [frame.name.removesuffix("_leftImg8bit.png") for frame in frames]
            targets = tuple(labels / city.name / f"{stem}_gtFine_labelTrainIds.png" for stem in stems)
            raw = [target for target in targets if not target.is_file()]
            if raw and all(Path(str(target).replace("TrainIds", "Ids")).is_file() for target in raw):
                yield (
                    f"{labels / city.name} lacks {len(raw)} labelTrainIds files: {listed(raw)}; make them with "
                    "csCreateTrainIdLabelImgs of the package cityscapesscripts"
                )
                continue
            clip = Clip(f"{split}/{city.name}", frames, targets, ("L",), "Cityscapes train ids", same_size=False)
            yield from _clip_problems(clip, lambda file: read_labels(file, len(kitti_step.CLASSES)))


def _coco(root: Path) -> Iterator[str]:
    if (root / "images").is_dir():
        sets = [(root / "images", root / "instances.json", root / "panoptic.json", root / "panoptic")]
    else:
        notes = root / "annotations"
        sets = [
            (root / name, notes / f"instances_{name}.json", notes / f"panoptic_{name}.json", notes / f"panoptic_{name}")
            for name in ("train2017", "val2017")
        ]
    for images, instances, panoptic, maps in sets:
        if not images.is_dir():
            yield f"{images} is missing; expected {COCO_LAYOUT}"
            continue
        yield from _coco_images(images, instances, "instance")
        yield from _coco_images(images, panoptic, "panoptic")
        yield from _coco_panoptic(panoptic, maps)


def _coco_images(images: Path, file: Path, kind: str) -> Iterator[str]:
    data = _json(file, kind)
    if isinstance(data, str):
        yield data
        return
    files = [images / item["file_name"] for item in data["images"]]
    missing = [path for path in files if not path.is_file()]
    if not files:
        yield f"{file} lists no image; expected COCO's annotations"
    if missing:
        lack = f"{len(missing)} of the {len(files)} images of {file.name}"
        yield f"{images} lacks {lack}: {listed(missing)}; get them again"
    known = LABELS if kind == "panoptic" else THING_IDS
    unknown = sorted({item["id"] for item in data["categories"]} - set(known))
    if unknown:
        yield f"{file} has category {', '.join(map(str, unknown[:5]))}; expected COCO's ids"


def _coco_panoptic(file: Path, maps: Path) -> Iterator[str]:
    data = _json(file, "panoptic")
    if isinstance(data, str):  # _coco_images has said what is wrong
        return
    pairs = [(maps / item["file_name"], item["segments_info"]) for item in data["annotations"]]
    missing = [path for path, _ in pairs if not path.is_file()]
    if missing:
        yield f"{maps} lacks {len(missing)} of {len(pairs)} panoptic images: {listed(missing)}; get them again"
    yield from _segment_problems(str(maps), file, [pair for pair in pairs if pair[0].is_file()])


def _segment_problems(where: str, file: Path, pairs: list[tuple[Path, list[dict]]]) -> Iterator[str]:
    """Panoptic images that cannot be read, that lack a listed segment, or that have a segment which is not listed."""
    wrong = []
    for label, segments in pairs:
        try:
            painted = set(np.unique(read_segment_ids(label)).tolist())
        except DataError as error:
            wrong.append(str(error))
            continue
        listed_ids = {int(item["id"]) for item in segments}
        if listed_ids - painted:
            wrong.append(f"{label} has no pixel of segment {min(listed_ids - painted)}")
        if painted - listed_ids - {0}:
            wrong.append(f"{label} has pixels of segment {min(painted - listed_ids - {0})}, which is not listed")
    if wrong:
        yield (
            f"{where} has {len(wrong)} panoptic images that do not fit {file}, such as: {wrong[0]}; "
            "use the images and the JSON of one release"
        )


def _clip_problems(clip: Clip, read: Callable[[Path], Any]) -> Iterator[str]:
    """The problems of a clip, and if there is none those of its pixels."""
    problems = list(clip.problems())
    yield from problems
    if problems:
        return
    wrong = []
    for label in clip.labels:
        try:
            read(label)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        yield f"video {clip.name} has {len(wrong)} of {len(clip.labels)} labels with wrong content: {wrong[0]}"


def _read_kitti(file: Path) -> None:
    colour = read_colour(file)
    check_ids(colour[..., 0], len(kitti_step.CLASSES), file)
    kitti_segments(segment_ids(colour), str(file))


_NOTES = {
    "instance": ("image_id", "category_id", "bbox", "segmentation"),
    "panoptic": ("image_id", "file_name", "segments_info"),
}


def _json(file: Path, kind: str) -> dict | str:
    """COCO's JSON, or what is wrong with it."""
    if not file.is_file():
        return f"{file} is missing; expected {COCO_LAYOUT}"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{file} is not JSON ({error}); get it again"
    lacking = [key for key in ("images", "annotations", "categories") if key not in data]
    if lacking:
        return f"{file} lacks {', '.join(lacking)}; expected COCO's annotations"
    bare = [key for key in _NOTES[kind] if any(key not in note for note in data["annotations"])]
    if bare:
        return (
            f"{file} has annotations without {', '.join(bare)}; expected COCO's {kind} annotations: put the {kind} "
            "file of the release there"
        )
    return data


_KINDS: dict[str, tuple[str, Callable[[Path], Iterator[str]]]] = {
    "camvid": (camvid.LAYOUT, _camvid),
    "kitti-step": (kitti_step.LAYOUT, _kitti_step),
    "coco-videos": (coco_videos.LAYOUT, _coco_videos),
    "cityscapes": (CITYSCAPES_LAYOUT, _cityscapes),
    "coco": (COCO_LAYOUT, _coco),
}

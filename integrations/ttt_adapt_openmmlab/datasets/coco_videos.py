"""COCO Videos: ten dense videos with COCO's panoptic categories."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt_openmmlab.datasets.clips import Clip, numbered, subfolders
from ttt_adapt_openmmlab.datasets.label_images import VOID
from ttt_adapt_openmmlab.datasets.video_dataset import VideoDataset

THING_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
STUFF_IDS = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
LABELS = {category: label for label, category in enumerate((*THING_IDS, *STUFF_IDS))}
"""The label 0..132 of every COCO panoptic category; the first 80 are things."""
LAYOUT = (
    "raw_images/VIDEO/NAME_N.png, panoptic_images/VIDEO/NAME_N.png and annotations/{train,val}/VIDEO.json (N from 1)"
)

_TASKS = ("instance", "panoptic")


@DATASETS.register_module()
class CocoVideos(VideoDataset):
    """COCO Videos for instance or panoptic segmentation, frames in the order of the number N in their names.

    Instance data infos carry `instances` with run-length masks (mmdetection's `LoadAnnotations` reads them): the 80
    thing categories only. Crowds have `ignore_flag` 1; so have ignored regions (category 255), with `bbox_label` -1.
    Panoptic data infos carry `segments_info` for `LoadPanopticSegments`; pixels of no listed segment are void.

    Args:
        data_root: the folder that holds `raw_images`, `panoptic_images` and `annotations`.
        split: "train" or "val": the folder of annotations.
        videos: names such as ["bar"]; all that the split annotates by default.
        task: "instance" or "panoptic".
        **options: as for `VideoDataset`.

    Raises:
        ConfigError: an unknown split or task.
        DataError: frames, label images or annotations are missing or inconsistent.
    """

    def __init__(
        self,
        data_root: str | Path,
        split: str = "val",
        videos: Sequence[str] | None = None,
        task: str = "instance",
        **options: Any,
    ) -> None:
        if task not in _TASKS:
            raise ConfigError(f"task is {task!r}; expected one of {', '.join(_TASKS)}")
        if split not in ("train", "val"):
            raise ConfigError(f"split is {split!r}; expected train or val")
        self.split, self.task = split, task
        self._segments: dict[str, dict[int, list[dict]]] = {}
        super().__init__(data_root, videos, metainfo=_metainfo(task), **options)

    def find_clips(self) -> dict[str, Clip]:
        """The videos that the split annotates."""
        return coco_clips(Path(self.data_root), self.split)

    def load_data_list(self) -> list[dict]:
        """The data infos of all frames."""
        infos = super().load_data_list()
        self._segments.clear()
        return infos

    def label_info(self, clip: Clip, frame: int) -> dict:
        """The instances or the segments of a frame."""
        if clip.name not in self._segments:
            file = annotation_file(Path(self.data_root), self.split, clip.name)
            for problem in annotation_problems(file, clip):
                raise DataError(problem)
            self._segments[clip.name] = read_annotations(file)
        segments = self._segments[clip.name][frame + 1]
        if self.task == "panoptic":
            return {"segments_info": [_segment(item) for item in segments if item["category_id"] != VOID]}
        file = annotation_file(Path(self.data_root), self.split, clip.name)
        wanted = [item for item in segments if item["category_id"] in (*THING_IDS, VOID)]
        return {"instances": [_instance(item, file) for item in wanted]}


def annotation_file(root: Path, split: str, video: str) -> Path:
    """Where the annotations of a video lie."""
    return root / "annotations" / split / f"{video}.json"


def coco_clips(root: Path, split: str) -> dict[str, Clip]:
    """The videos that have annotations in a split.

    Raises:
        DataError: a folder is missing.
    """
    folder = root / "annotations" / split
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; expected {LAYOUT}")
    for kind in ("raw_images", "panoptic_images"):
        subfolders(root / kind)
    return {file.stem: _clip(root, file.stem) for file in sorted(folder.glob("*.json")) if file.name[0] != "."}


def read_annotations(file: Path) -> dict[int, list[dict]]:
    """The segments of every frame of a video, by the number N of the frame.

    Raises:
        DataError: the file is not COCO's panoptic JSON, or a frame has no number or comes twice.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        entries = [(str(names[item["image_id"]]), list(item["segments_info"])) for item in data["annotations"]]
        [(segment["id"], segment["category_id"]) for _, segments in entries for segment in segments]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not COCO's panoptic JSON ({type(error).__name__}: {error}); expected images, and annotations "
            "with image_id and segments_info"
        ) from error
    found: dict[int, list[dict]] = {}
    for name, segments in entries:
        number = re.search(r"(\d+)$", Path(name).stem)
        if number is None or int(number[1]) in found:
            raise DataError(f"{file} names the frame {name}; expected NAME_N with a number N of its own")
        found[int(number[1])] = segments
    return found


def annotation_problems(file: Path, clip: Clip) -> Iterator[str]:
    """What is wrong with the annotations of a clip."""
    try:
        found = read_annotations(file)
    except DataError as error:
        yield str(error)
        return
    missing = [number for number in range(1, len(clip.frames) + 1) if number not in found]
    if missing:
        yield f"{file} annotates no frame {_numbers(missing)}, {len(missing)} of {len(clip.frames)}; get it again"
    extra = [number for number in found if not 1 <= number <= len(clip.frames)]
    if extra:
        yield f"{file} annotates frame {_numbers(extra)}; {clip.frames[0].parent} ends at {len(clip.frames)}"
    unknown = {item["category_id"] for segments in found.values() for item in segments} - {*LABELS, VOID}
    if unknown:
        yield f"{file} has category {_numbers(sorted(unknown))}; expected COCO's 133 panoptic ids or {VOID} (ignore)"


def _clip(root: Path, video: str) -> Clip:
    """A video: every number from 1 to the last that a frame or a panoptic image has."""
    folders = [root / kind / video for kind in ("raw_images", "panoptic_images")]
    frames, labels = (numbered(folder) for folder in folders)
    known = {**labels, **frames}
    stem = re.sub(r"\d+$", "", next(iter(known.values())).stem) if known else ""
    numbers = range(1, max(known, default=0) + 1)
    absent = {number: f"{stem}{number}.png" for number in numbers}
    return Clip(
        name=video,
        frames=tuple(frames.get(number, folders[0] / absent[number]) for number in numbers),
        labels=tuple(labels.get(number, folders[1] / absent[number]) for number in numbers),
        mode=("RGB",),
        encoding="segment ids as R + 256 G + 65536 B",
    )


def _segment(item: dict) -> dict:
    thing = item["category_id"] in THING_IDS
    is_thing = thing and not item.get("iscrowd", 0)  # a thing category that is no thing is a crowd, as in mmdetection
    return {"id": item["id"], "category": LABELS[item["category_id"]], "is_thing": is_thing}


def _instance(item: dict, file: Path) -> dict:
    if not item.get("segmentation") or "bbox" not in item:
        raise DataError(
            f"segment {item['id']} in {file} has no segmentation or no bbox; instance segmentation needs both. "
            "Use task='panoptic', or annotations with masks"
        )
    x, y, width, height = item["bbox"]
    void = item["category_id"] == VOID
    return {
        "bbox": [x, y, x + width, y + height],
        "bbox_label": -1 if void else LABELS[item["category_id"]],
        "ignore_flag": int(void or bool(item.get("iscrowd", 0))),
        "mask": item["segmentation"],
    }


def _metainfo(task: str) -> dict:
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    return dict((CocoDataset if task == "instance" else CocoPanopticDataset).METAINFO)


def _numbers(values: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, values[:most])) + (" ..." if len(values) > most else "")

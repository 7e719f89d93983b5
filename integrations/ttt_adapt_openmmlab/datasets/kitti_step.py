"""KITTI-STEP: driving videos with panoptic labels of the 19 Cityscapes classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmengine.registry import DATASETS

from ttt_adapt.errors import ConfigError
from ttt_adapt_openmmlab.datasets.clips import Clip, numbered, subfolders
from ttt_adapt_openmmlab.datasets.video_dataset import VideoDataset

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
PALETTE = [
    [128, 64, 128], [244, 35, 232], [70, 70, 70], [102, 102, 156], [190, 153, 153], [153, 153, 153], [250, 170, 30],
    [220, 220, 0], [107, 142, 35], [152, 251, 152], [70, 130, 180], [220, 20, 60], [255, 0, 0], [0, 0, 142],
    [0, 0, 70], [0, 60, 100], [0, 80, 100], [0, 0, 230], [119, 11, 32],
]  # fmt: skip
THINGS = (11, 13)
"""The train ids whose pixels carry instance ids: person and car."""
PANOPTIC_ORDER = (*THINGS, *(i for i in range(len(CLASSES)) if i not in THINGS))
"""Train ids in the order of panoptic labels: mmdetection's fusion head expects things before stuff."""
PAPER_VAL = ("0002", "0006", "0007", "0008", "0010", "0013", "0014", "0016", "0018")
PAPER_TEST = ("0000", "0001", "0003", "0004", "0005", "0009", "0011", "0012", "0015", "0017", "0019", "0020")
LAYOUT = "images/{train,val}/0000/000000.png and panoptic_maps/{train,val}/0000/000000.png"

_PRESETS = {"paper_val": ("val", PAPER_VAL), "paper_test": ("train", PAPER_TEST)}
_TASKS = ("semantic", "panoptic")


@DATASETS.register_module()
class KittiStep(VideoDataset):
    """KITTI-STEP sequences for semantic or panoptic segmentation; load labels with `LoadKittiStepAnnotations`.

    Semantic labels are Cityscapes train ids 0..18, in Cityscapes' order. Panoptic labels put the two thing classes
    first (person 0, car 1, then the other 17 in Cityscapes' order), as mmdetection's panoptic heads need it.

    Args:
        data_root: the folder that holds `images` and `panoptic_maps`.
        split: "train" or "val" as on disk; "paper_val" is the 9 sequences of `val`, "paper_test" the 12 of `train`,
            on which the paper reports, and insists on all of them.
        videos: sequences of that split, such as ["0002"]; all by default.
        task: "semantic" or "panoptic".
        **options: as for `VideoDataset`.

    Raises:
        ConfigError: an unknown split or task.
        DataError: sequences, frames or labels are missing, or of a wrong encoding or size.
    """

    METAINFO: ClassVar[dict] = {"classes": CLASSES, "palette": PALETTE}

    def __init__(
        self,
        data_root: str | Path,
        split: str = "val",
        videos: Sequence[str] | None = None,
        task: str = "semantic",
        **options: Any,
    ) -> None:
        if task not in _TASKS:
            raise ConfigError(f"task is {task!r}; expected one of {', '.join(_TASKS)}")
        if split not in ("train", "val", *_PRESETS):
            raise ConfigError(f"split is {split!r}; expected train, val, {' or '.join(_PRESETS)}")
        self.split, preset = _PRESETS.get(split, (split, None))
        self.task = task
        metainfo = _panoptic_metainfo() if task == "panoptic" else None
        super().__init__(data_root, preset if videos is None else videos, metainfo=metainfo, **options)

    def find_clips(self) -> dict[str, Clip]:
        """The sequences of the split."""
        return kitti_clips(Path(self.data_root), self.split)

    def label_info(self, clip: Clip, frame: int) -> dict:
        """The task, for the transform that loads the labels."""
        return {"task": self.task}


def kitti_clips(root: Path, split: str) -> dict[str, Clip]:
    """The sequences of a split that have images or labels.

    Raises:
        DataError: a folder of the split is missing.
    """
    images, maps = (subfolders(root / kind / split) for kind in ("images", "panoptic_maps"))
    return {name: _clip(root, split, name) for name in sorted({path.name for path in (*images, *maps)})}


def _clip(root: Path, split: str, name: str) -> Clip:
    """A sequence: every number from 0 to the last that a frame or a label has."""
    frames, labels = root / "images" / split / name, root / "panoptic_maps" / split / name
    count = max((*numbered(frames), *numbered(labels)), default=-1) + 1
    return Clip(
        name=name,
        frames=tuple(frames / f"{number:06d}.png" for number in range(count)),
        labels=tuple(labels / f"{number:06d}.png" for number in range(count)),
        mode=("RGB",),
        encoding="semantic id in red, instance id in green and blue",
    )


def _panoptic_metainfo() -> dict:
    return {
        "classes": tuple(CLASSES[i] for i in PANOPTIC_ORDER),
        "palette": [PALETTE[i] for i in PANOPTIC_ORDER],
        "thing_classes": tuple(CLASSES[i] for i in THINGS),
        "stuff_classes": tuple(CLASSES[i] for i in PANOPTIC_ORDER[len(THINGS) :]),
    }

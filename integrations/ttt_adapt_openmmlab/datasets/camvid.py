"""CamVid: driving clips with class labels, described by an `index.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmengine.registry import DATASETS

from ttt_adapt.errors import DataError
from ttt_adapt_openmmlab.datasets.clips import Clip
from ttt_adapt_openmmlab.datasets.label_images import read_labels
from ttt_adapt_openmmlab.datasets.video_dataset import VideoDataset

CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
PALETTE = [
    [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0], [192, 128, 128],
    [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
]  # fmt: skip
LAYOUT = "index.json beside one folder per clip, each with frames/*.jpg (or images/) and labels/*.png"


@DATASETS.register_module()
class CamVidStream(VideoDataset):
    """CamVid clips for semantic segmentation, frames in the order of `index.json`.

    Labels are palette PNG files of 11 class ids and 255 = void; load them with mmsegmentation's `LoadAnnotations`.
    Every label is read once when the data set is built, so that an id out of range is found before training.

    Args:
        data_root: the folder that holds `index.json`.
        clips: names of the clips, in this order; all of them by default.
        **options: as for `VideoDataset`.

    Raises:
        DataError: the index or a listed file is missing, or a label has a wrong encoding, size or id.
    """

    METAINFO: ClassVar[dict] = {"classes": CLASSES, "palette": PALETTE}

    def __init__(self, data_root: str | Path, clips: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(data_root, clips, **options)

    def find_clips(self) -> dict[str, Clip]:
        """The clips of the index."""
        return camvid_clips(Path(self.data_root))

    def load_data_list(self) -> list[dict]:
        """The data infos of all frames, after a look at every label."""
        infos = super().load_data_list()
        for info in infos:
            read_labels(info["seg_map_path"], len(CLASSES))
        return infos


def camvid_clips(root: Path) -> dict[str, Clip]:
    """The clips that `root/index.json` lists.

    Raises:
        DataError: there is no such index, or its classes are others.
    """
    file = root / "index.json"
    if not file.is_file():
        raise DataError(f"{file} is missing; expected {LAYOUT}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        entries = {entry["clip"]: entry["frames"] for entry in index["clips"]}
        names = {clip: [(frame["frame"], frame["label"]) for frame in frames] for clip, frames in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no index of clips ({type(error).__name__}: {error}); expected classes and clips, each clip "
            "with frames of frame and label"
        ) from error
    if tuple(index.get("classes", CLASSES)) != CLASSES:
        raise DataError(f"{file} has the classes {', '.join(index['classes'])}; expected {', '.join(CLASSES)}")
    return {clip: _clip(root / clip, files) for clip, files in names.items()}


def _clip(folder: Path, files: list[tuple[str, str]]) -> Clip:
    frames = folder / ("images" if (folder / "images").is_dir() else "frames")
    return Clip(
        name=folder.name,
        frames=tuple(frames / frame for frame, _ in files),
        labels=tuple(folder / "labels" / label for _, label in files),
        mode=("P", "L"),
        encoding="class ids",
    )

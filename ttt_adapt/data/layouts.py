"""The layouts of labelled data that can be opened: plain folders, DAVIS, KITTI-STEP, Cityscapes, COCO.

| format | frames | labels |
|---|---|---|
| folder | `CLIP/images/*`, `CLIP/frames/*` or `CLIP/NAME.jpg` | `CLIP/labels/NAME.png` or `CLIP/NAME.png`: class ids |
| davis | as above, or `JPEGImages/480p/CLIP/*.jpg` | masks of 0 and 255, or `Annotations/480p/CLIP/*.png`: object ids |
| kitti-step | `images/SPLIT/CLIP/*.png` | `panoptic_maps/SPLIT/CLIP/*.png`: red = class id |
| cityscapes | `leftImg8bit/SPLIT/CITY/*.png` | `gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png`, or `_labelIds` |
| coco | `images/*` (`images/CLIP/*`, `raw_images/CLIP/*`) | see `ttt_adapt.data.coco` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ttt_adapt.data.clip import Clip
from ttt_adapt.data.coco import find_coco, is_coco
from ttt_adapt.data.images import check_ids, match, no_folder, read_ids, read_objects, read_rgb
from ttt_adapt.data.index import read_index
from ttt_adapt.data.labelled import BINARY_CLASSES, ImageClip, LabelledClip, pair_files
from ttt_adapt.errors import ConfigError, DataError, nearest
from ttt_adapt.files import FRAME_FOLDERS, files_in, folders_in

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""The 19 classes that Cityscapes scores, in the order of their train ids; KITTI-STEP has the same."""
_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Their ids in `_labelIds.png`; the others up to 34 are not scored."""

Opener = Callable[[], Clip]


def open_clips(
    source: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    binary: bool = False,
    format: str = "auto",
) -> list[Clip]:
    """Opens the labelled clips under one folder, or in the given clip folders.

    Args:
        source: the root of a data set, a folder of clip folders (opened in natural order), one clip folder, or a list
            of clip folders.
        names: open only these, in this order.
        size: (height, width) to resize to.
        classes: class names, for clips without an index.
        binary: the label images are object masks of 0 and 255; see `LabelledClip`.
        format: one of `FORMATS`, or "auto" to recognise it by the names of its folders. Folders of masks of 0 and 255
            that have no class names, or the names background and foreground, are taken for "davis".

    Raises:
        ConfigError: the format is unknown.
        DataError: a folder is missing or holds no clip, a clip has no labels, or a name is unknown or comes twice; and
            where `ImageClip` and `LabelledClip` raise it.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format is {format!r}; expected auto or one of {', '.join(FORMATS)}")
    if isinstance(source, (str, Path)):
        root = Path(source)
        if not root.is_dir():
            raise DataError(f"{no_folder(root)}; expected a folder of clips")
        found = FORMATS[_recognise(root) if format == "auto" else format](root, size, classes, binary)
    else:
        folders = [Path(path) for path in source]
        found = _openers(folders, size, classes, binary or format == "davis")
    if not found:
        raise DataError(f"no clips were found in {source}; expected at least one")
    chosen = list(found) if names is None else list(names)
    for name in chosen:
        if name not in found:
            raise DataError(f"no clip {name!r} in {source}; {nearest(name, found)}")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"the clips are {', '.join(chosen)}; expected every name once")
    return [found[name]() for name in chosen]


def is_unnamed(source: str | Path) -> bool:
    """Whether the folder `source` holds plain clips of class ids without class names."""
    root = Path(source)
    if not root.is_dir() or _recognise(root) != "folder":
        return False
    first = _clip_folders(root)[0]
    return not read_index(first.parent) and not _holds_masks(first)


def _recognise(root: Path) -> str:
    """The format of the data set at `root`."""
    marks = {
        "kitti-step": ("images", "panoptic_maps"),
        "cityscapes": ("leftImg8bit", "gtFine"),
        "davis": ("JPEGImages", "Annotations"),
    }
    for name, folders in marks.items():
        if all((root / folder).is_dir() for folder in folders):
            return name
    return "coco" if is_coco(root) else "folder"


def _folders(
    root: Path, size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool
) -> dict[str, Opener]:
    folders = _clip_folders(root)
    unnamed = classes is None or tuple(classes) == BINARY_CLASSES
    return _openers(folders, size, classes, binary or (unnamed and _holds_masks(folders[0])))


def _clip_folders(root: Path) -> list[Path]:
    """The clips in `root`, or `root` if it is one."""
    inner = folders_in(root)
    whole = any((root / name).is_dir() for name in ("labels", *FRAME_FOLDERS))
    return [root] if whole or not inner else inner


def _openers(
    folders: Sequence[Path], size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool
) -> dict[str, Opener]:
    def opener(folder: Path) -> Opener:
        return lambda: LabelledClip(folder, classes=classes, binary=binary, size=size)

    names = [folder.name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"several clips have the name {', '.join(twice)}; expected a name of its own for each: open them one by one"
        )
    return {folder.name: opener(folder) for folder in folders}


def _holds_masks(folder: Path) -> bool:
    """Whether a clip has no class names, and the first of its labels that is not all 0 is a mask of 0 and 255."""
    if read_index(folder.parent):
        return False
    try:
        kinds = (set(np.unique(read_ids(label)).tolist()) for _, label in pair_files(folder))
        return next((kind for kind in kinds if kind != {0}), {0}) == {0, 255}
    except DataError:
        return False


def _davis(root: Path, size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool) -> dict[str, Opener]:
    if not (root / "JPEGImages").is_dir():
        return _folders(root, size, classes, True)
    frames, labels = (_resolution(root / kind) for kind in ("JPEGImages", "Annotations"))
    pairs = _paired(frames, labels, lambda frame: f"{frame.stem}.png", {".jpg"})
    return _clips(pairs, read_objects, classes or BINARY_CLASSES, size, None)


def _resolution(folder: Path) -> Path:
    """The folder of one resolution, as DAVIS has them: 480p where there are several."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; expected JPEGImages and Annotations")
    inner = {path.name: path for path in folders_in(folder)}
    return inner.get("480p") or next((path for name, path in inner.items() if name.endswith("p")), folder)


def _kitti_step(
    root: Path, size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool
) -> dict[str, Opener]:
    pairs = _paired(root / "images", root / "panoptic_maps", lambda frame: frame.name, {".png"})
    return _clips(pairs, lambda file: read_rgb(file)[..., 0], classes or CITYSCAPES, size, 10.0)


def _cityscapes(
    root: Path, size: tuple[int, int] | None, classes: Sequence[str] | None, binary: bool
) -> dict[str, Opener]:
    labels = root / "gtFine"
    trained = next(labels.rglob("*_gtFine_labelTrainIds.png"), None) is not None if labels.is_dir() else False
    ending = "_gtFine_labelTrainIds.png" if trained else "_gtFine_labelIds.png"
    pairs = _paired(
        root / "leftImg8bit", labels, lambda frame: frame.stem.removesuffix("_leftImg8bit") + ending, {".png", ".jpg"}
    )
    return _clips(pairs, read_ids if trained else _train_ids, classes or CITYSCAPES, size, None)


def _train_ids(file: Path) -> np.ndarray:
    """Labels in the ids of Cityscapes, as train ids."""
    ids = read_ids(file)
    check_ids(ids, {*range(35), 255}, "Cityscapes' ids 0..34, or 255", file)
    table = np.full(256, 255, dtype=np.uint8)
    table[list(_LABEL_IDS)] = np.arange(len(_LABEL_IDS))
    return table[ids]


Pairs = Iterator[tuple[str, Path, Path, Callable[[Path], Path], set[str]]]


def _paired(frames: Path, labels: Path, label_name: Callable[[Path], str], suffixes: set[str]) -> Pairs:
    """Every folder of frames below `frames`, with the folder at the same place below `labels`."""
    for folder in (frames, labels):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing; expected frames and labels side by side in {frames.parent}")

    def walk(folder: Path) -> Pairs:
        if files_in(folder, suffixes):
            beside = labels / folder.relative_to(frames)
            yield folder.name, folder, beside, lambda frame: beside / label_name(frame), suffixes
        for inner in folders_in(folder):
            yield from walk(inner)

    return walk(frames)


def _clips(
    pairs: Pairs,
    read: Callable[[Path], np.ndarray],
    classes: Sequence[str],
    size: tuple[int, int] | None,
    fps: float | None,
) -> dict[str, Opener]:
    """How to open the clips, by name. Clips without labels, as of a test set, are there too, and raise when opened."""

    def opener(name: str, folder: Path, beside: Path, expected: Callable[[Path], Path], suffixes: set[str]) -> Opener:
        def make() -> Clip:
            if not beside.is_dir():
                raise DataError(f"clip {name} has no labels: {beside} is missing; name labelled clips with --clips")
            ours = {expected(frame) for frame in files_in(folder, suffixes)}
            present = [path for path in files_in(beside, {".png"}) if path in ours]
            files = match(files_in(folder, suffixes), present, expected)
            return ImageClip(name, files, read, classes=classes, size=size, fps=fps)

        return make

    openers: dict[str, Opener] = {}
    labelled: dict[str, Opener] = {}
    # Labelled clips come first: they keep their plain names where a test set has the same ones.
    for name, folder, beside, expected, suffixes in sorted(pairs, key=lambda pair: not pair[2].is_dir()):
        key = name if name not in openers else f"{folder.parent.name}-{name}"
        openers[key] = opener(key, folder, beside, expected, suffixes)
        if beside.is_dir():
            labelled[key] = openers[key]
    return _All(openers, labelled or openers)


class _All(dict[str, Opener]):
    """All clips by name. Iteration yields only clips with labels."""

    def __init__(self, every: dict[str, Opener], listed: dict[str, Opener]) -> None:
        super().__init__(every)
        self._listed = listed

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)


FORMATS: dict[str, Callable[..., dict[str, Opener]]] = {
    "folder": _folders,
    "davis": _davis,
    "kitti-step": _kitti_step,
    "cityscapes": _cityscapes,
    "coco": find_coco,
}
"""How each format's clips are found: (root, size, classes, binary) -> clip name -> how to open it."""

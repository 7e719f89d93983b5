"""Labelled clips and training stills for semantic segmentation.

`LabelledClip` reads a folder of frames with their label images lazily and in order, for evaluation.
`StillsDataset` turns clips into augmented training samples. Class ids are `uint8`; the ignore id (255 unless the
data say otherwise) marks void pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ttt_adapt.augment import Augment
from ttt_adapt.errors import ConfigError, DataError, missing, nearest

Sample: TypeAlias = tuple[np.ndarray, np.ndarray]
"""A frame, `uint8 [H, W, 3]` RGB, and its labels, `uint8 [H, W]` class ids."""

_FRAME_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_FRAME_FOLDERS = ("images", "frames")
_BINARY_CLASSES = ("background", "foreground")


class LabelledClip:
    """The frames of one clip with their labels, read from disk when asked for.

    The folder holds either `images/` (or `frames/`) beside `labels/`, or `NAME.jpg` beside `NAME.png` in one place.
    Labels are palette or grayscale PNG files of class ids under the frames' stems. Frames come in natural order
    (`2.jpg` before `10.jpg`). An `index.json` with `classes`, `ignore` and `clips` in the parent folder supplies
    class names, ignore id and times; arguments win over it.

    Attributes:
        name: the clip's name, by default the folder's.
        classes: class names; the position is the class id.
        ignore: the id of void pixels.
        size: (height, width) that samples are resized to, or None for the size on disk.
        fps: labelled frames per second, or None where unknown.
        times: seconds of every frame from the start, or None where unknown.

    Args:
        folder: where the clip lies.
        name: another name for it.
        classes: class names, for a clip without an index.
        ignore: the id of void pixels; 255 without an index.
        binary: the label images are object masks of 0 and 255 (DAVIS): 0 becomes class 0 and 255 becomes class 1,
            and no pixel is void. The classes are then background and foreground unless two others are given.
        size: (height, width) to resize to: frames bilinear with antialiasing, labels to the nearest pixel.

    Raises:
        DataError: the folder or its frames are missing, a frame has no label or a label no frame, or the class
            names are unknown. Reading raises it for a broken file, a label of another size than its frame, and an
            id outside the class list.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        classes: Sequence[str] | None = None,
        ignore: int | None = None,
        binary: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"size is {size}; expected (height, width), both at least 1")
        folder = Path(folder)
        index = _read_index(folder.parent)
        self._files = _pair_files(folder)
        self.name = name or folder.name
        self.size = size
        self.binary = binary
        self.classes = _class_names(folder, classes, binary, index)
        self.ignore = int(index.get("ignore", 255)) if ignore is None else ignore
        entry: dict[str, Any] = next((clip for clip in index.get("clips", []) if clip.get("clip") == folder.name), {})
        gap = entry.get("label_gap_s")
        self.fps: float | None = 1.0 / gap if gap else None
        seconds = {frame.get("frame"): frame.get("t") for frame in entry.get("frames", [])}
        known = all(seconds.get(frame.name) is not None for frame, _ in self._files)
        self.times: tuple[float, ...] | None = tuple(seconds[frame.name] for frame, _ in self._files) if known else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        frame_file, label_file = self._files[index]
        frame, labels = _open_image(frame_file), _open_image(label_file)
        if frame.size != labels.size:
            raise DataError(
                f"{label_file} is {labels.height} x {labels.width}, its frame {frame_file.name} is "
                f"{frame.height} x {frame.width} (height x width); labels must have their frame's size"
            )
        ids = self._class_ids(labels, label_file)
        frame = frame.convert("RGB")
        if self.size is not None:
            resampling = _pillow().Resampling
            frame = frame.resize(self.size[::-1], resampling.BILINEAR)
            ids = np.asarray(_pillow().fromarray(ids).resize(self.size[::-1], resampling.NEAREST))
        return np.array(frame), np.array(ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"LabelledClip({self.name!r}, frames={len(self)}, classes={len(self.classes)}, size={self.size})"

    def _class_ids(self, image: Any, file: Path) -> np.ndarray:
        if image.mode not in ("L", "P"):
            raise DataError(f"{file} has mode {image.mode}; expected a palette or 8-bit grayscale image of class ids")
        ids = np.asarray(image)
        allowed = {0, 255} if self.binary else {*range(len(self.classes)), self.ignore}
        wrong = sorted(set(np.bincount(ids.ravel()).nonzero()[0].tolist()) - allowed)
        if wrong:
            expected = "0 and 255 (binary=True)" if self.binary else f"0..{len(self.classes) - 1} or {self.ignore}"
            raise DataError(f"{file} holds label id {', '.join(map(str, wrong))}; expected {expected}")
        return (ids == 255).astype(np.uint8) if self.binary else ids


def open_clips(
    source: str | Path | Sequence[str | Path],
    names: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    binary: bool = False,
) -> list[LabelledClip]:
    """Opens the clips under one folder, or in the given folders.

    Args:
        source: a folder of clip folders (opened in natural order), one clip folder, or a list of clip folders.
        names: open only these, in this order.
        size: (height, width) to resize to.
        classes: class names, for clips without an index.
        binary: the label images are object masks of 0 and 255; see `LabelledClip`.

    Raises:
        DataError: a folder is missing or holds no clip, a name is unknown or comes twice, or as `LabelledClip`.
    """
    if isinstance(source, (str, Path)):
        root = Path(source)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; expected a folder of clips")
        inner = sorted((path for path in root.iterdir() if path.is_dir() and path.name[0] != "."), key=_natural)
        folders = [root] if (root / "labels").is_dir() or not inner else inner
    else:
        folders = [Path(path) for path in source]
    known = {folder.name: folder for folder in folders}
    if not known:
        raise DataError("no clip folders were given; expected at least one")
    chosen = [folder.name for folder in folders] if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise DataError(f"no clip {name!r} in {source}; {nearest(name, known)}")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"clip names must differ, got {chosen}")
    return [LabelledClip(known[name], classes=classes, binary=binary, size=size) for name in chosen]


class StillsDataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Training samples from labelled clips.

    A sample is the image, `float32 [3, H, W]` RGB in [0, 1] and *not* normalised, and the labels, `int64 [H, W]`.
    Its augmentation depends on (seed, epoch, index) alone: a resumed run sees the samples it would have seen, with
    any number of workers. Call `set_epoch` before every epoch; loader workers that outlive an epoch
    (`persistent_workers=True`) do not see the call.

    Attributes:
        ignore: the label of void and padding.

    Args:
        sources: one clip, several clips, or a sequence of (frame, labels) pairs as `LabelledClip` gives them.
        augment: the random changes; None for none.
        seed: any integer >= 0.
        cache: read everything now, in `uint8`, and keep it; otherwise read each sample when asked for.
        ignore: the label of void and padding, for pairs; clips bring their own.

    Raises:
        DataError: nothing given, clips of different classes, or samples of different sizes (checked when read).
    """

    def __init__(
        self,
        sources: LabelledClip | Sequence[LabelledClip] | Sequence[Sample],
        augment: Augment | None = None,
        seed: int = 0,
        cache: bool = True,
        ignore: int = 255,
    ) -> None:
        clips = [sources] if isinstance(sources, LabelledClip) else sources
        if not len(clips):
            raise DataError("no clips and no samples were given; expected at least one")
        self._samples: Sequence[Sample]
        if isinstance(clips[0], LabelledClip):
            self._samples = _Chain(clips)  # type: ignore[arg-type]
            ignore = clips[0].ignore
        else:
            self._samples = clips  # type: ignore[assignment]
        self.augment, self.seed, self.epoch, self.ignore = augment, seed, 0, ignore
        self._shape: tuple[int, ...] | None = None
        self._cache = [self._read(index) for index in range(len(self._samples))] if cache else None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        frame, ids = self._read(index) if self._cache is None else self._cache[index]
        image = torch.from_numpy(frame).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        image, labels = image.div_(255.0), torch.from_numpy(ids).long()
        if self.augment is None:
            return image, labels
        state = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]))
        return self.augment(image, labels, generator, self.ignore)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of every sample; `epoch` is any integer >= 0."""
        self.epoch = epoch

    def _read(self, index: int) -> Sample:
        frame, labels = self._samples[index]
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or labels.shape != frame.shape[:2]:
            raise DataError(
                f"sample {index} is a {frame.dtype} frame {frame.shape} with labels {labels.shape}; "
                "expected a uint8 frame (H, W, 3) with labels (H, W)"
            )
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            raise DataError(f"sample {index} has shape {frame.shape}, others {self._shape}; open the clips with size=")
        return frame, labels


class _Chain(Sequence[Sample]):
    """Several clips of the same classes, one after the other."""

    def __init__(self, clips: Sequence[LabelledClip]) -> None:
        for clip in clips[1:]:
            if (clip.classes, clip.ignore) != (clips[0].classes, clips[0].ignore):
                raise DataError(f"clips {clips[0].name!r} and {clip.name!r} have different classes or ignore ids")
        self._places = [(clip, index) for clip in clips for index in range(len(clip))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        clip, place = self._places[index]
        return clip[place]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("pillow", "eval") from error
    return Image


def _open_image(file: Path) -> Any:
    pillow = _pillow()
    try:
        image = pillow.open(file)
        image.load()
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    return image


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key under which numbers in names count by value."""
    parts = re.findall(r"\d+|\D+", path.stem)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _pair_files(folder: Path) -> list[tuple[Path, Path]]:
    """The (frame, label) files of a clip in natural order."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a clip of frames and labels")
    frame_folder = next((folder / name for name in _FRAME_FOLDERS if (folder / name).is_dir()), folder)
    label_folder = folder if frame_folder == folder else folder / "labels"
    if not label_folder.is_dir():
        raise DataError(f"{frame_folder} has no labels beside it; expected {label_folder}")
    suffixes = _FRAME_SUFFIXES - {".png"} if label_folder == frame_folder else _FRAME_SUFFIXES
    visible = [path for path in frame_folder.iterdir() if path.is_file() and path.name[0] != "."]
    frames = sorted((path for path in visible if path.suffix.lower() in suffixes), key=_natural)
    labels = {path.stem: path for path in label_folder.glob("*.png") if path.name[0] != "."}
    if not frames:
        raise DataError(f"no frames ({', '.join(sorted(suffixes))}) in {frame_folder}")
    for frame in frames:
        if frame.stem not in labels:
            raise DataError(f"frame {frame} has no label; expected {label_folder / (frame.stem + '.png')}")
    for stem in sorted(labels.keys() - {frame.stem for frame in frames}):
        raise DataError(f"label {labels[stem]} has no frame in {frame_folder}")
    return [(frame, labels[frame.stem]) for frame in frames]


def _read_index(root: Path) -> dict[str, Any]:
    """The `index.json` of a folder of clips; empty where there is none of that kind."""
    file = root / "index.json"
    if not file.is_file():
        return {}
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    return index if isinstance(index, dict) and {"classes", "clips"} <= index.keys() else {}


def _class_names(folder: Path, given: Sequence[str] | None, binary: bool, index: dict[str, Any]) -> tuple[str, ...]:
    names = given or (_BINARY_CLASSES if binary else index.get("classes"))
    if not names:
        raise DataError(
            f"the classes of {folder} are unknown: no index.json beside it. Pass classes=(names in the order of "
            "their ids), or binary=True for masks of 0 and 255"
        )
    if binary and len(names) != 2:
        raise DataError(f"binary=True has 2 classes, got {len(names)}: {', '.join(names)}")
    return tuple(names)

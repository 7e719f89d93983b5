"""Which pictures of a folder are frames, and which are labels that lie beside them.

Labels are told from frames by their names, never by their contents:

- `NAME.png` beside `NAME.jpg`, and every picture that is stored without loss beside a photograph of the same stem;
- `NAME_L.png`, `NAME_mask.png`, `NAME_gtFine_labelIds.png` and others beside `NAME.png`, `NAME_leftImg8bit.png` or
  `NAME_rgb.jpg`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ttt_adapt.files import FRAME_FOLDERS, LABEL_FOLDERS, PHOTO_SUFFIXES, PICTURE_SUFFIXES, files_in, folders_in

_LOSSY = PHOTO_SUFFIXES | {".webp", ".avif"}
_KIND = (
    r"l|labels?|label_?ids?|label_?train_?ids?|train_?ids?|instance_?ids?|instance_?train_?ids?|gt|ground_?truth"
    r"|masks?|seg|segm|segmentation|annotations?|anno|panoptic|semantic|(?:colou?r|watershed|instance|binary)_masks?"
)
_CITYSCAPES = r"gt(?:fine|coarse)[_-]"
_LABEL_STEM = re.compile(rf"(.+?)[_.-](?:{_CITYSCAPES}colou?r|(?:gt[_-]|{_CITYSCAPES})?(?:{_KIND}))", re.IGNORECASE)
_FRAME_ENDING = re.compile(r"[_.-](?:leftimg8bit|rightimg8bit|images?|img|rgb|frame|sat)$", re.IGNORECASE)


def frames_and_labels(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The pictures of one folder, divided into frames and labels; both keep their order."""
    suffixes: dict[str, set[str]] = {}
    for file in files:
        suffixes.setdefault(file.stem, set()).add(file.suffix.lower())
    bases = {*suffixes, *(_FRAME_ENDING.sub("", stem) for stem in suffixes)}
    labels = [file for file in files if _beside_frame(file, suffixes[file.stem]) or _named_label(file.stem, bases)]
    left_out = set(labels)
    return [file for file in files if file not in left_out], labels


def _beside_frame(file: Path, suffixes: set[str]) -> bool:
    """Whether a file is the label of a frame with the same stem; `suffixes` are those of all such files."""
    if suffixes & _LOSSY:
        return file.suffix.lower() not in _LOSSY
    return file.suffix.lower() == ".png" and len(suffixes) > 1


def _named_label(stem: str, bases: set[str]) -> bool:
    """Whether a stem is that of a frame, with an ending that names a label."""
    found = _LABEL_STEM.fullmatch(stem)
    return found is not None and found[1] in bases


def frame_folder(folder: Path) -> Path:
    """Where the frames of a clip lie: in the folder, or in the one of its folders that holds no labels.

    A folder that holds pictures itself is returned as it is. Otherwise it has `images/` or `frames/`, or a single other
    folder with pictures beside folders of labels.
    """
    if files_in(folder, PICTURE_SUFFIXES):
        return folder
    inner = [path for path in folders_in(folder) if files_in(path, PICTURE_SUFFIXES)]
    frames = [path for path in inner if path.name.lower() not in LABEL_FOLDERS]
    named = [path for path in frames if path.name.lower() in FRAME_FOLDERS]
    if len(named) == 1:
        return named[0]
    return frames[0] if len(frames) == 1 and len(inner) > 1 else folder

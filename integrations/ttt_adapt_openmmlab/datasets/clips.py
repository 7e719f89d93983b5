"""What a folder of video clips should hold, and what of it is missing or wrong.

A `Clip` names the files that belong to one video. Its problems are found without decoding pixels, so that a data set
can refuse a bad tree when it is built; `ttt-adapt mm check` lists all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ttt_adapt.errors import DataError
from ttt_adapt.integration import folders_in, natural_key, picture_header

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Clip:
    """The files of one video, in order.

    Attributes:
        name: the video's identity.
        frames: the images that belong to it, also those that are missing.
        labels: the label image of every frame.
        mode: Pillow modes that its label images may have.
        encoding: what the label images hold, for messages.
        same_size: whether all frames of the video have one size.
    """

    name: str
    frames: tuple[Path, ...]
    labels: tuple[Path, ...]
    mode: tuple[str, ...]
    encoding: str
    same_size: bool = True

    def problems(self) -> Iterator[str]:
        """Everything wrong that the files' names and headers show; nothing if the clip is good."""
        if not self.frames:
            yield f"video {self.name} has no frames"
            return
        absent = 0
        for kind, files in (("frame", self.frames), ("label", self.labels)):
            missing = [file for file in files if not file.is_file()]
            absent += len(missing)
            if missing:
                lack = f"{len(missing)} of {len(files)} {kind}s"
                yield f"video {self.name} lacks {lack}: {listed(missing)}; get them again"
        if not absent:
            yield from self._header_problems()

    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame, turned upright."""
        return picture_header(self.frames[0]).size

    def _header_problems(self) -> Iterator[str]:
        heads = {}
        broken = []
        for file in (*self.frames, *self.labels):
            try:
                heads[file] = picture_header(file)
            except DataError as error:
                broken.append(str(error))
        if broken:
            yield f"video {self.name} has {len(broken)} unreadable files: {broken[0]}"
            return
        modes = [file for file in self.labels if heads[file].mode not in self.mode]
        if modes:
            yield (
                f"video {self.name} has {len(modes)} labels in mode {heads[modes[0]].mode}: {listed(modes)}; "
                f"expected {' or '.join(self.mode)}, {self.encoding}. Use the original PNG files, not converted ones"
            )
        pairs = zip(self.frames, self.labels, strict=True)
        unequal = [label for frame, label in pairs if heads[frame].size != heads[label].size]
        if unequal:
            yield f"video {self.name} has {len(unequal)} labels of another size than their frame: {listed(unequal)}"
        sizes = Counter(heads[file].size for file in self.frames)
        if self.same_size and len(sizes) > 1:
            usual = sizes.most_common(1)[0][0]
            odd = [file for file in self.frames if heads[file].size != usual]
            yield (
                f"video {self.name} mixes frame sizes: {len(odd)} of {len(self.frames)} frames are not {usual[0]} x "
                f"{usual[1]} (height x width): {listed(odd)}. Resize them, or put them into a video of their own"
            )


def refuse(clips: Iterable[Clip]) -> None:
    """Raises the first problem of the clips.

    Raises:
        DataError: a clip has a problem.
    """
    for clip in clips:
        for problem in clip.problems():
            raise DataError(problem)


def choose(clips: dict[str, _Key], names: Sequence[str] | None, root: Path) -> list[_Key]:
    """The clips of these names in this order, or all of them.

    Raises:
        DataError: none there, a name is unknown or comes twice.
    """
    if not clips:
        raise DataError(f"{root} holds no video; `ttt-adapt mm check` shows the expected layout")
    if isinstance(names, str):
        raise DataError(f"videos must be given as a list of names, got the text {names!r}")
    chosen = list(clips) if names is None else list(names)
    unknown = [name for name in chosen if name not in clips]
    if unknown or not chosen:
        raise DataError(f"no video {', '.join(unknown) or 'chosen'} in {root}; it holds {', '.join(clips)}")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"videos must differ, got {', '.join(chosen)}")
    return [clips[name] for name in chosen]


def listed(files: Sequence[Path], most: int = 3) -> str:
    """The first files by name, and how many more there are."""
    more = len(files) - most
    return ", ".join(str(file) for file in files[:most]) + (f" and {more} more" if more > 0 else "")


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by number where they end in one.

    Raises:
        DataError: it is no folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; expected a folder of videos")
    return folders_in(folder)


def numbered(folder: Path) -> dict[int, Path]:
    """The PNG files of a folder by the number at the end of their names.

    Raises:
        DataError: two files have one number.
    """
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("*.png"), key=lambda path: natural_key(path.stem)):
        match = re.search(r"(\d+)$", file.stem)
        if match is None or file.name[0] == ".":
            continue
        number = int(match[1])
        if number in found:
            raise DataError(f"{found[number]} and {file} are both frame {number} of one video; keep one of them")
        found[number] = file
    return found

"""Clips whose labels are their own colours, and training pictures that have some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ttt_adapt.data import Clip, PictureClip, Sample
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.lab import to_grey


class GreyedClip(Clip):
    """Another clip's frames in grey, each with its colours as its label: what an arm is given holds no colour.

    Args:
        clip: frames in colour; its own labels are not looked at.
    """

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip.name, [], _no_labels, classes=(), size=clip.size, fps=clip.fps, times=clip.times)
        self._clip = clip

    def __len__(self) -> int:
        return len(self._clip)

    def __getitem__(self, index: int) -> Sample:
        return self._pair(self._clip[index][0])

    def __iter__(self) -> Iterator[Sample]:
        return (self._pair(frame) for frame, _ in self._clip)

    def describe(self) -> dict[str, Any]:
        """What the colours depend on."""
        return self._clip.describe()

    @staticmethod
    def _pair(frame: Any) -> Sample:
        return to_grey(frame), frame


def without_grey(clips: Sequence[Clip]) -> list[Clip]:
    """The clips without pictures that are stored in grey.

    Raises:
        DataError: nothing is left.
    """
    kept = [clip.but_grey() if isinstance(clip, PictureClip) else clip for clip in clips]
    if not any(map(len, kept)):
        raise DataError(f"all {sum(map(len, clips))} pictures are grey: there are no colours to learn from")
    return [clip for clip in kept if len(clip)]


def common_size(clips: Sequence[Clip]) -> tuple[int, int]:
    """(H, W) of all samples.

    Raises:
        ConfigError: they have several.
    """
    sizes: set[tuple[int, int]] = set()
    for clip in clips:
        sizes |= clip.sizes() if isinstance(clip, PictureClip) else {clip[0][1].shape}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
        raise ConfigError(f"the pictures have {len(sizes)} sizes ({some}, ...): choose one with --size HEIGHTxWIDTH")
    height, width = sizes.pop()
    return height, width


def _no_labels(_file: Any) -> Any:
    raise AssertionError("a clip that labels itself has no label files")

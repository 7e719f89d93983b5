"""Clips whose labels are their own colours, and which pictures have colours to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ttt_adapt.colour import to_grey
from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.data.unlabelled import PictureClip, VideoClip
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.tasks.colorization.score import SMALLEST, in_colour

_LOOKED_AT = 8


class GreyedClip(Clip):
    """The frames of another clip in grey, each with its colours as its label. What the model is shown has no colour.

    Attributes:
        in_colour: the other clip.

    Args:
        clip: frames in colour; its labels are not used.
    """

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip.name, size=clip.size, fps=clip.fps, times=clip.times)
        self.in_colour = clip

    def __len__(self) -> int:
        return len(self.in_colour)

    def __getitem__(self, index: int) -> Sample:
        return self._pair(self.in_colour[index][0])

    def __iter__(self) -> Iterator[Sample]:
        return (self._pair(frame) for frame, _ in self.in_colour)

    def describe(self) -> dict[str, Any]:
        """The description of the clip in colour."""
        return self.in_colour.describe()

    @staticmethod
    def _pair(frame: Any) -> Sample:
        return to_grey(frame), frame


def without_grey(clips: Sequence[Clip]) -> tuple[list[Clip], list[str]]:
    """The clips without pictures that are stored in grey and without videos in black and white.

    Returns:
        The clips that are left, and sentences that say what was left out.

    Raises:
        DataError: nothing is left.
    """
    films = [clip for clip in clips if isinstance(clip, VideoClip) and not shows_colour(clip)]
    kept = [clip.but_grey() if isinstance(clip, PictureClip) else clip for clip in clips if clip not in films]
    if not any(map(len, kept)):
        what = "pictures and frames of videos" if films else "pictures"
        raise DataError(f"all {sum(map(len, clips))} {what} are grey: there are no colours to learn from")
    notes = []
    if grey := sum(map(len, clips)) - sum(map(len, films)) - sum(map(len, kept)):
        notes.append(f"{grey} pictures are stored in grey and left out: they have no colours to teach")
    if films:
        names = ", ".join(film.name for film in films)
        notes.append(f"{len(films)} videos are black and white and left out, they have no colours to teach: {names}")
    return [clip for clip in kept if len(clip)], notes


def shows_colour(clip: Clip) -> bool:
    """Whether the clip shows colour, by up to `_LOOKED_AT` frames that are evenly spread over it."""
    places = sorted({len(clip) * i // _LOOKED_AT for i in range(_LOOKED_AT)})
    return any(in_colour(clip[place][-1 if isinstance(clip, GreyedClip) else 0]) for place in places)


def check_scorable(clip: Clip) -> None:
    """Refuse a clip whose colours cannot be scored, from a few of its frames.

    Raises:
        DataError: the frames are smaller than the window of SSIM, or grey.
    """
    height, width = clip[0][0].shape[:2]
    if min(height, width) < SMALLEST:
        raise DataError(
            f"clip {clip.name} has frames of {height} x {width}; expected both sides at least {SMALLEST} pixels: "
            "leave this clip out, or choose another size"
        )
    if not shows_colour(clip):
        raise DataError(f"clip {clip.name} is black and white: no colours to score against; leave this clip out")


def common_size(clips: Sequence[Clip]) -> tuple[int, int]:
    """(H, W) of all samples.

    Raises:
        ConfigError: the samples have several sizes.
    """
    sizes: dict[Any, object] = {}  # each with one that has it
    for clip in clips:
        sizes |= clip.sizes() if isinstance(clip, PictureClip) else {clip[0][1].shape: f"clip {clip.name}"}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w} of {where}" for (h, w), where in sorted(sizes.items())[:3])
        raise ConfigError(f"the pictures have {len(sizes)} sizes ({some}): give one size for all, height x width")
    height, width = next(iter(sizes))
    return height, width

"""Clips under a drift, with their labels: `DriftedClip`; and longer clips than there are: `ForthAndBack`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ttt_adapt.data.clip import Clip, Sample
from ttt_adapt.data.drift.schedule import Schedule, parse_drifts
from ttt_adapt.data.drift.table import Drift
from ttt_adapt.errors import ConfigError, DataError


class _Around(Clip):
    """A clip made from another one, `clip`, which knows its files and labels."""

    def __init__(self, clip: Clip, name: str, times: tuple[float, ...] | None) -> None:
        super().__init__(name, classes=clip.classes, ignore=clip.ignore, size=clip.size, fps=clip.fps, times=times)
        self._clip = clip

    @property
    def files(self) -> Sequence[Path]:
        """The files of the other clip."""
        return self._clip.files

    def check_labels(self) -> None:
        """Check the labels of the other clip, which are the same."""
        self._clip.check_labels()


class ForthAndBack(_Around):
    """A clip of another length: its frames forth, back, and forth again, with their labels.

    The first and the last frame are not doubled where the direction turns, so that the picture never jumps. Fewer
    frames than the clip has are its first ones.

    Args:
        clip: what is played.
        frames: how many frames, at least 1.

    Raises:
        ConfigError: `frames` is out of range.
        DataError: the clip has no frames.
    """

    def __init__(self, clip: Clip, frames: int) -> None:
        if frames < 1:
            raise ConfigError(f"clip {clip.name} is to have {frames} frames; expected at least 1")
        if not len(clip):
            raise DataError(f"clip {clip.name} has no frames to repeat")
        self._frames, self._turn = frames, len(clip) - 1
        super().__init__(clip, clip.name, None if clip.times is None else self._times(clip.times))

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, index: int) -> Sample:
        return self._clip[self._place(range(len(self))[index])]

    def describe(self) -> dict[str, Any]:
        """The description of the clip that is played, with the number of frames."""
        return {**self._clip.describe(), "frames": len(self)}

    def _place(self, index: int) -> int:
        """The place in the other clip."""
        back = index % (2 * self._turn) if self._turn else 0
        return min(back, 2 * self._turn - back)

    def _times(self, times: tuple[float, ...]) -> tuple[float, ...]:
        """Time goes on where the clip goes back."""
        places = [self._place(i) for i in range(self._frames)]
        steps = (abs(times[b] - times[a]) for a, b in pairwise(places))
        return tuple(accumulate(steps, initial=times[0]))


class DriftedClip(_Around):
    """A clip under a drift or a schedule of drifts; its labels stay as they are.

    The drift of a frame depends on its place in the clip alone: frames may be read in any order.

    Attributes:
        drift: the drift, or the schedule.

    Args:
        clip: what the drift happens to.
        drift: what happens; text is read by `parse_drifts`.
        seed: of all that is random; None keeps the drift's own.
        frames: play the clip forth and back to this length; None for the schedule's length, or else for the clip's.

    Raises:
        ConfigError: the text cannot be read, or the schedule does not fit the number of frames.
    """

    def __init__(
        self, clip: Clip, drift: Drift | Schedule | str, seed: int | None = None, frames: int | None = None
    ) -> None:
        self.drift = _with_seed(_only(drift), seed)
        wanted = frames if frames is not None else self.drift.frames if isinstance(self.drift, Schedule) else None
        clip = clip if wanted is None or wanted == len(clip) else ForthAndBack(clip, wanted)
        super().__init__(clip, f"{clip.name} {self.drift}", clip.times)
        if isinstance(self.drift, Schedule):
            self.drift.drift_at(0, len(clip))  # it raises where lengths do not fit

    def __len__(self) -> int:
        return len(self._clip)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        frame, labels = self._clip[index]
        return self.drift_at(index).apply(frame, index), labels

    def __iter__(self) -> Iterator[Sample]:
        for index, (frame, labels) in enumerate(self._clip):
            yield self.drift_at(index).apply(frame, index), labels

    def drift_at(self, index: int) -> Drift:
        """The drift of a frame, with its name and severity: for captions."""
        return self.drift.drift_at(index, len(self)) if isinstance(self.drift, Schedule) else self.drift

    def describe(self) -> dict[str, Any]:
        """The description of the clip without drift, with what the drift depends on."""
        whole = self.drift if isinstance(self.drift, Schedule) else Schedule((self.drift,))
        found = {"drift": str(whole), "seeds": sorted({part.seed for part in whole.parts})}
        return {**self._clip.describe(), **found, **({"ramp": whole.ramp} if len(whole.parts) > 1 else {})}


def _only(drift: Drift | Schedule | str) -> Drift | Schedule:
    if not isinstance(drift, str):
        return drift
    found = parse_drifts([drift])
    if len(found) > 1:
        raise ConfigError(f"got {len(found)} drifts, {drift!r}; a clip has one. Drifts one after the other have '..'")
    return found[0]


def _with_seed(drift: Drift | Schedule, seed: int | None) -> Drift | Schedule:
    if seed is None:
        return drift
    if isinstance(drift, Drift):
        return replace(drift, seed=seed)
    return replace(drift, parts=tuple(replace(part, seed=seed) for part in drift.parts))

"""Drifts that come and go: `Schedule`."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

from ttt_adapt.data.drift.table import NONE, Drift, parse_drift
from ttt_adapt.errors import ConfigError

THEN = ".."
"""Stands between the parts of a schedule."""


@dataclass(frozen=True)
class Schedule:
    """Drifts one after the other over a stream.

    Each part begins and ends with a ramp: its severity grows from 0 at its beginning and falls to 0 at its end. There
    is no ramp at the two ends of the stream. Between two parts of one drift, such as night:1 and night:5, the severity
    goes straight from one to the other.

    Attributes:
        parts: in the order of the stream, at least one.
        lengths: frames of each part. () for equal shares of a stream of any length.
        ramp: how much of a part each of its ramps takes, from 0 (the drift is there at once) to 0.5.

    Raises:
        ConfigError: there is no part, or the lengths or the ramp make no sense.
    """

    parts: tuple[Drift, ...]
    lengths: tuple[int, ...] = ()
    ramp: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "lengths", tuple(map(operator.index, self.lengths)))
        if not self.parts:
            raise ConfigError("a schedule has no parts; expected at least one drift")
        if self.lengths and (len(self.lengths) != len(self.parts) or min(self.lengths) < 1):
            raise ConfigError(
                f"a schedule of {len(self.parts)} parts has the lengths {list(self.lengths)}; expected as many whole "
                "numbers of frames, each at least 1, or none"
            )
        if not 0 <= self.ramp <= 0.5:
            raise ConfigError(f"the ramp of a schedule is {self.ramp!r}; expected a share of a part, from 0 to 0.5")

    @property
    def frames(self) -> int | None:
        """How many frames the stream has; None where the parts are shares."""
        return sum(self.lengths) or None

    def drift_at(self, index: int, frames: int) -> Drift:
        """The drift of one frame.

        Args:
            index: of the frame, from 0 to `frames` - 1.
            frames: length of the stream.

        Raises:
            ConfigError: the stream has fewer frames than the schedule has parts, or another number than `lengths` say.
            IndexError: there is no such frame.
        """
        ends = self._ends(frames)
        if not 0 <= index < frames:
            raise IndexError(f"frame {index} of a stream of {frames} frames")
        place = bisect_right(ends, index)
        part, first = self.parts[place], ends[place - 1] if place else 0
        width = int(self.ramp * (ends[place] - first)) + 1  # the ramp is over in the frame at this distance
        before = self.parts[place - 1] if place else None
        after = self.parts[place + 1] if place + 1 < len(self.parts) else None
        severity = part.severity
        if before is not None and (risen := (index - first + 1) / width) < 1:
            start = before.severity if before.name == part.name else 0.0
            severity = start + (severity - start) * risen
        if after is not None and after.name != part.name:
            severity *= min(1.0, (ends[place] - index) / width)
        return part if severity == part.severity else replace(part, severity=severity)

    def _ends(self, frames: int) -> list[int]:
        """For each part the index of the frame behind its last one."""
        if self.lengths:
            if frames != self.frames:
                raise ConfigError(f"the schedule {self} has {self.frames} frames, and the stream has {frames}")
            return list(accumulate(self.lengths))
        count = len(self.parts)
        if frames < count:
            raise ConfigError(f"the schedule {self} has {count} parts, and the stream has only {frames} frames")
        return [frames * (i + 1) // count for i in range(count)]

    def __str__(self) -> str:
        """As `parse_schedule` reads it."""
        texts = [str(part) for part in self.parts]
        if self.lengths:
            texts = [f"{text}@{length}" for text, length in zip(texts, self.lengths, strict=True)]
        return THEN.join(texts)


def parse_schedule(text: str, seed: int = 0) -> Schedule:
    """ "none..night:3..none" -> a third of the stream each; "none@100..night:3@50" -> 100 frames, then 50.

    Args:
        text: drifts as `parse_drift` reads them, with ".." between them; behind each, or behind none, "@" and its
            number of frames. One drift is a schedule, too.
        seed: of all drifts.

    Raises:
        ConfigError: anything else.
    """
    parts, lengths = [], []
    for piece in text.split(THEN):
        name, at, length = piece.strip().partition("@")
        parts.append(parse_drift(name, seed))
        if at:
            if not (length.isascii() and length.isdigit() and len(length) <= 9 and int(length)):
                raise ConfigError(f"got {piece.strip()!r}; expected a number of frames behind @, such as {name}@100")
            lengths.append(int(length))
    if lengths and len(lengths) != len(parts):
        raise ConfigError(
            f"the schedule {text!r} has {len(parts)} parts and {len(lengths)} lengths; expected a length behind every "
            "drift, such as none@100..night:3@100, or behind none"
        )
    return Schedule(tuple(parts), tuple(lengths))


def parse_drifts(texts: Iterable[str], seed: int = 0) -> list[Drift | Schedule]:
    """["none,night:3", "none..rain..none"] -> two drifts and a schedule.

    Args:
        texts: of drifts and schedules, each one or several with commas between them.
        seed: of all of them.

    Raises:
        ConfigError: one cannot be read, or stands there twice.
    """
    found: list[Drift | Schedule] = []
    for text in (piece.strip() for each in texts for piece in each.split(",")):
        if not text:
            raise ConfigError(f"a drift is missing; expected names such as night:3, or {NONE}")
        whole = parse_schedule(text, seed)
        one: Drift | Schedule = whole.parts[0] if len(whole.parts) == 1 and not whole.lengths else whole
        if one in found:
            raise ConfigError(f"the drift {one} is given twice; expected each once")
        found.append(one)
    return found

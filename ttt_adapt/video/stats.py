"""What became of the frames of a source: how many were read, dropped, adapted to and predicted, and how fast."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

RATE_SECONDS = 10.0
"""A rate is that of the last so many seconds."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Count:
    """Frames of one kind.

    Attributes:
        frames: how many there were.
        rate: how many a second in the last `RATE_SECONDS`, or since the source was opened where that is shorter.
    """

    frames: int
    rate: float


@dataclass(frozen=True)
class SourceStats:
    """The frames of one source so far. `read` is `dropped` and `taken` together, and those that are still read ahead.

    Attributes:
        read: frames that the source gave.
        dropped: those that made way for a newer one before anybody asked for them.
        taken: those that the iteration returned.
        adapted: those after which the weights were updated; 0 unless the consumer counts them.
        predicted: those with a prediction; 0 unless the consumer counts them.
        lost: how often a live source was lost after it had given frames.
        tries: how often it was tried to open it again.
        resized: how often its frames got another size.
        seconds: since it was opened.
        silence: seconds since its last frame, or since it was opened.
    """

    read: Count
    dropped: Count
    taken: Count
    adapted: Count
    predicted: Count
    lost: int
    tries: int
    resized: int
    seconds: float
    silence: float

    def as_dict(self) -> dict[str, Any]:
        """All of it, as numbers by name for JSON; seconds and rates are rounded to milliseconds and thousandths."""
        return {
            name: {key: round(number, 3) for key, number in value.items()}
            if isinstance(value, dict)
            else round(value, 3)
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        """One line, such as "9 frames read (25.0 a second), 5 dropped, 4 adapted to, 4 predicted (11.1 a second)"."""
        lost = f", lost {self.lost} times" if self.lost > 1 else ", lost once" if self.lost else ""
        return (
            f"{self.read.frames} frame{'' if self.read.frames == 1 else 's'} read ({self.read.rate:.1f} a second), "
            f"{self.dropped.frames} dropped, {self.adapted.frames} adapted to, {self.predicted.frames} predicted "
            f"({self.predicted.rate:.1f} a second){lost}"
        )


class FrameCounter:
    """Counts frames, and how many came in the last seconds. Any thread may add and read.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._frames, self._begun, self._last = 0, clock(), deque[float]()

    def add(self) -> None:
        """Count one frame."""
        with self._lock:
            now = self._clock()
            self._frames += 1
            self._last.append(now)
            self._forget(now)

    def go_on_from(self, frames: int) -> None:
        """Count these, too, which came in an earlier process; they have no part in the rate."""
        with self._lock:
            self._frames += frames

    def count(self) -> Count:
        """The frames so far, and their rate now."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            seconds = min(now - self._begun, RATE_SECONDS)
            return Count(self._frames, len(self._last) / seconds if seconds > 0 else 0.0)

    def _forget(self, now: float) -> None:
        while self._last and self._last[0] <= now - RATE_SECONDS:
            self._last.popleft()


class FrameCounts:
    """The counters behind `SourceStats`. The reader counts what it reads and drops; the rest is the consumer's.

    Attributes:
        read, dropped, taken, adapted, predicted: counters, see `SourceStats`.
        lost, tries, resized: numbers of events.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.read, self.dropped, self.taken = FrameCounter(clock), FrameCounter(clock), FrameCounter(clock)
        self.adapted, self.predicted = FrameCounter(clock), FrameCounter(clock)
        self.lost = self.tries = self.resized = 0
        self._clock, self._begun = clock, clock()
        self._last_frame = self._begun

    def frame_came(self) -> None:
        """Count a frame that the source gave."""
        self._last_frame = self._clock()
        self.read.add()

    def stats(self) -> SourceStats:
        """All numbers as they are now."""
        now = self._clock()
        return SourceStats(
            self.read.count(),
            self.dropped.count(),
            self.taken.count(),
            self.adapted.count(),
            self.predicted.count(),
            self.lost,
            self.tries,
            self.resized,
            now - self._begun,
            now - self._last_frame,
        )

"""Tally: what became of the frames of a video, counted, timed and logged."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttt_adapt.schema import check_fields, dict_of, whole
from ttt_adapt.stream.report import ROLLED_BACK, StepReport
from ttt_adapt.stream.state_part import Part

LATENCIES = 512
"""So many of the last steps are in the percentiles."""
LOG_SECONDS = 60.0
"""A kind of intervention is logged once in this time."""
_ASKED_FOR = ("every", "gate", "iterations", "no branch")  # by the configuration: no intervention
_DELAY = 2  # frames, on a device
_log = logging.getLogger("ttt_adapt")


@dataclass(frozen=True)
class StreamStats:
    """What became of the frames of one video.

    Attributes:
        frames: how many came since the video began.
        adapted: how many of them the weights were updated on.
        skipped: reason -> frames without an update.
        interventions: reason -> frames at which a guard or the time budget acted, those included that it skipped.
        rolled_back: how often the video went back to its last good state, or to the source.
        cuts: how many scene cuts were seen, whatever `on_cut` makes of them.
        ms: "p50", "p95" and "p99" of the wall time of the last 512 calls of `step`, in milliseconds; empty before the
            first. On a GPU the device may still be working when a call returns.
    """

    frames: int = 0
    adapted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    interventions: dict[str, int] = field(default_factory=dict)
    rolled_back: int = 0
    cuts: int = 0
    ms: dict[str, float] = field(default_factory=dict)


class Tally(Part):
    """Counts the frames of one video by what became of them.

    A report whose numbers are on a device other than the CPU is read two frames later, or when somebody asks.

    Attributes:
        clock: seconds that go by.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self._logged: dict[str, float] = {}
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._begin()

    def _begin(self) -> None:
        self._frames = self._adapted = self._cuts = 0
        self._skipped: Counter[str] = Counter()
        self._interventions: Counter[str] = Counter()
        self._waiting: deque[StepReport] = deque()

    def count(self, report: StepReport) -> None:
        """Note what became of a frame."""
        self._waiting.append(report)
        self._read(_DELAY if report.on_device else 0)

    def count_cut(self) -> None:
        """Note a scene cut."""
        self._cuts += 1

    def took(self, begun: float) -> None:
        """Note a call of `step` that began at a time of `clock`."""
        self._latencies.append((self.clock() - begun) * 1e3)

    def stats(self) -> StreamStats:
        """All counts; on a GPU it waits for the device."""
        self._read()
        back = sum(count for reason, count in self._interventions.items() if reason.startswith(ROLLED_BACK))
        ms = {}
        if self._latencies:
            found = np.percentile(self._latencies, (50, 95, 99)).tolist()
            ms = dict(zip(("p50", "p95", "p99"), found, strict=True))
        counts = self._frames, self._adapted, dict(self._skipped), dict(self._interventions)
        return StreamStats(*counts, rolled_back=back, cuts=self._cuts, ms=ms)

    def _read(self, but: int = 0) -> None:
        """Count the reports that wait, but the last ones."""
        while len(self._waiting) > but:
            report = self._waiting.popleft()
            self._frames += 1
            self._adapted += report.adapted
            reasons = report.reasons
            if not report.adapted:
                self._skipped[", ".join(reasons)] += 1
            for reason in reasons:
                if reason not in _ASKED_FOR:
                    self._interventions[reason] += 1
                    self._say(report.frame_index, reason, report.adapted)

    def _say(self, index: int, reason: str, adapted: bool) -> None:
        """Log an intervention, each kind once a minute."""
        now = self.clock()
        if now - self._logged.get(reason, -LOG_SECONDS) >= LOG_SECONDS:
            self._logged[reason] = now
            done = "" if adapted or reason.startswith(ROLLED_BACK) else ": not adapted to"
            _log.warning("frame %d, %s%s (%d so far)", index, reason, done, self._interventions[reason])

    # ---- as a part of the stream's state

    def reset(self) -> None:
        """See `Part`; what a step takes, and what was logged a moment ago, has nothing to do with the video."""
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        self._read()
        counts = {"frames": self._frames, "adapted": self._adapted, "cuts": self._cuts}
        return {**counts, "skipped": dict(self._skipped), "interventions": dict(self._interventions)}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`; None is from a stream that counted nothing: counting begins here."""
        if saved is None:
            return self.reset
        check_fields(saved, _FIELDS, "the state's tally")
        numbers = saved["frames"], saved["adapted"], saved["cuts"]
        tables = Counter(saved["skipped"]), Counter(saved["interventions"])
        return lambda: self._put_back(numbers, tables, ())

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        numbers = self._frames, self._adapted, self._cuts
        tables, waiting = (Counter(self._skipped), Counter(self._interventions)), tuple(self._waiting)
        return lambda: self._put_back(numbers, tables, waiting)

    def _put_back(self, numbers: Any, tables: Any, waiting: Iterable[StepReport]) -> None:
        self._frames, self._adapted, self._cuts = numbers
        self._skipped, self._interventions = tables
        self._waiting = deque(waiting)


_FIELDS = {
    **dict.fromkeys(("frames", "adapted", "cuts"), whole()),
    **dict.fromkeys(("skipped", "interventions"), dict_of(whole())),
}

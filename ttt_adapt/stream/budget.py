"""Budget: how much of a frame's time adaptation may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ttt_adapt.stream.state_part import Part

_RATE = 0.2  # of the averages


class Budget(Part):
    """Leaves gradient steps out while a stream is behind its frames.

    Each frame brings `max_ms` of time, and what adapting and predicting take is paid from it. What a frame takes beyond
    that is a debt, which later frames pay back; time that is left over is gone, as a camera waits for nobody. A frame
    gets as many gradient steps as fit beside the debt and its prediction, and at least one where there is no debt.

    With a budget, the host waits for the device at the end of each call: it has to know what a call takes.

    Args:
        max_ms: time per frame.
        device: of the model.

    Attributes:
        clock: seconds that go by.
    """

    def __init__(self, max_ms: float, device: torch.device) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self._max_ms, self._device = max_ms, device
        self._debt = self._other_ms = self._adapting_ms = 0.0  # milliseconds
        self._step_ms: float | None = None

    def steps(self, wanted: int) -> int:
        """How many gradient steps the frame that comes gets, at most `wanted`."""
        if self._step_ms is None:
            return wanted
        left = self._max_ms - self._debt - self._other_ms
        return min(wanted, max(int(left // self._step_ms) if self._step_ms else wanted, 0 if self._debt else 1))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Around what is done with a frame that is adapted to, or skipped: its time goes by."""
        with self.spent():
            yield
        self._debt = max(0.0, self._debt - self._max_ms)

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Around anything that the stream does: what it takes is a debt."""
        before, begun = self._adapting_ms, self._now()
        yield
        ms = (self._now() - begun) * 1e3
        self._debt += ms
        self._other_ms += _RATE * (max(0.0, ms - (self._adapting_ms - before)) - self._other_ms)

    @contextmanager
    def adapting(self, steps: int) -> Iterator[None]:
        """Around the gradient steps of a frame."""
        begun = self._now()
        yield
        ms = (self._now() - begun) * 1e3
        self._adapting_ms += ms
        each = ms / max(1, steps)
        self._step_ms = each if self._step_ms is None else self._step_ms + _RATE * (each - self._step_ms)

    def _now(self) -> float:
        """The time, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self.clock()

    def reset(self) -> None:
        """No debt, and nothing known of what steps take."""
        self._debt = self._other_ms = self._adapting_ms = 0.0
        self._step_ms = None

    def state_dict(self) -> None:
        """Nothing: it is about one machine at one time."""

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`; nothing is loaded."""
        return self.reset

    def mark(self) -> Callable[[], None]:
        """See `Part`; the time of a failed step is gone as well."""
        return lambda: None

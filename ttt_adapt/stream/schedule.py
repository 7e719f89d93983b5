"""The surprise gate: learn from frames that are harder than usual, leave the others alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

LENGTH = 50


class SurpriseGate:
    """Open where a loss exceeds the mean plus one standard deviation of the last 50 before it.

    The rule of the 2026 successor of "Test-Time Training on Video Streams". The standard deviation is that of the
    values held (divided by their number); with fewer than two of them the gate is open.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=LENGTH)

    def is_open(self, loss: float) -> bool:
        """Whether `loss` is a surprise; it is not taken in."""
        count = len(self._losses)
        if count < 2:
            return True
        mean = sum(self._losses) / count
        return loss > mean + math.sqrt(sum((value - mean) ** 2 for value in self._losses) / count)

    def record(self, loss: float) -> None:
        """Take in the loss of a frame; one that is not finite is left out."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def losses(self) -> list[float]:
        """The losses held, oldest first."""
        return list(self._losses)

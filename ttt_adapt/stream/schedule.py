"""Which frames are adapted to: every n-th one, and with the surprise gate the harder ones among them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ttt_adapt.errors import CheckpointError
from ttt_adapt.schema import list_of, number, shown
from ttt_adapt.stream.state_part import Part

LENGTH = 50
"""How many earlier losses the surprise gate looks at."""
_LARGEST = 3.5e38
"""No loss in float32 is larger; squares of such numbers can be added."""


def is_due(frame_index: int, every: int) -> bool:
    """Whether the frame at this position of the stream, from 0, is one of every `every` frames."""
    return frame_index % every == 0


class SurpriseGate(Part):
    """Open where a loss exceeds the mean plus one standard deviation of the last 50 losses before it.

    The rule of the 2026 successor of "Test-Time Training on Video Streams". The standard deviation divides by the
    number of losses. With fewer than two losses the gate is open.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=LENGTH)

    def is_open(self, loss: float) -> bool:
        """Whether `loss` is a surprise; it is not recorded."""
        count = len(self._losses)
        if count < 2:
            return True
        mean = sum(self._losses) / count
        return loss > mean + math.sqrt(sum((value - mean) ** 2 for value in self._losses) / count)

    def record(self, loss: float) -> None:
        """Add the loss of a frame; a loss that is not finite is left out."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def reset(self) -> None:
        """Forget all losses."""
        self._losses.clear()

    def state_dict(self) -> list[float]:
        """The recorded losses, oldest first."""
        return list(self._losses)

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        if expected := list_of(number(-_LARGEST, _LARGEST), most=LENGTH)(saved):
            raise CheckpointError(f"the state's gate is {shown(saved)}; expected the losses, {expected}")
        losses = [float(loss) for loss in saved]
        return lambda: self._put_back(losses)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        losses = self.state_dict()
        return lambda: self._put_back(losses)

    def _put_back(self, losses: Iterable[float]) -> None:
        self._losses = deque(losses, maxlen=LENGTH)

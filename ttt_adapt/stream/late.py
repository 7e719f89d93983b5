"""Numbers of a device that the host reads some frames later, when they are there anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.schema import list_of, number, shown
from ttt_adapt.stream.state_part import Part


class Late:
    """A few numbers on their way to the host.

    On a CUDA device the copy is queued at once, and reading waits for this copy alone, not for what is queued behind
    it.

    Args:
        values: a small tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))
            values = host
        self._values = values

    def read(self) -> Any:
        """The numbers, as nested lists."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Delayed(Part):
    """Numbers of one frame after the other: at once where they are on the CPU, and else `frames` frames later.

    The delay is the same in every run, so a decision that hangs on the numbers is the same too.

    Args:
        frames: how many frames later.
        count: how many numbers a frame has.
    """

    def __init__(self, frames: int, count: int) -> None:
        self._frames, self._count = frames, count
        self._waiting: deque[Late | list[float]] = deque()

    def push(self, values: Tensor) -> list[float] | None:
        """Put the numbers of a frame in; those that are due come out, or None.

        Args:
            values: [count].
        """
        self._waiting.append(Late(values))
        if len(self._waiting) <= (0 if values.device.type == "cpu" else self._frames):
            return None
        return _read(self._waiting.popleft())

    def reset(self) -> None:
        """See `Part`."""
        self._waiting.clear()

    def state_dict(self) -> list[list[float]]:
        """The numbers that did not come out yet."""
        return [_read(each) for each in self._waiting]

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        if not isinstance(saved, list | tuple) or len(saved) > self._frames:
            raise CheckpointError(f"the state's guards have {shown(saved)}; expected at most {self._frames} lists")
        if expected := list_of(list_of(_number, self._count, self._count))(saved):
            raise CheckpointError(f"the state's guards have {shown(saved)}; expected {expected}")
        waiting = [[float(value) for value in each] for each in saved]
        return lambda: self._put_back(waiting)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        waiting = tuple(self._waiting)
        return lambda: self._put_back(waiting)

    def _put_back(self, waiting: Any) -> None:
        self._waiting = deque(waiting)


def _read(each: Late | list[float]) -> list[float]:
    return each.read() if isinstance(each, Late) else each


def _number(value: Any) -> str:
    """Any number, also one that is not finite: that is what guards look for."""
    return "" if isinstance(value, float) else number()(value)

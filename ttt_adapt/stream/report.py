"""StepReport: what a step did."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class StepReport:
    """What `adapt` did with one frame.

    The numbers stay on the device until somebody reads one of them. Reading waits until the step is done.

    Attributes:
        frame_index: position of the frame in the stream, from 0.
        losses: the loss before each gradient step of this frame.
        grad_norm: norm of the whole gradient before clipping, of the last step; None without a step.
        adapted: whether the weights were updated, by at least one of the steps.
        reason: why an update was left out ("every", "gate", "iterations", "no branch",
            "non-finite gradient"); "" if none was.
        ms: wall time of adapting, without the prediction, in milliseconds; on a GPU the device may still be working.
            The gate "calibrated" decides by a prediction, which is in it.

    Args:
        frame_index: as above.
        skipped: why there was no gradient step; "" if there was.
        ms: as above.
        numbers: [iterations, 2], the loss and the gradient norm of each step; None without a step.
        surprise: the loss that the surprise gate compared, if the frame was not adapted to because of it.
    """

    def __init__(
        self, frame_index: int, skipped: str, ms: float, numbers: Tensor | None = None, surprise: float | None = None
    ) -> None:
        self._frame_index, self._skipped, self._ms = frame_index, skipped, ms
        self._numbers, self._surprise = numbers, surprise
        self._read: list[list[float]] | None = None
        self._computed: torch.cuda.Event | None = None
        if numbers is not None and numbers.is_cuda:  # the reader may be on another stream than the step was
            self._computed = torch.cuda.Event()
            self._computed.record()

    @property
    def frame_index(self) -> int:
        """Position of the frame in the stream, from 0."""
        return self._frame_index

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss before each gradient step of this frame."""
        if self._numbers is None:
            return () if self._surprise is None else (self._surprise,)
        return tuple(loss for loss, _ in self._values())

    @property
    def grad_norm(self) -> float | None:
        """Norm of the whole gradient before clipping, of the last step; None without a step."""
        return None if self._numbers is None else self._values()[-1][1]

    @property
    def adapted(self) -> bool:
        """Whether the weights were updated, by at least one of the steps."""
        return self._numbers is not None and any(math.isfinite(norm) for _, norm in self._values())

    @property
    def reason(self) -> str:
        """Why an update was left out; "" if none was."""
        if self._numbers is None or all(math.isfinite(norm) for _, norm in self._values()):
            return self._skipped
        return "non-finite gradient"

    @property
    def ms(self) -> float:
        """Wall time of the whole call, in milliseconds."""
        return self._ms

    def _values(self) -> list[list[float]]:
        if self._read is None:
            assert self._numbers is not None
            if self._computed is not None:
                self._computed.synchronize()
            self._read = self._numbers.tolist()  # the one wait for the device
        return self._read

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("frame_index", "losses", "grad_norm", "adapted", "reason", "ms")}

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, StepReport) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: with the numbers read, and nothing of the device."""
        numbers = None if self._numbers is None else torch.tensor(self._values(), device="cpu")
        return vars(self) | {"_numbers": numbers, "_computed": None}

    def __repr__(self) -> str:
        return f"StepReport({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"

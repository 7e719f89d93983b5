"""StepReport: what a step did."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.stream.late import Late

ROLLED_BACK = "rolled back"
"""How the reason of a frame begins after which the video went back to its last good state, or to the source."""


class StepReport:
    """What `adapt` did with one frame.

    The numbers stay on the device until somebody reads one of them. Reading waits until the step is done.

    Attributes:
        frame_index: position of the frame in the stream, from 0.
        losses: the loss before each gradient step of this frame.
        grad_norm: norm of the whole gradient before clipping, of the last step; None without a step.
        adapted: whether the weights were updated, by at least one of the steps, and not taken back.
        reason: why an update was left out, or what a guard did; "" if neither. With several, there is a ", " between
            them.

            - by the configuration: "every", "gate", "iterations", "no branch";
            - the frame: "blank", "frozen" (not adapted to, and not in the window); "cut", where `on_cut` acts;
            - the step: "non-finite gradient", "non-finite loss", "loss spike" (left out), "non-finite statistics" (put
              back);
            - the weights: "drift" (they are moved back to `max_drift`);
            - "rolled back: non-finite prediction", "rolled back: class collapse", "rolled back: non-finite weights";
            - "max_ms": no or fewer gradient steps, since the stream is behind its frames.
        ms: wall time of adapting, without the prediction, in milliseconds; on a GPU the device may still be working.
            The gate "calibrated" decides by a prediction, which is in it.

    Args:
        frame_index: as above.
        skipped: why there was no gradient step; "" if there was.
        ms: as above.
        numbers: [iterations, 2], the loss and the gradient norm of each step; None without a step. With guards there is
            a third column: 1 for a step that was taken, and 2 more in the first row for statistics that were left out.
        surprise: the loss that the surprise gate compared, if the frame was not adapted to because of it.
        remarks: what guards did beside leaving steps out.
    """

    def __init__(
        self,
        frame_index: int,
        skipped: str,
        ms: float,
        numbers: Tensor | None = None,
        surprise: float | None = None,
        remarks: tuple[str, ...] = (),
    ) -> None:
        self._frame_index, self._skipped, self._ms = frame_index, skipped, ms
        self._surprise, self._remarks = surprise, remarks
        self._read: list[list[float]] | None = None
        self._numbers = None if numbers is None else Late(numbers)
        self.on_device = numbers is not None and numbers.device.type != "cpu"

    def add_remark(self, remark: str) -> None:
        """Note what a guard did after the step."""
        self._remarks = (*self._remarks, remark)

    @property
    def frame_index(self) -> int:
        """Position of the frame in the stream, from 0."""
        return self._frame_index

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss before each gradient step of this frame."""
        if self._numbers is None:
            return () if self._surprise is None else (self._surprise,)
        return tuple(row[0] for row in self._values())

    @property
    def grad_norm(self) -> float | None:
        """Norm of the whole gradient before clipping, of the last step; None without a step."""
        return None if self._numbers is None else self._values()[-1][1]

    @property
    def adapted(self) -> bool:
        """Whether the weights were updated, by at least one of the steps, and not taken back."""
        taken_back = any(remark.startswith(ROLLED_BACK) for remark in self._remarks)
        return self._numbers is not None and not taken_back and not all(map(_left_out, self._values()))

    @property
    def reason(self) -> str:
        """Why an update was left out, or what a guard did; "" if neither."""
        return ", ".join(self.reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What `reason` is made of."""
        found = [] if self._numbers is None else [_left_out(row) for row in self._values()]
        if self._numbers is not None and self._values()[0][2:] >= [2.0]:
            found.append("non-finite statistics")
        return tuple(dict.fromkeys(filter(None, (self._skipped, *found, *self._remarks))))

    @property
    def ms(self) -> float:
        """Wall time of the whole call, in milliseconds."""
        return self._ms

    def _values(self) -> list[list[float]]:
        if self._read is None:
            assert self._numbers is not None
            self._read = self._numbers.read()  # the one wait for the device
        return self._read

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("frame_index", "losses", "grad_norm", "adapted", "reason", "ms")}

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, StepReport) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: with the numbers read, and nothing of the device."""
        numbers = None if self._numbers is None else Late(torch.tensor(self._values(), device="cpu"))
        return vars(self) | {"_numbers": numbers, "on_device": False}

    def __repr__(self) -> str:
        return f"StepReport({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"


def _left_out(row: list[float]) -> str:
    """Why a step was left out, from its loss, its gradient norm and whether it was taken; "" if it was."""
    loss, norm, taken = row[0], row[1], row[2] if len(row) > 2 else 1.0
    if not math.isfinite(norm):
        return "non-finite gradient"
    if taken % 2.0:
        return ""
    return "loss spike" if math.isfinite(loss) else "non-finite loss"

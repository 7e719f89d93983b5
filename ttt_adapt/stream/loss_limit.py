"""LossLimit: which loss is a spike, decided where the loss is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import dense
from ttt_adapt.schema import shown
from ttt_adapt.stream.state_part import Part

SETTLED = 10
"""After so many losses a spike is known."""
_TIMES, _SPREADS = 8.0, 12.0
_RATE = 0.05


class LossLimit(Part):
    """A loss is a spike where it exceeds 8 times the mean loss, and the mean by 12 mean deviations.

    A spike enters the averages as the limit that it exceeds, so a loss that stays high is a spike for a few frames
    only. All is computed on the device of the loss, and nobody waits for it. The numbers are written in place: a
    recording of the device goes on with them.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: Tensor | None = None

    @property
    def _numbers(self) -> Tensor:
        """Mean, mean deviation and count, [3]; made when they are needed first, and never replaced."""
        if self._made is None:
            with torch.inference_mode(False):
                self._made = torch.zeros(3, device=self._device)
        return self._made

    @torch.no_grad()
    def fits(self, loss: Tensor) -> Tensor:
        """Whether a loss, a scalar, is finite and no spike: a bool scalar on its device. The loss is noted."""
        loss = loss.to(self._numbers)
        mean, spread, count = self._numbers.unbind()
        limit = torch.maximum(_TIMES * mean, mean + _SPREADS * spread)
        limit = torch.where(count < SETTLED, torch.inf, limit)
        finite = loss.isfinite()
        value = torch.where(finite, torch.minimum(loss, limit), mean)
        rate = (1.0 / (count + 1.0)).clamp_min(_RATE)
        spread.lerp_((value - mean).abs() * (count > 0), rate)
        mean.lerp_(value, rate)
        count.add_(finite)
        return finite & (loss <= limit)

    def reset(self) -> None:
        """Forget all losses."""
        if self._made is not None:
            self._made.zero_()

    def state_dict(self) -> Tensor:
        """Mean, mean deviation and count, [3]."""
        return torch.zeros(3, device=self._device) if self._made is None else self._made.clone()

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        fits = isinstance(saved, Tensor) and dense(saved) and saved.shape == (3,) and saved.dtype == torch.float32
        if not fits or not bool(saved.isfinite().all()) or float(saved[2]) < 0.0:
            raise CheckpointError(f"the state's limit of the loss is {shown(saved)}; expected 3 finite float32 numbers")
        return lambda: self._put_back(saved)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        before = None if self._made is None else self._made.clone()
        return lambda: self.reset() if before is None else self._put_back(before)

    def _put_back(self, numbers: Tensor) -> None:
        self._numbers.copy_(numbers)

"""A window that chooses its length on the stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttt_adapt.errors import CheckpointError, ConfigError, FrameError
from ttt_adapt.model.parameters import dense
from ttt_adapt.schema import Check, check_fields, optional, whole
from ttt_adapt.stream.state_part import Part
from ttt_adapt.theory import check_from


class AutoWindow(Part):
    """The window that theory advises for the stream so far, from one small vector per frame.

    What decides is r = sigma^2 / (beta eta)^2, the noise of one frame's gradient over the way that the gradient moves
    per frame. Both show in how far vectors g of frames m apart differ: noise counts twice and at every distance, drift
    grows with it,

        E |g_t - g_(t - m)|^2 = 2 sigma^2 + m^2 (beta eta)^2

    The left side is averaged over the stream at the distances 1, 2, 4, ... and the line in m^2 is fitted to it, least
    squares of the relative error. The window is the k in 1..capacity with the least `drift_excess_loss`. It is never
    longer than the stream since its last cut: a frame that differs from the one before by `cut` times the usual squared
    difference starts it anew.

    Memory is `reach` vectors and a few numbers, whatever the stream's length. No pass of the model is needed: the
    vector is a sample of the step's own gradient (`gradient_sketch`), which carries the noise of masks and draws.

    Args:
        capacity: longest window.
        draws: independent draws that each vector averages (the batch of the step that its gradient is of); the noise of
            one frame is that of the vector times `draws`.
        memory: frames that the averages look back.
        reach: largest distance m, a power of 2.
        cut: squared difference, in units of the usual one, that starts the window anew.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, capacity: int, *, draws: int = 1, memory: int = 64, reach: int = 8, cut: float = 16.0) -> None:
        check_from(capacity=(capacity, 1), draws=(draws, 1), memory=(memory, 1), reach=(reach, 2), cut=(cut, 1.0))
        if reach & (reach - 1):
            raise ConfigError(f"reach is {reach}; expected a power of 2")
        self.capacity, self.draws, self.memory, self.reach, self.cut = capacity, draws, memory, reach, cut
        self._lags = [2**i for i in range(reach.bit_length())]
        self.reset()

    def reset(self) -> None:
        """A new stream."""
        self._recent: list[np.ndarray] = []
        self._differences = np.zeros(len(self._lags))
        self._counts = np.zeros(len(self._lags), dtype=np.int64)
        self._since = 0

    @property
    def drift(self) -> float | None:
        """beta * eta, the way of the vector per frame; None until frames at two distances were seen."""
        fitted = self._fit()
        return None if fitted is None else math.sqrt(fitted[0])

    @property
    def noise(self) -> float | None:
        """sigma, the standard deviation of one frame's vector; None until frames at two distances were seen."""
        fitted = self._fit()
        return None if fitted is None else math.sqrt(fitted[1])

    @property
    def length(self) -> int:
        """The window for the frame that comes next, that frame included, in 1..capacity."""
        return min(self._advice(), self._since + 1)

    def update(self, sketch: Tensor | np.ndarray | Sequence[float]) -> int:
        """Take in the next frame's vector.

        Args:
            sketch: finite numbers, of one length for the whole stream.

        Returns:
            The window for this frame, this frame included, in 1..capacity.

        Raises:
            FrameError: another length than before, no numbers, or not finite; nothing has changed.
        """
        vector = self._checked(sketch)
        if self._recent and self._is_cut(vector):
            self._recent, self._since = [], 0
        for place, lag in enumerate(self._lags):
            if lag <= len(self._recent):
                self._counts[place] += 1
                difference = float(((vector - self._recent[-lag]) ** 2).sum())
                rate = 1.0 / min(int(self._counts[place]), self.memory)
                self._differences[place] += rate * (difference - self._differences[place])
        self._recent = [*self._recent, vector][-self.reach :]
        self._since += 1
        return min(self._advice(), self._since)

    def _advice(self) -> int:
        fitted = self._fit()
        if fitted is None or fitted[0] == 0.0:
            return self.capacity
        k = np.arange(1, self.capacity + 1)
        return 1 + int(np.argmin(((k - 1) / 2) ** 2 * fitted[0] + fitted[1] / k))

    def _fit(self) -> tuple[float, float] | None:
        """(squared drift, noise variance of one frame), both >= 0; None while unknown."""
        known = self._counts > 0
        if known.sum() < 2:
            return None
        y, m2 = self._differences[known], np.square(np.array(self._lags, dtype=np.float64)[known])
        if not y.any():
            return 0.0, 0.0
        weight = 1.0 / np.maximum(y, 1e-12 * y.max()) ** 2
        mean_y, mean_m2 = np.average(y, weights=weight), np.average(m2, weights=weight)
        slope = float(np.sum(weight * (m2 - mean_m2) * (y - mean_y)) / np.sum(weight * (m2 - mean_m2) ** 2))
        level = float(mean_y - slope * mean_m2)
        if slope <= 0.0:  # no drift to be seen: all of it is noise
            slope, level = 0.0, float(mean_y)
        elif level <= 0.0:  # no noise to be seen
            slope, level = float(np.sum(weight * m2 * y) / np.sum(weight * m2**2)), 0.0
        return slope, self.draws * level / 2

    def _is_cut(self, vector: np.ndarray) -> bool:
        """Whether the frame differs from the one before far more than frames of this stream do."""
        usual = self._differences[0]
        settled = self._counts[0] >= self.reach and usual > 0.0
        return bool(settled and ((vector - self._recent[-1]) ** 2).sum() > self.cut * usual)

    def _checked(self, sketch: Any) -> np.ndarray:
        values = sketch.detach().cpu().double().numpy() if isinstance(sketch, Tensor) else sketch
        vector = np.array(values, dtype=np.float64).ravel()
        expected = self._recent[-1].size if self._recent else None
        if not vector.size or (expected is not None and vector.size != expected):
            raise FrameError(f"the sketch has {vector.size} numbers; expected {expected or 'at least 1'}")
        if not np.isfinite(vector).all():
            raise FrameError("the sketch holds NaN or infinity; leave out the update of a frame whose gradient does")
        return vector

    def state_dict(self) -> dict[str, Any]:
        """A copy of what was seen, as tensors and numbers."""
        recent = torch.from_numpy(np.stack(self._recent)) if self._recent else None
        return {
            "recent": recent,
            "differences": torch.from_numpy(self._differences.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
            "since": self._since,
        }

    def prepare_load(self, state: Any) -> Callable[[], None]:
        """See `Part`.

        Raises:
            CheckpointError: the state has another `reach`, or it is no state of an `AutoWindow`.
        """
        check_fields(state, _FIELDS, "the state's AutoWindow")
        differences, counts = (state[name].cpu().numpy().copy() for name in ("differences", "counts"))
        recent = [] if state["recent"] is None else [*state["recent"].cpu().numpy().copy()]
        if differences.shape != (len(self._lags),) or counts.shape != differences.shape or len(recent) > self.reach:
            raise CheckpointError(f"the state has {differences.size} distances; expected {len(self._lags)}: same reach")
        since = state["since"]
        return lambda: self._put_back(recent, differences, counts, since)

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        now = self._recent, self._differences.copy(), self._counts.copy(), self._since
        return lambda: self._put_back(*now)

    def _put_back(self, recent: list[np.ndarray], differences: np.ndarray, counts: np.ndarray, since: int) -> None:
        self._recent, self._differences, self._counts, self._since = recent, differences, counts, since


def _numbers(dtype: torch.dtype, dims: int) -> Check:
    """A tensor of finite numbers that are not negative in the vectors of means and counts."""

    def check(value: Any) -> str:
        kind = isinstance(value, Tensor) and dense(value) and value.dtype == dtype and value.ndim == dims
        fits = kind and value.numel() and bool(value.isfinite().all()) and (dims > 1 or not bool((value < 0).any()))
        return "" if fits else f"finite numbers, a tensor of {dtype} with {dims} dimensions"

    return check


_FIELDS = {
    "recent": optional(_numbers(torch.float64, 2)),
    "differences": _numbers(torch.float64, 1),
    "counts": _numbers(torch.int64, 1),
    "since": whole(),
}
"""What a saved `AutoWindow` holds."""


def gradient_sketch(parameters: Iterable[nn.Parameter], size: int = 512) -> Tensor:
    """About `size` entries of the gradient in `.grad`, always the same ones, evenly spread: one dimension.

    Raises:
        FrameError: no parameter has a gradient.
    """
    gradients = [p.grad.detach().flatten() for p in parameters if p.grad is not None]
    if not gradients:
        raise FrameError(
            "no parameter has a gradient; take the sketch after the backward pass, before they are cleared"
        )
    stride = max(1, sum(g.numel() for g in gradients) // size)
    picked, start = [], 0
    for gradient in gradients:
        picked.append(gradient[start::stride].float())
        start = (start - gradient.numel()) % stride
    return torch.cat(picked)

"""Sums that are logged after a test run, over all processes."""

from __future__ import annotations

import dataclasses

import torch
from mmengine.dist import all_reduce


@dataclasses.dataclass
class Totals:
    """Sums of a run: frames predicted, videos, losses of gradient steps, milliseconds spent on adapting, drifts."""

    frames: int = 0
    videos: int = 0
    losses: int = 0
    loss: float = 0.0
    ms: float = 0.0
    drifts: int = 0
    drift: float = 0.0

    def gathered(self) -> Totals:
        """The sums over all processes."""
        values = torch.tensor(dataclasses.astuple(self), dtype=torch.float64)
        all_reduce(values)
        frames, videos, losses, loss, ms, drifts, drift = values.tolist()
        return Totals(int(frames), int(videos), int(losses), loss, ms, int(drifts), drift)

    def summary(self, adapted: bool) -> dict[str, float]:
        """The counts and means that are logged after the run; only the frames where nothing was adapted."""
        found: dict[str, float] = {"frames": self.frames}
        if adapted:
            found["videos"] = self.videos
            found["mean_ms"] = round(self.ms / max(self.frames, 1), 2)
            found["mean_loss"] = round(self.loss / max(self.losses, 1), 6)
        if self.drifts:
            found["mean_drift"] = round(self.drift / self.drifts, 3)
        return found

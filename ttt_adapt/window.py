"""FrameWindow: explicit memory, a preallocated ring buffer of the last k frames on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FrameWindow:
    """The last `capacity` frames of a stream, and one staged frame that is not part of them yet.

    A step stages the current frame, draws from it and the frames before, and commits it when all went well; a step
    that fails leaves the window as it was. The buffer has one row for the staged frame beside the window's own; it
    is allocated at the first frame and written in place ever after.

    Args:
        capacity: number of frames k to draw from, the staged one included.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffer: Tensor | None = None
        self._committed = 0

    def __len__(self) -> int:
        return min(self._committed, self.capacity)

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(3, H, W) of the frames held; None while empty."""
        return tuple(self._buffer.shape[1:]) if self._buffer is not None and self._committed else None

    def stage(self, frame: Tensor) -> Tensor:
        """Write the current frame [3, H, W] into the spare row and return that row."""
        if self._buffer is None or self._buffer.shape[1:] != frame.shape:
            self._buffer = torch.zeros(self.capacity + 1, *frame.shape, dtype=frame.dtype, device=frame.device)
        row = self._buffer[self._committed % (self.capacity + 1)]
        row.copy_(frame)
        return row

    def commit(self) -> None:
        """Make the staged frame the newest of the window."""
        self._committed += 1

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        crop_size: tuple[int, int] | None = None,
        newest: int | None = None,
    ) -> Tensor:
        """Draw from the staged frame and those before it, with replacement.

        Args:
            count: number of draws B.
            generator: random source, on the frames' device.
            crop_size: (H, W) of a random crop for each draw, at most the frame; None: whole frames.
            newest: how many frames to draw from, the staged one included, at most `capacity`; None: all.

        Returns:
            [B, 3, H, W], a copy.
        """
        assert self._buffer is not None, "stage a frame first"
        device = self._buffer.device
        known = min(self._committed + 1, newest or self.capacity)
        age = torch.randint(known, (count,), generator=generator, device=device)
        rows = (self._committed - age) % (self.capacity + 1)
        if crop_size is None:
            return self._buffer.index_select(0, rows)
        corners = [
            torch.randint(full - side + 1, (count, 1), generator=generator, device=device)
            for full, side in zip(self._buffer.shape[-2:], crop_size, strict=True)
        ]
        y, x = (corner + torch.arange(side, device=device) for corner, side in zip(corners, crop_size, strict=True))
        return self._buffer[rows[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)

    def clear(self) -> None:
        """Forget all frames; the buffer stays for the next video."""
        self._committed = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy of the frames, [n, 3, H, W] oldest first, and how many were seen; frames is None while empty."""
        if self._buffer is None or not self._committed:
            return {"frames": None, "seen": 0}
        rows = [i % (self.capacity + 1) for i in range(self._committed - len(self), self._committed)]
        return {"frames": self._buffer[rows].clone(), "seen": self._committed}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the frames of `state_dict`."""
        self._committed = state["seen"]
        if state["frames"] is None:
            return
        frames = state["frames"].to(device)
        self._buffer = torch.zeros(self.capacity + 1, *frames.shape[1:], dtype=frames.dtype, device=device)
        for i, frame in zip(range(self._committed - len(self), self._committed), frames, strict=True):
            self._buffer[i % (self.capacity + 1)].copy_(frame)

"""FrameWindow: explicit memory, a preallocated ring buffer of the last k frames on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FrameWindow:
    """The last `capacity` frames of a stream, and one staged frame that is not part of them yet.

    A step stages the current frame, draws from it and the frames before, and commits it when all went well; a step
    that fails leaves the window as it was. The buffer has one row for the staged frame beside the window's own; it
    is allocated at the first frame and written in place ever after.

    Frames are held as the model takes them, float [3, H, W], or as they came, uint8 [H, W, 3], a quarter of the memory:
    those are normalised when they are drawn, with the same result. Once a float frame comes, all are held as floats.

    Args:
        capacity: number of frames k to draw from, the staged one included.
        normalize: uint8 [B, 3, H, W] -> float [B, 3, H, W] as the model takes it, pixel by pixel; None: floats only.
    """

    def __init__(self, capacity: int, normalize: Callable[[Tensor], Tensor] | None = None) -> None:
        self.capacity = capacity
        self._normalize = normalize
        self._buffer: Tensor | None = None
        self._committed = 0
        self._clock: Tensor | None = None

    def __len__(self) -> int:
        return min(self._committed, self.capacity)

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(3, H, W) of the frames held; None while empty."""
        if self._buffer is None or not self._committed:
            return None
        shape = tuple(self._buffer.shape[1:])
        return shape if self._buffer.is_floating_point() else (3, *shape[:2])

    def stage(self, frame: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Write the current frame into the spare row and return that row.

        Args:
            frame: float [3, H, W], as the model takes it.
            pixels: uint8 [H, W, 3], the same frame before `normalize`; None where it did not come so.
        """
        raw = self._normalize is not None and pixels is not None
        if self._buffer is not None and self._committed:
            if self._buffer.is_floating_point():
                raw = False
            elif not raw:
                self._buffer = self._as_model_input(self._buffer).contiguous()
        row = pixels if raw and pixels is not None else frame
        if self._buffer is None or self._buffer.shape[1:] != row.shape or self._buffer.dtype != row.dtype:
            self._buffer = torch.zeros(self.capacity + 1, *row.shape, dtype=row.dtype, device=row.device)
        spare = self._buffer[self._committed % (self.capacity + 1)]
        spare.copy_(row)
        return spare

    def _as_model_input(self, rows: Tensor) -> Tensor:
        """Rows of the buffer as float [B, 3, H, W]."""
        if rows.is_floating_point():
            return rows
        assert self._normalize is not None
        return self._normalize(rows.permute(0, 3, 1, 2))

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
            [B, 3, H, W], a contiguous copy.
        """
        assert self._buffer is not None, "stage a frame first"
        device = self._buffer.device
        age = torch.randint(self.known(newest), (count,), generator=generator, device=device)
        rows = ((self._committed if self._clock is None else self._clock) - age) % (self.capacity + 1)
        if crop_size is None:
            return self._as_model_input(self._buffer.index_select(0, rows)).contiguous()
        held_as_pixels = not self._buffer.is_floating_point()
        height, width = self._buffer.shape[1:3] if held_as_pixels else self._buffer.shape[-2:]
        corners = [
            torch.randint(full - side + 1, (count, 1), generator=generator, device=device)
            for full, side in zip((height, width), crop_size, strict=True)
        ]
        y, x = (corner + torch.arange(side, device=device) for corner, side in zip(corners, crop_size, strict=True))
        where = rows[:, None, None], y[:, :, None], x[:, None, :]
        if held_as_pixels:
            return self._as_model_input(self._buffer[where]).contiguous()
        return self._buffer[where[0], :, where[1], where[2]].permute(0, 3, 1, 2).contiguous()

    def known(self, newest: int | None = None) -> int:
        """How many frames a draw sees, the staged one included."""
        return min(self._committed + 1, newest or self.capacity)

    def tick(self, newest: int | None = None) -> tuple[int, ...]:
        """Let draws be recorded once and repeated as the window moves on: call it for every staged frame.

        Draws then read how many frames were committed from a number on the device, which every call writes in place.

        Returns:
            All else that a recorded draw depends on: how many frames it sees, and the memory they lie in.
        """
        assert self._buffer is not None, "stage a frame first"
        if self._clock is None or self._clock.device != self._buffer.device:
            self._clock = torch.zeros((), dtype=torch.int64, device=self._buffer.device)
        self._clock.fill_(self._committed)
        return self.known(newest), self._buffer.data_ptr()

    def clear(self) -> None:
        """Forget all frames; the buffer stays for the next video."""
        self._committed = 0

    def state_dict(self) -> dict[str, Any]:
        """A copy of the frames, oldest first, as they are held, and how many were seen; frames is None while empty."""
        if self._buffer is None or not self._committed:
            return {"frames": None, "seen": 0}
        rows = [i % (self.capacity + 1) for i in range(self._committed - len(self), self._committed)]
        return {"frames": self._buffer[rows].clone(), "seen": self._committed}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the frames of `state_dict`, all or nothing."""
        seen = state["seen"]
        if state["frames"] is not None:
            frames = state["frames"].to(device)
            buffer = torch.zeros(self.capacity + 1, *frames.shape[1:], dtype=frames.dtype, device=device)
            for i, frame in zip(range(seen - min(seen, self.capacity), seen), frames, strict=True):
                buffer[i % (self.capacity + 1)].copy_(frame)
            self._buffer = buffer
        self._committed = seen

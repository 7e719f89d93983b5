"""FrameWindow: explicit memory, the last k frames of a stream in one buffer on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import dense
from ttt_adapt.schema import whole
from ttt_adapt.stream.state_part import Part

_DAMAGED = "the state's window is damaged: it does not hold the frames that it counts"


class FrameWindow(Part):
    """The last `capacity` frames of a stream, and one staged frame that is not part of them yet.

    A step stages the current frame, draws from it and the frames before it, and commits it at the end. A step that
    fails does not commit, so the window stays as it was. The buffer is a ring: it has one row more than the window, for
    the staged frame. It is allocated at the first frame and written in place after that.

    Frames are kept as the model takes them, float [3, H, W], or as they came, uint8 [H, W, 3], in a quarter of the
    memory. Bytes are normalised when they are drawn, with the same result. Once a float frame comes, all frames are
    kept as floats.

    Args:
        capacity: number of frames k to draw from, the staged one included.
        normalize: uint8 [B, 3, H, W] -> float [B, 3, H, W] as the model takes it, pixel by pixel; None: floats only.
        dtype: of float frames.
        device: where loaded frames go; None: where they are.
    """

    def __init__(
        self,
        capacity: int,
        normalize: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.capacity = capacity
        self._normalize, self._dtype, self._device = normalize, dtype, device
        self._buffer: Tensor | None = None
        self._position: Tensor | None = None  # how many frames were committed, as a number on the device
        self._committed = 0

    def __len__(self) -> int:
        return min(self._committed, self.capacity)

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(3, H, W) of the committed frames; None while there are none."""
        if self._buffer is None or not self._committed:
            return None
        shape = tuple(self._buffer.shape[1:])
        return shape if self._buffer.is_floating_point() else (3, *shape[:2])

    @property
    def buffer(self) -> Tensor | None:
        """Where the frames are kept, [capacity + 1, ...]; None before the first frame."""
        return self._buffer

    def known(self, newest: int | None = None) -> int:
        """How many frames a draw sees, the staged one included; at most `newest`, where it is given."""
        return min(self._committed + 1, newest or self.capacity)

    def stage(self, frame: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Write the current frame into the spare row and return that row. Values that are not finite become 0.

        Args:
            frame: float [3, H, W], as the model takes it.
            pixels: uint8 [H, W, 3], the same frame before `normalize`; None where it did not come so.
        """
        as_pixels = self._normalize is not None and pixels is not None
        if self._buffer is not None and self._committed:
            if self._buffer.is_floating_point():
                as_pixels = False
            elif not as_pixels:
                self._buffer = self._as_model_input(self._buffer).contiguous()
        row = pixels if as_pixels and pixels is not None else frame
        if self._buffer is None or self._buffer.shape[1:] != row.shape or self._buffer.dtype != row.dtype:
            self._buffer = torch.zeros(self.capacity + 1, *row.shape, dtype=row.dtype, device=row.device)
        if self._position is None or self._position.device != row.device:
            self._position = torch.zeros((), dtype=torch.int64, device=row.device)
        self._position.fill_(self._committed)
        spare = self._buffer[self._committed % (self.capacity + 1)]
        if row.is_floating_point():  # as quick as a copy, and a bad frame cannot spoil the batches that draw it
            torch.nan_to_num(row.detach(), 0.0, 0.0, 0.0, out=spare)
        else:
            spare.copy_(row)
        return spare

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
        assert self._position is not None
        device = self._buffer.device
        age = torch.randint(self.known(newest), (count,), generator=generator, device=device)  # [B]
        rows = (self._position - age) % (self.capacity + 1)  # [B]
        if crop_size is None:
            return self._as_model_input(self._buffer.index_select(0, rows)).contiguous()
        held_as_pixels = not self._buffer.is_floating_point()
        height, width = self._buffer.shape[1:3] if held_as_pixels else self._buffer.shape[-2:]
        corners = [
            torch.randint(full - side + 1, (count, 1), generator=generator, device=device)
            for full, side in zip((height, width), crop_size, strict=True)
        ]
        # y [B, h], x [B, w]: the rows and columns of each crop
        y, x = (corner + torch.arange(side, device=device) for corner, side in zip(corners, crop_size, strict=True))
        where = rows[:, None, None], y[:, :, None], x[:, None, :]
        if held_as_pixels:
            return self._as_model_input(self._buffer[where]).contiguous()
        return self._buffer[where[0], :, where[1], where[2]].permute(0, 3, 1, 2).contiguous()

    def _as_model_input(self, rows: Tensor) -> Tensor:
        """Rows of the buffer as float [B, 3, H, W]."""
        if rows.is_floating_point():
            return rows
        assert self._normalize is not None
        return self._normalize(rows.permute(0, 3, 1, 2))

    # ---- as a part of the stream's state

    def reset(self) -> None:
        """Forget all frames; the buffer stays for the next video."""
        self._committed = 0

    def free(self) -> None:
        """See `Part`."""
        self._buffer = self._position = None
        self._committed = 0

    def mark(self) -> Callable[[], None]:
        """See `Part`."""
        committed, buffer = self._committed, self._buffer  # a frame of another size or kind brings another buffer

        def undo() -> None:
            self._committed, self._buffer = committed, buffer

        return undo

    def state_dict(self) -> dict[str, Any]:
        """A copy of the frames, oldest first, as they are kept, and how many were seen; frames is None while empty."""
        if self._buffer is None or not self._committed:
            return {"frames": None, "seen": 0}
        rows = [i % (self.capacity + 1) for i in range(self._committed - len(self), self._committed)]
        return {"frames": self._buffer[rows].clone(), "seen": self._committed}

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        """See `Part`."""
        frames, seen = self._checked(saved)
        buffer = self._buffer
        if frames is not None:
            device = self._device or frames.device
            buffer = torch.zeros(self.capacity + 1, *frames.shape[1:], dtype=frames.dtype, device=device)
            for i, frame in zip(range(seen - min(seen, self.capacity), seen), frames, strict=True):
                buffer[i % (self.capacity + 1)].copy_(frame)

        def load() -> None:
            self._buffer, self._committed = buffer, seen

        return load

    def _checked(self, saved: Any) -> tuple[Tensor | None, int]:
        """The frames and the count of a saved window.

        Raises:
            CheckpointError: this window cannot draw from them; the message says why and what to do.
        """
        if not isinstance(saved, Mapping) or saved.keys() != {"frames", "seen"}:
            raise CheckpointError(_DAMAGED)
        frames, seen = saved["frames"], saved["seen"]
        if whole()(seen):
            raise CheckpointError(_DAMAGED)
        if seen == 0 and frames is None:
            return None, 0
        if not isinstance(frames, Tensor) or not dense(frames) or not frames.ndim or not seen:
            raise CheckpointError(_DAMAGED)
        if len(frames) != min(seen, self.capacity):
            raise CheckpointError(_DAMAGED)
        pixels = frames.dtype == torch.uint8
        if pixels and self._normalize is None:
            raise CheckpointError(
                "the state's window holds uint8 frames, which this adapter cannot normalise: pass the preprocess that "
                "the state was saved with, a Normalize(mean, std) without a function around it"
            )
        if not pixels and frames.dtype != self._dtype:
            raise CheckpointError(
                f"the state's window holds {frames.dtype} frames, this adapter's model takes {self._dtype}: convert "
                "the model to the dtype that the state was saved with"
            )
        layout, channels = ("[n, H, W, 3]", -1) if pixels else ("[n, 3, H, W]", 1)
        if frames.ndim != 4 or frames.shape[channels] != 3 or not frames.numel():
            raise CheckpointError(f"the state's window holds frames {tuple(frames.shape)}; expected {layout}")
        if not pixels and not bool(frames.isfinite().all()):
            raise CheckpointError("the state's window holds frames with NaN or infinite values: it is damaged")
        return frames, seen

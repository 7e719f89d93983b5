"""Decoded frames as they are meant to be seen: RGB, upright, on white, and for an ordinary display."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_adapt.errors import warn
from ttt_adapt.video.hdr import HLG, PQ, tone_map

if TYPE_CHECKING:
    from av import VideoFrame

_OFF_AXIS = 0.02
"""How far a display matrix may be from a multiple of 90 degrees, as a part of its largest number."""


class ToRGB:
    """Turns the decoded frames of one source into arrays, and says once what it does to them.

    - Transparent pixels are shown on white, as those of pictures are.
    - HDR (PQ, HLG) is mapped to an ordinary display: see `ttt_adapt.video.hdr`.
    - The display matrix turns and mirrors the frame, in steps of 90 degrees.

    Args:
        name: of the source, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name, self._said = name, set[str]()
        self._display: tuple[int, bytes | None] | None = None  # the angle of the frame before, and its matrix

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """The frame as it is meant to be seen, uint8 RGB [H, W, 3]."""
        return self._turned(self._pixels(frame), self._matrix(frame))

    def say(self, what: str) -> None:
        """Warn that something is done to the frames, the first time."""
        if what not in self._said:
            self._said.add(what)
            warn(f"{self._name} {what}")

    def _pixels(self, frame: VideoFrame) -> np.ndarray:
        if frame.color_trc in (PQ, HLG):
            self.say(
                f"is HDR ({'PQ' if frame.color_trc == PQ else 'HLG'}): it is mapped to ordinary brightness, BT.709"
            )
            return tone_map(frame.to_ndarray(format="rgb48le"), frame.color_trc)
        if not _has_alpha(frame.format.name):
            return frame.to_ndarray(format="rgb24")
        rgba = frame.to_ndarray(format="rgba")
        alpha = rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        self.say("has transparent pixels: they are shown on white")
        mixed = rgba[..., :3] * alpha.astype(np.uint16) + 255 * (255 - alpha.astype(np.uint16))  # at most 255 * 255
        return ((mixed + 127) // 255).astype(np.uint8)

    def _matrix(self, frame: VideoFrame) -> bytes | None:
        """The frame's display matrix; it is read again where the angle changes.

        PyAV's frame and its side data refer to each other, so that they live until the next garbage collection. A tiny
        copy is asked instead: a frame would keep the decoder's memory, which a forked process must not free.
        """
        if self._display is None or self._display[0] != frame.rotation:
            matrix: Any = frame.reformat(width=16, height=16, format="rgb24").side_data.get("DISPLAYMATRIX")
            self._display = frame.rotation, None if matrix is None else bytes(matrix)
        return self._display[1]

    def _turned(self, image: np.ndarray, matrix: bytes | None) -> np.ndarray:
        """The image, turned and mirrored as the nine numbers say (16.16 fixed point, y down, row vectors)."""
        if matrix is None:
            return image
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.float64)
        straight, swapped = abs(a) + abs(d), abs(b) + abs(c)
        if min(straight, swapped) > _OFF_AXIS * max(straight, swapped):
            self.say("asks to be turned by an angle that is no multiple of 90 degrees: the nearest one is taken")
        if swapped > straight:
            image, down, right = image.swapaxes(0, 1), b, c
        else:
            down, right = d, a
        return np.ascontiguousarray(image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


@functools.cache
def _has_alpha(name: str) -> bool:
    """Whether frames of a pixel format have an alpha channel."""
    from av import VideoFormat

    kind = VideoFormat(name)
    return kind.has_palette or any(component.is_alpha for component in kind.components)

"""Short streams made of stills: a crop moves over a still, as a camera that turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ttt_adapt.calibration.agreement import class_ids

SHARE = 0.8
"""Side of the crop, of the still's."""


def pan(still: np.ndarray, label: Any | None, frames: int) -> Iterator[tuple[np.ndarray, Any | None]]:
    """Frames of the still's own size, in which a crop of it moves from the upper left to the lower right.

    Args:
        still: uint8 [H, W, 3].
        label: class ids [H, W], which move with it; None, or one id for the whole still, stays as it is.
        frames: how many.
    """
    height, width = still.shape[:2]
    h, w = max(round(height * SHARE), 1), max(round(width * SHARE), 1)
    for step in np.linspace(0.0, 1.0, frames):
        y, x = round(step * (height - h)), round(step * (width - w))
        ids = label
        if label is not None and np.ndim(label) == 2:
            ids = _resized(class_ids(label).numpy()[y : y + h, x : x + w, None], (height, width), "nearest")[..., 0]
        yield _resized(still[y : y + h, x : x + w], (height, width), "bilinear"), ids


def _resized(picture: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """[h, w, C] -> [H, W, C] of the same type."""
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    smooth = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x, size, mode=mode, **smooth)[0].permute(1, 2, 0).round().numpy().astype(picture.dtype)

"""Points that lie between pixels, drawn into a picture: drops of rain, and the shapes of blur."""

from __future__ import annotations

import numpy as np


def splat(x: np.ndarray, y: np.ndarray, strength: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Points between pixels, each shared by the four pixels around it; those outside of the picture are left out.

    Args:
        x, y: places of the points; the first pixel is at 0.
        strength: of the points, of the same shape.
        size: (height, width) of the picture.

    Returns:
        float64 [height, width], the sum of all points.
    """
    height, width = size
    stride = width + 2  # with a border that takes what lies outside
    left, top = np.floor(x), np.floor(y)
    right, down = x - left, y - top
    inside = (left >= -1) & (left < width) & (top >= -1) & (top < height)
    first = (np.where(inside, top + 1, 0) * stride + np.where(inside, left + 1, 0)).astype(np.int64)
    strength = np.where(inside, strength, 0)
    places = [first, first + 1, first + stride, first + stride + 1]
    upper, lower = strength * (1 - down), strength * down
    shares = [upper * (1 - right), upper * right, lower * (1 - right), lower * right]
    total = np.bincount(np.ravel(places), np.ravel(shares), (height + 2) * stride)
    return total.reshape(height + 2, stride)[1:-1, 1:-1]

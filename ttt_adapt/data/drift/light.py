"""Drifts of light and of the camera's exposure: every pixel changes by its own value alone."""

from __future__ import annotations

import math

import numpy as np

from ttt_adapt.data.drift.moment import Moment, level, to_bytes

_DISPLAY_GAMMA = 2.2
"""Pixel values are about the light to the power of 1 / 2.2."""


def night(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """Dark and blue, with the noise of a sensor at high gain.

    With x in [0, 1]: gain * tint * x ** gamma + noise. At severity 3 gamma is 2.2 and the gain is 0.45.
    """
    gamma = level(severity, 1.0, 1.5, 1.85, 2.2, 2.45, 2.7)
    gain = level(severity, 1.0, 0.75, 0.6, 0.45, 0.36, 0.28)
    blue = level(severity, 0.0, 0.5, 0.75, 1.0, 1.15, 1.3)
    sigma = level(severity, 0.0, 0.008, 0.014, 0.02, 0.026, 0.032)
    tint = 1 + blue * np.array([-0.25, -0.08, 0.22])
    dark = np.minimum(gain * tint * np.linspace(0, 1, 256)[:, None] ** gamma, 1)
    spread = sigma * np.sqrt(1 + 4 * dark)  # noise of the read-out, and of the light itself
    noise = moment.fresh().standard_normal(frame.shape, dtype=np.float32)
    return to_bytes(look_up(dark, frame) + noise * look_up(spread, frame))


def low_contrast(frame: np.ndarray, severity: float, _moment: Moment) -> np.ndarray:
    """All values move toward the mean colour of the frame."""
    share = np.float32(level(severity, 1.0, 0.75, 0.55, 0.4, 0.27, 0.16))
    mean = frame.mean((0, 1), dtype=np.float32)
    return to_bytes(mean + (frame - mean) * share)


def white_balance(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """Red and blue light are weighed wrongly: orange for even seeds, blue for odd ones. The same in every frame."""
    stops = level(severity, 0.0, 0.25, 0.5, 0.8, 1.15, 1.6) * (1 if moment.seed % 2 == 0 else -1)
    return _expose(frame, np.array([stops, 0.0, -stops]))


def exposure_flicker(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """The exposure jumps from frame to frame, on top of a slow wave; highlights burn out."""
    most = level(severity, 0.0, 0.8, 1.5, 2.3, 3.2, 4.2)
    wave = math.sin(2 * math.pi * (moment.index / 24 + moment.steady().random()))
    stops = most * (0.4 * wave + 0.6 * moment.fresh().uniform(-1, 1))
    return _expose(frame, np.full(3, stops))


def look_up(table: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Replace values by those of a table.

    Args:
        table: [256, 3], for every value of every channel a number; 1 stands for 255.
        frame: uint8 [H, W, 3].

    Returns:
        float32 [H, W, 3].
    """
    numbers, found = (table * 255).astype(np.float32), np.empty(frame.shape, np.float32)
    for channel in range(3):
        found[..., channel] = numbers[:, channel].take(frame[..., channel])
    return found


def _expose(frame: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Channels with 2 ** stops times the light; `stops` is [3]."""
    factors = 2.0 ** (stops / _DISPLAY_GAMMA)
    return to_bytes(look_up(np.linspace(0, 1, 256)[:, None] * factors, frame))

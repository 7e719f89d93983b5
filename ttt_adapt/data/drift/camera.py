"""Drifts of lens, sensor and file: noise, two kinds of blur, compression."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import torch

from ttt_adapt.data.drift.moment import Moment, level, to_bytes
from ttt_adapt.data.drift.points import splat
from ttt_adapt.video.pictures import pillow


def noise(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """Gaussian noise, independent in every pixel, channel and frame."""
    sigma = level(severity, 0.0, 0.05, 0.08, 0.13, 0.20, 0.30) * 255
    return to_bytes(frame + np.float32(sigma) * moment.fresh().standard_normal(frame.shape, dtype=np.float32))


def blur(frame: np.ndarray, severity: float, _moment: Moment) -> np.ndarray:
    """A lens out of focus: every point becomes a disc."""
    radius = level(severity, 0.0, 0.006, 0.011, 0.018, 0.027, 0.04) * len(frame)
    return _convolve(frame, _disc(radius))


def motion_blur(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """The camera moves while the shutter is open: every point becomes a line. Its direction turns slowly."""
    length = level(severity, 0.0, 0.025, 0.05, 0.085, 0.13, 0.19) * len(frame)
    first, phase = moment.steady().random(2)
    angle = math.pi * first + 0.6 * math.sin(2 * math.pi * (moment.index / 40 + phase))
    return _convolve(frame, _line(length, angle))


def jpeg(frame: np.ndarray, severity: float, _moment: Moment) -> np.ndarray:
    """Strong JPEG compression; blocks have 8 pixels at every frame size.

    Raises:
        MissingPackageError: pillow is not installed.
    """
    library, file = pillow("eval"), io.BytesIO()
    quality = round(level(severity, 95, 28, 16, 9, 6, 4))
    library.fromarray(frame).save(file, format="JPEG", quality=quality)
    return np.array(library.open(file))


def _line(length: float, angle: float) -> np.ndarray:
    """A line of that many pixels through the middle of a kernel, [k, k] with odd k; `angle` in radians."""
    reach = math.ceil(length / 2) + 1
    along = np.linspace(-length / 2, length / 2, 4 * reach + 1)
    return _kernel(along * math.cos(angle), along * math.sin(angle), reach)


@lru_cache(maxsize=8)
def _disc(radius: float) -> np.ndarray:
    """A disc of that many pixels in the middle of a kernel, [k, k] with odd k."""
    reach = math.ceil(radius) + 1
    along = np.linspace(-radius, radius, 4 * reach + 1)
    x, y = (side.ravel() for side in np.meshgrid(along, along))
    inside = np.hypot(x, y) <= radius
    return _kernel(x[inside], y[inside], reach)


def _kernel(x: np.ndarray, y: np.ndarray, reach: int) -> np.ndarray:
    """Points around the middle of a kernel of side 2 * `reach` + 1, with the sum 1."""
    side = 2 * reach + 1
    return splat(x + reach, y + reach, np.full(x.shape, 1 / len(x)), (side, side))


def _convolve(frame: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The frame under a symmetric kernel [k, k] with the sum 1, mirrored at its edges; by FFT."""
    height, width = frame.shape[:2]
    reach = len(kernel) // 2
    edges = ((reach, reach), (reach, reach), (0, 0))
    padded = torch.from_numpy(np.pad(frame, edges, mode="symmetric")).permute(2, 0, 1).float()
    size = padded.shape[1:]
    weights = torch.from_numpy(kernel.astype(np.float32))
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(weights, s=size)
    picture = torch.fft.irfft2(spectrum, s=size)[:, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return to_bytes(picture.permute(1, 2, 0).numpy())

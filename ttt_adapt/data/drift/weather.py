"""Drifts of weather that need no depth: fog and rain. Both move from frame to frame."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ttt_adapt.data.drift.moment import Moment, level, to_bytes
from ttt_adapt.data.drift.points import splat

_CELLS = 32
"""Side of the grids of random numbers that clouds of fog are made from; they repeat after it."""
_FINEST = 240
"""Largest height that streaks of rain are drawn at; taller frames get them enlarged."""


def fog(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """A light grey veil of clouds that drift slowly to the side, thinner toward the bottom, which is near."""
    height, width = frame.shape[:2]
    density = level(severity, 0.0, 0.22, 0.38, 0.54, 0.70, 0.86)
    near = 1 - 0.3 * np.linspace(0, 1, height)[:, None] ** 2
    veil = np.clip(density * near * (1 + 0.3 * _clouds((height, width), moment)), 0, 1)[..., None]
    air = np.array([198, 202, 206], dtype=np.float32)
    return to_bytes(frame + (air - frame) * veil.astype(np.float32))


def rain(frame: np.ndarray, severity: float, moment: Moment) -> np.ndarray:
    """Grey light, and streaks of falling drops. A drop falls through the picture between two frames: all are new."""
    height, width = frame.shape[:2]
    veil = np.float32(level(severity, 0.0, 0.12, 0.21, 0.30, 0.39, 0.48))
    bright = np.float32(level(severity, 0.0, 0.50, 0.65, 0.80, 0.90, 0.95))
    grey = np.array([112, 118, 124], dtype=np.float32)
    picture = frame + (grey - frame) * veil
    streaks = _streaks((height, width), severity, moment)[..., None] * bright
    return to_bytes(picture + (np.float32(215) - picture) * streaks)


def _clouds(size: tuple[int, int], moment: Moment) -> np.ndarray:
    """Smooth random numbers, about in [-1, 1], [H, W]: three grids, each finer, fainter and faster than the last."""
    height, width = size
    random = moment.steady()
    total = np.zeros(size)
    for cells, strength in ((2, 0.6), (4, 0.3), (9, 0.2)):  # cells in the height of a frame
        grid = random.uniform(-1, 1, (_CELLS, _CELLS))
        down, right = random.uniform(0, _CELLS, 2)
        moved = right + 0.012 * cells * moment.index
        rows = _smooth(down + np.arange(height) * cells / height)
        columns = _smooth(moved + np.arange(width) * cells / height)
        total += strength * (rows @ grid @ columns.T)
    return total


def _smooth(places: np.ndarray) -> np.ndarray:
    """Weights [n, `_CELLS`] that read a grid at n places along one side, with no edges between its cells."""
    whole = np.floor(places)
    part = places - whole
    part = part * part * (3 - 2 * part)
    weights = np.zeros((len(places), _CELLS))
    row = np.arange(len(places))
    weights[row, whole.astype(int) % _CELLS] = 1 - part
    weights[row, (whole.astype(int) + 1) % _CELLS] = part
    return weights


def _streaks(size: tuple[int, int], severity: float, moment: Moment) -> np.ndarray:
    """Streaks of drops, float32 [H, W] in [0, 1], all in about the direction of the wind."""
    height = min(size[0], _FINEST)
    width = max(1, round(size[1] * height / size[0]))
    random = moment.fresh()
    count = round(level(severity, 0, 120, 250, 430, 550, 650) * (width / height + 0.3))
    longest = level(severity, 0.0, 0.10, 0.13, 0.16, 0.19, 0.22) * height
    slant = moment.steady().uniform(-0.25, 0.25)
    steps = max(2, math.ceil(longest))
    along = np.linspace(-0.5, 0.5, steps)[:, None]  # of every drop's streak, [steps, 1]
    length = longest * random.uniform(0.4, 1.0, count)
    strength = random.uniform(0.25, 1.0, count) * np.cos(math.pi * along) * length / steps
    y = random.uniform(-0.1, 1.1, count) * height + along * length
    x = random.uniform(-0.15, 1.15, count) * width + along * length * (slant + random.normal(0, 0.03, count))
    canvas = splat(x, y, strength, (height, width))
    if size != canvas.shape:
        canvas = _enlarge(size[0], height) @ canvas @ _enlarge(size[1], width).T
    return np.minimum(canvas, 1).astype(np.float32)


@lru_cache(maxsize=8)
def _enlarge(to: int, side: int) -> np.ndarray:
    """Weights [to, side] of linear interpolation from `side` pixels to `to` pixels."""
    places = np.clip((np.arange(to) + 0.5) * side / to - 0.5, 0, side - 1)
    return np.maximum(0, 1 - abs(places[:, None] - np.arange(side)))

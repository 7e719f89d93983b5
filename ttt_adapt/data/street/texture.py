"""Draws the textures of the rendered street, with NumPy: noise, clouds, facades, and the ground."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

CELL = 64  # texels along each side of a facade cell
UPPER_STYLES, SHOP_STYLES = 5, 3


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int, octaves: int = 4) -> np.ndarray:
    """Tileable value noise.

    Args:
        rng: source of randomness.
        shape: height and width in texels.
        cells: lumps along the shorter side in the coarsest octave.
        octaves: number of octaves; each is twice as fine and half as strong.

    Returns:
        float32 [height, width], rescaled to [0, 1]; opposite edges fit together.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        counts = [max(1, round((cells << octave) * side / min(shape))) for side in shape]
        grid = rng.random(counts, dtype=np.float32)
        for axis in (0, 1):
            at = np.arange(shape[axis], dtype=np.float32) * np.float32(counts[axis] / shape[axis])
            low = at.astype(np.int64)
            t = at - low
            t = (t * t * (3 - 2 * t)).reshape((-1, 1) if axis == 0 else (1, -1))
            first, second = grid.take(low, axis), grid.take((low + 1) % counts[axis], axis)
            grid = first + (second - first) * t
        total += grid * np.float32(0.5**octave)
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def box_blur(image: np.ndarray, radius: tuple[int, ...]) -> np.ndarray:
    """Mean over a wrapped neighbourhood.

    Args:
        image: float [h, ...].
        radius: texels to each side, one for each of the first axes.

    Returns:
        float32 of the same shape.
    """
    out = image.astype(np.float32)
    for axis, reach in enumerate(radius):
        if reach:
            size = out.shape[axis]
            span = np.concatenate([out.take(np.arange(-reach - 1, 0), axis, mode="wrap"), out], axis)
            span = np.concatenate([span, out.take(np.arange(reach), axis, mode="wrap")], axis)
            run = np.cumsum(span, axis, dtype=np.float64)
            width = 2 * reach + 1
            ends = run.take(np.arange(width, width + size), axis) - run.take(np.arange(size), axis)
            out = (ends / width).astype(np.float32)
    return out


def _box(u: np.ndarray, v: np.ndarray, u0: float, u1: float, v0: float, v1: float) -> np.ndarray:
    return (u >= u0) & (u < u1) & (v >= v0) & (v < v1)


@lru_cache(maxsize=1)
def facade_cells() -> np.ndarray:
    """One window bay of every facade style, at five levels of blur.

    Returns:
        float32 [level, style, row, column, weight]; row 0 at the foot. The weights multiply the wall's colour, the
        window's and the accent's. Styles 0 to 4 are upper floors, 5 to 7 shop fronts.
    """
    rng = np.random.default_rng(20)
    v, u = np.meshgrid(*[(np.arange(CELL) + 0.5) / CELL] * 2, indexing="ij")
    styles = UPPER_STYLES + SHOP_STYLES
    cells = np.zeros((styles, CELL, CELL, 3), np.float32)
    course = (v * 16).astype(int)
    joint = ((v * 16) % 1 < 0.2) | ((u * 6 + 0.5 * (course % 2)) % 1 < 0.1)
    brick = 0.84 + 0.28 * rng.random((17, 13))[course, (u * 12 + course % 2).astype(int)]
    plaster = 0.9 + 0.2 * smooth_noise(rng, (CELL, CELL), 6)
    for style in range(styles):
        wall = np.where(joint, 0.72, brick) if style in (0, 3) else plaster
        u0, u1, v0, v1 = ((0.28, 0.72, 0.22, 0.8), (0.3, 0.7, 0.12, 0.86), (0.06, 0.94, 0.34, 0.82),
                          (0.2, 0.8, 0.16, 0.82), (0.34, 0.66, 0.2, 0.82), (0.08, 0.92, 0.14, 0.7),
                          (0.06, 0.6, 0.12, 0.68), (0.12, 0.88, 0.1, 0.66))[style]  # fmt: skip
        frame = _box(u, v, u0 - 0.05, u1 + 0.05, v0 - 0.05, v1 + 0.05)
        glass = _box(u, v, u0, u1, v0, v1)
        bars = glass & ((np.abs(u - (u0 + u1) / 2) < 0.025) | (np.abs(v - (v0 + 0.62 * (v1 - v0))) < 0.022))
        accent = (frame & ~glass) | bars
        shadow = _box(u, v, u0 - 0.04, u1 + 0.04, v0 - 0.13, v0 - 0.05)
        wall = np.where(shadow, wall * 0.7, wall)
        if style == 3:
            accent |= _box(u, v, 0.08, 0.92, 0.12, 0.34) & ((u * 14) % 1 < 0.45)
            accent |= _box(u, v, 0.06, 0.94, 0.33, 0.37)
        if style == 4:
            accent |= (_box(u, v, 0.17, 0.32, v0, v1) | _box(u, v, 0.68, 0.83, v0, v1)) & ((v * 20) % 1 < 0.7)
        if style >= UPPER_STYLES:
            accent |= _box(u, v, 0.0, 1.0, 0.76, 0.95)
        if style == 6:
            accent |= _box(u, v, 0.68, 0.9, 0.0, 0.66)
        if style == 7:
            accent |= _box(u, v, 0.05, 0.95, 0.6, 0.76) & ((u * 5) % 1 < 0.5)
        glass &= ~accent
        tone = np.clip(0.55 + 0.5 * (v - v0) / (v1 - v0) + 0.22 * ((u + 0.6 * v) % 0.5 < 0.14), 0.4, 1.3)
        cells[style, ..., 0] = np.where(glass | accent, 0.0, wall)
        cells[style, ..., 1] = np.where(glass, tone, 0.0)
        cells[style, ..., 2] = np.where(accent, 0.95, 0.0)
    levels = [cells]
    for reach in (1, 3, 8, 24):
        levels.append(np.stack([box_blur(cell, (reach, reach)) for cell in cells]))
    return np.stack(levels)


@lru_cache(maxsize=1)
def clouds() -> np.ndarray:
    """Cloud density, float32 [512, 512] in [0, 1], tileable."""
    return smooth_noise(np.random.default_rng(21), (512, 512), 5, 6)


@lru_cache(maxsize=1)
def ground_noise() -> tuple[np.ndarray, np.ndarray]:
    """Fine and coarse grain of the ground, two float32 [480, 528] in [0, 1], tileable."""
    rng = np.random.default_rng(22)
    fine = 0.6 * rng.random((480, 528), dtype=np.float32) + 0.4 * smooth_noise(rng, (480, 528), 120, 1)
    return fine, smooth_noise(rng, (480, 528), 6, 5)


@lru_cache(maxsize=2)
def ground_cells(solid_line: bool) -> np.ndarray:
    """The street's surface from x = -11 m to 11 m along 24 m, at four levels of blur; it repeats along the street.

    Args:
        solid_line: the middle of the road has an unbroken line rather than dashes.

    Returns:
        float32 [level, 480 along, 528 across, 3]: shade of the surface, share of road paint, depth of puddles.
    """
    fine, coarse = ground_noise()
    z, x = np.meshgrid((np.arange(480) + 0.5) / 20, (np.arange(528) + 0.5) / 24 - 11, indexing="ij")
    side = np.abs(x)
    tracks = np.exp(-(((side - 1.75 + 0.75) / 0.3) ** 2)) + np.exp(-(((side - 1.75 - 0.75) / 0.3) ** 2))
    road = 0.72 + 0.3 * fine + 0.3 * coarse - 0.07 * tracks
    road[(np.abs(coarse - 0.5) < 0.006) & (side < 5)] *= 0.8
    slab_row = (z / 0.8).astype(int)
    across = (x + 11) / 0.8 + 0.5 * (slab_row % 2)
    slab_tone = np.random.default_rng(23).random((30, 40))[slab_row % 30, across.astype(int)]
    joint = ((z % 0.8) < 0.075) | (across % 1 < 0.08)
    slabs = np.where(joint, 0.72, 0.9 + 0.16 * slab_tone) + 0.14 * (fine - 0.5) + 0.1 * (coarse - 0.5)
    kerb = (side > 5.5) & (side < 5.8)
    slabs[kerb] = (1.16 - 0.25 * ((z % 1.2) < 0.08))[kerb] + 0.06 * fine[kerb]
    gutter = (side > 5.3) & (side <= 5.5)
    road[gutter] *= 0.72
    paint = (side < 0.075) & (solid_line | (z % 8 < 3.2))
    paint |= (np.abs(side - 3.42) < 0.07) & (z % 6 < 5.2)
    worn = np.clip(1.35 - 0.9 * fine * (0.4 + coarse), 0.35, 0.95) * paint
    cells = np.stack([np.where(side > 5.5, slabs, road), worn, np.clip(1.7 * coarse - 0.25, 0.0, 1.0)], -1)
    cells = cells.astype(np.float32)
    return np.stack([cells, *(box_blur(cells, reach) for reach in ((2, 2), (8, 4), (28, 8)))])

"""Draws the trees, people and cars of the rendered street, with NumPy.

Sprites are maps of part numbers with a shade, so that one drawing serves every colour. Part 0 is transparent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ttt_adapt.data.street.texture import smooth_noise

TRUNK, LEAF = 1, 2
BODY, GLASS, DARK, TAIL_LIGHT, HEADLIGHT, PLATE, HUB = 1, 2, 3, 4, 5, 6, 7
SKIN, TOP, TROUSERS, SHOES, HAIR, BAG = 1, 2, 3, 4, 5, 6
PARTS = 8  # entries that one object's colour table holds

WALK_PHASES = 8
BELT = 0.6  # share of a car's height below its side windows


@dataclass(frozen=True)
class Sprite:
    """A drawing seen face on.

    Args:
        part: uint8 [h, w], row 0 on top; 0 where nothing is drawn.
        shade: float32 [h, w], factor on the part's colour.
    """

    part: np.ndarray
    shade: np.ndarray


@lru_cache(maxsize=1)
def tree_sprites() -> tuple[Sprite, ...]:
    """Six trees, 7 m by 5.6 m each when drawn at scale 1: trunk and a crown of lit leaf clumps."""
    return tuple(_tree(np.random.default_rng(100 + i), i) for i in range(6))


def _tree(rng: np.random.Generator, kind: int) -> Sprite:
    height, width = 200, 160
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width * 0.8 - 0.4, indexing="ij")
    y = 1.0 - y  # up, in tree heights
    part = np.zeros((height, width), np.uint8)
    shade = np.zeros((height, width), np.float32)
    grain = rng.random((1, width)) * 0.4 + 0.75
    stem = np.abs(x - 0.015 * np.sin(9 * y)) < 0.03 + 0.02 * np.exp(-y * 18) - 0.012 * y
    branch = (np.abs(np.abs(x) - 0.55 * (y - 0.32)) < 0.012) & (y > 0.32) & (y < 0.6)
    wood = (stem & (y < 0.7)) | branch
    part[wood] = TRUNK
    shade[wood] = (grain * (1.05 - 4.0 * x))[wood]
    half, low, high = ((0.3, 0.34, 0.95), (0.2, 0.26, 0.97), (0.35, 0.42, 0.9))[kind % 3]
    middle = (low + high) / 2
    leaf_grain = rng.random((height, width), dtype=np.float32)
    ragged = smooth_noise(rng, (height, width), 22, 2)
    for _ in range(46):  # clumps from the back of the crown to its front
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random()) * 0.8
        cx, cy = half * reach * np.cos(angle), middle + (high - low) / 2 * reach * np.sin(angle)
        radius = rng.uniform(0.05, 0.1)
        far = np.hypot(x - cx, y - cy) / radius
        clump = far + 0.9 * (ragged - 0.5) < 1.0
        lit = 0.66 + 0.5 * (cy - low) / (high - low) + 0.28 * ((y - cy) - 0.5 * (x - cx)) / radius
        part[clump] = LEAF
        shade[clump] = (lit * (0.72 + 0.5 * leaf_grain))[clump]
    return Sprite(part, shade)


@lru_cache(maxsize=1)
def person_sprites() -> tuple[tuple[Sprite, ...], ...]:
    """Walkers, [figure][phase of the step]: a slim one, one with a bag, one in a skirt; 1.75 m by 0.95 m."""
    return tuple(tuple(_person(kind, phase / WALK_PHASES) for phase in range(WALK_PHASES)) for kind in range(3))


def _person(kind: int, phase: float) -> Sprite:
    height, width = 128, 70
    y, x = np.meshgrid(1.75 - (np.arange(height) + 0.5) / height * 1.75,
                       (np.arange(width) + 0.5) / width * 0.95 - 0.475, indexing="ij")  # fmt: skip
    part = np.zeros((height, width), np.uint8)
    shade = np.ones((height, width), np.float32)

    def limb(x0: float, y0: float, x1: float, y1: float, thick: float, number: int, tone: float) -> None:
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        hit = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) < thick
        part[hit] = number
        shade[hit] = (tone * (1.0 - 0.9 * (x - (x0 + x1) / 2)))[hit]

    swing = np.sin(2 * np.pi * phase)
    for sign, tone in ((-1, 0.72), (1, 1.0)):  # the far limbs first
        reach = 0.2 * swing * sign
        bend = 0.07 * max(0.0, -swing * sign)
        limb(0.0, 0.88, reach * 0.55 + 0.03, 0.48 + bend, 0.085, TROUSERS, tone)
        limb(reach * 0.55 + 0.03, 0.48 + bend, reach, 0.1 + bend, 0.062, TROUSERS, tone)
        limb(reach, 0.045 + bend, reach + 0.09, 0.04 + bend, 0.045, SHOES, tone)
        limb(0.0, 1.36, -reach * 0.6, 1.08, 0.055, TOP, tone * 0.88)
        limb(-reach * 0.6, 1.08, -reach * 0.9 + 0.05, 0.86, 0.042, SKIN, tone)
        if sign == -1:
            limb(0.0, 0.95, 0.0, 1.34, 0.155, TOP, 1.0)
    if kind == 1:
        limb(-0.16, 1.05, -0.17, 1.25, 0.1, BAG, 0.95)
    if kind == 2:
        skirt = (y > 0.55) & (y < 0.98) & (np.abs(x) < 0.13 + 0.22 * (0.98 - y))
        part[skirt], shade[skirt] = TOP, (0.85 - 0.6 * x)[skirt]
    limb(0.0, 1.45, 0.01, 1.5, 0.05, SKIN, 0.85)
    limb(0.015, 1.58, 0.02, 1.63, 0.1, SKIN, 1.0)
    hair = (np.hypot(x - 0.0, y - 1.635) < 0.115) & (y + 0.55 * (-x) > (1.6 if kind != 2 else 1.52))
    part[hair], shade[hair] = HAIR, 1.0
    return Sprite(part, shade)


@dataclass(frozen=True)
class CarShape:
    """Drawings and measures of one kind of car.

    Args:
        front: seen from ahead; the full width and height.
        rear: seen from behind.
        side: seen from its left or right, front at column 0.
        length: metres.
        width: metres.
        height: metres.
        bonnet: metres from the bumper to the windscreen's foot.
        boot: metres from the rear bumper to the rear window.
    """

    front: Sprite
    rear: Sprite
    side: Sprite
    length: float
    width: float
    height: float
    bonnet: float
    boot: float


@lru_cache(maxsize=1)
def car_shapes() -> tuple[CarShape, ...]:
    """A hatchback, a saloon and a van."""
    return (_car(4.0, 1.75, 1.5, 0.9, 0.1), _car(4.6, 1.8, 1.45, 1.0, 0.7), _car(4.9, 1.95, 2.1, 0.5, 0.0))


def _car(length: float, width: float, height: float, bonnet: float, boot: float) -> CarShape:
    side = _car_side(length, height, bonnet, boot)
    return CarShape(_car_face(rear=False), _car_face(rear=True), side, length, width, height, bonnet, boot)


def _car_face(rear: bool) -> Sprite:
    rows, columns = 96, 112
    y, x = np.meshgrid(
        1.0 - (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns * 2 - 1, indexing="ij"
    )
    side = np.abs(x)
    part = np.zeros((rows, columns), np.uint8)
    shade = np.ones((rows, columns), np.float32)
    part[(y < 0.24) & (side > 0.62) & (side < 0.94)] = DARK
    lower = (y >= 0.15) & (y < BELT + 0.02) & (side < 1.0 - 3.0 * np.maximum(0, y - 0.52) ** 1.3)
    narrow = 0.93 - 0.45 * np.maximum(0, y - BELT) - 6.0 * np.maximum(0, y - 0.93) ** 1.2
    cabin = (y >= BELT) & (side < narrow)
    part[lower | cabin] = BODY
    shade[lower] = (0.8 + 0.5 * y - 0.12 * side)[lower]
    shade[cabin] = 1.02
    glass = (y > BELT + 0.04) & (y < 0.91) & (side < narrow - 0.09)
    part[glass] = GLASS
    shade[glass] = (0.75 + 0.9 * (y - BELT) + 0.5 * ((x + y) % 0.8 < 0.18))[glass]
    bumper = (y > 0.15) & (y < 0.29) & (side < 0.97)
    part[bumper], shade[bumper] = DARK, 1.25
    plate = (side < 0.27) & (y > 0.3) & (y < 0.38)
    if rear:
        lamp = (side > 0.68) & (side < 0.96) & (y > 0.40) & (y < 0.52)
        part[lamp], shade[lamp] = TAIL_LIGHT, 1.0
        seam = (np.abs(y - 0.41) < 0.012) & (side < 0.68)
        shade[seam] = 0.6
    else:
        lamp = (side > 0.6) & (side < 0.94) & (y > 0.4) & (y < 0.51)
        part[lamp], shade[lamp] = HEADLIGHT, 1.0
        grille = (side < 0.5) & (y > 0.38) & (y < 0.49)
        part[grille], shade[grille] = DARK, np.where((y * 60) % 2 < 1, 1.6, 0.8)[grille]
    part[plate], shade[plate] = PLATE, 1.0
    return Sprite(part, shade)


def _car_side(length: float, height: float, bonnet: float, boot: float) -> Sprite:
    rows, columns = 96, 240
    y, s = np.meshgrid(1.0 - (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns * length,
                       indexing="ij")  # fmt: skip
    part = np.zeros((rows, columns), np.uint8)
    shade = np.ones((rows, columns), np.float32)
    nose = np.minimum(s, length - s)
    lower = (y >= 0.15) & (y < BELT + 0.02 - 0.16 * np.maximum(0, 1 - s / (bonnet + 0.2)) ** 1.5) & (nose > 0.02)
    top = np.maximum(0, y - BELT)
    start, end = bonnet + 0.9 * top, length - boot - 0.4 * top
    cabin = (y >= BELT) & (s > start) & (s < end)
    part[lower | cabin] = BODY
    shade[lower] = (0.7 + 0.55 * y)[lower]
    crease = lower & (np.abs(y - 0.5) < 0.02)
    shade[crease] = 1.15
    middle = (bonnet + length - boot) / 2 + 0.1
    glass = (y > BELT + 0.04) & (y < 0.92) & (s > start + 0.16) & (s < end - 0.16) & (np.abs(s - middle) > 0.06)
    part[glass] = GLASS
    shade[glass] = (0.7 + 0.8 * (y - BELT) + 0.4 * ((0.5 * s + y) % 0.9 < 0.15))[glass]
    door = lower & (np.abs(s - middle) < 0.02) & (y > 0.25)
    shade[door] = 0.6
    shade[lower & (y < 0.24)] = 0.5
    for wheel in (0.19 * length, 0.8 * length):
        far = np.hypot(s - wheel, y * height - 0.32)
        part[far < 0.37], shade[far < 0.37] = DARK, 0.7
        part[far < 0.2], shade[far < 0.2] = HUB, 0.9
        spokes = (far < 0.18) & (np.cos(5 * np.arctan2(y * height - 0.32, s - wheel)) < -0.2)
        shade[spokes] = 0.5
    lamp = (y > 0.4) & (y < 0.52) & lower
    part[lamp & (s < 0.14)] = HEADLIGHT
    part[lamp & (s > length - 0.14)] = TAIL_LIGHT
    return Sprite(part, shade)

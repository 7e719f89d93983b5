"""Decides what stands and moves on the rendered street: buildings, trees, cars and people on a loop, from a seed.

Metres: x to the right of the road's middle, y up, z along the drive. The street repeats every `PERIOD` metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ttt_adapt.data.street.sprites import PARTS, WALK_PHASES
from ttt_adapt.data.street.texture import SHOP_STYLES, UPPER_STYLES

PERIOD = 480
KERB, WALL = 5.5, 9.8
SHOP_HEIGHT = 3.6
ZEBRAS = tuple(range(70, PERIOD, 120))

_WALLS = ((0.72, 0.36, 0.28), (0.80, 0.70, 0.52), (0.88, 0.84, 0.76), (0.62, 0.62, 0.64), (0.78, 0.52, 0.36),
          (0.56, 0.38, 0.32), (0.70, 0.74, 0.72), (0.86, 0.74, 0.62), (0.66, 0.56, 0.48),
          (0.84, 0.62, 0.56))  # fmt: skip
_ACCENTS = ((0.93, 0.92, 0.88), (0.30, 0.22, 0.18), (0.25, 0.38, 0.32), (0.70, 0.20, 0.18), (0.20, 0.28, 0.45),
            (0.85, 0.72, 0.30))  # fmt: skip
_PAINTS = ((0.75, 0.10, 0.10), (0.12, 0.22, 0.55), (0.90, 0.90, 0.92), (0.14, 0.14, 0.16), (0.55, 0.58, 0.62),
           (0.85, 0.65, 0.10), (0.10, 0.42, 0.38), (0.62, 0.30, 0.12), (0.30, 0.50, 0.75))  # fmt: skip
_LEAVES = ((0.30, 0.52, 0.16), (0.20, 0.44, 0.18), (0.42, 0.56, 0.18), (0.26, 0.48, 0.24), (0.52, 0.55, 0.16))
_CLOTHES = ((0.85, 0.20, 0.22), (0.95, 0.80, 0.25), (0.20, 0.45, 0.80), (0.92, 0.92, 0.92), (0.25, 0.60, 0.45),
            (0.75, 0.35, 0.65), (0.95, 0.50, 0.20), (0.25, 0.25, 0.30))  # fmt: skip
_TROUSERS = ((0.16, 0.20, 0.36), (0.20, 0.19, 0.20), (0.45, 0.38, 0.30), (0.30, 0.36, 0.46))
_SKINS = ((0.93, 0.75, 0.62), (0.78, 0.57, 0.42), (0.55, 0.37, 0.26), (0.40, 0.26, 0.19))
_HAIRS = ((0.12, 0.09, 0.08), (0.35, 0.22, 0.12), (0.75, 0.58, 0.30), (0.55, 0.53, 0.52))


@dataclass(frozen=True)
class Buildings:
    """The houses of both sides, the left side first. The first axis of an array counts them.

    Args:
        start: float32 [n], z of the near end, metres.
        height: float32 [n], metres.
        bay: float32 [n], metres from window to window.
        floor: float32 [n], metres from floor to floor.
        style: int64 [n], facade cell of the upper floors.
        shop: int64 [n], facade cell of the ground floor.
        wall: float32 [n, 3], RGB in [0, 1].
        accent: float32 [n, 3], RGB in [0, 1].
        at: int64 [2, PERIOD], which building stands at each metre on the left and the right.
    """

    start: np.ndarray
    height: np.ndarray
    bay: np.ndarray
    floor: np.ndarray
    style: np.ndarray
    shop: np.ndarray
    wall: np.ndarray
    accent: np.ndarray
    at: np.ndarray


@dataclass(frozen=True)
class Thing:
    """A tree, car or person of the street.

    Args:
        kind: which of the drawings of its class.
        x: metres from the road's middle.
        z: metres along the street at time 0.
        speed: metres per second along z.
        scale: factor on the drawing's size.
        colours: float32 [PARTS, 3], RGB in [0, 1] of each part.
        phase: where in its cycle it starts, in [0, 1).
        facing: whether its front looks towards the camera.
        leads: whether it drives about `z` metres ahead of the camera.
        crosses: whether it walks across the road while the camera comes closer.
    """

    kind: int
    x: float
    z: float
    speed: float
    scale: float
    colours: np.ndarray
    phase: float = 0.0
    facing: bool = False
    leads: bool = False
    crosses: bool = False

    def place(self, time: float, camera_z: float) -> tuple[float, float]:
        """Where it is.

        Args:
            time: seconds.
            camera_z: where the camera is along the street, metres.

        Returns:
            x in metres and the distance ahead of the camera in metres, from -20 to PERIOD - 20.
        """
        if self.leads:
            return self.x, self.z + 3.0 * np.sin(0.35 * time + 6.28 * self.phase)
        ahead = (self.z + self.speed * time - camera_z + 20.0) % PERIOD - 20.0
        if self.crosses:  # done with the camera's lane while it is still 20 m away
            return float(np.clip(6.3 - (ahead - 9.0) * 0.23 * self.scale, -6.8, 6.8)), ahead
        return self.x, ahead

    def step(self, time: float, ahead: float) -> int:
        """Which phase of the walk is drawn, from 0 to WALK_PHASES - 1."""
        travelled = 0.23 * abs(ahead) if self.crosses else abs(self.speed) * time
        return int((travelled / 1.5 + self.phase) * WALK_PHASES) % WALK_PHASES


class Layout:
    """Everything on one street.

    Args:
        rng: source of every choice.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.speed = float(rng.uniform(5.5, 7.5))
        self.start = float(rng.uniform(0, PERIOD))
        self.buildings = _buildings(rng)
        self.trees = _trees(rng)
        self.cars = _cars(rng, self.speed)
        self.people = _people(rng)

    @cached_property
    def things(self) -> tuple[Thing, ...]:
        """All trees, then all cars, then all people."""
        return (*self.trees, *self.cars, *self.people)


def _colours(**parts: tuple[float, float, float] | np.ndarray) -> np.ndarray:
    table = np.zeros((PARTS, 3), np.float32)
    for name, colour in parts.items():
        table[int(name[1:])] = colour
    return np.clip(table, 0.0, 1.0)


def _pick(rng: np.random.Generator, options: tuple[tuple[float, float, float], ...], spread: float) -> np.ndarray:
    return np.clip(np.array(options[rng.integers(len(options))]) + rng.normal(0, spread, 3), 0.05, 1.0)


def _buildings(rng: np.random.Generator) -> Buildings:
    starts: list[int] = []
    at = np.zeros((2, PERIOD), np.int64)
    for side in range(2):
        z = 0
        while z < PERIOD:
            width = int(rng.integers(8, 23))
            width = PERIOD - z if PERIOD - z - width < 8 else width
            at[side, z : z + width] = len(starts)
            starts.append(z)
            z += width
    count = len(starts)
    floor = rng.uniform(2.9, 3.5, count)
    storeys = rng.choice((1, 2, 2, 3, 3, 4, 5), count)
    return Buildings(
        start=np.array(starts, np.float32),
        height=(SHOP_HEIGHT + floor * storeys + 0.7).astype(np.float32),
        bay=rng.uniform(2.3, 3.8, count).astype(np.float32),
        floor=floor.astype(np.float32),
        style=rng.integers(0, UPPER_STYLES, count),
        shop=UPPER_STYLES + rng.integers(0, SHOP_STYLES, count),
        wall=np.stack([_pick(rng, _WALLS, 0.03) for _ in range(count)]).astype(np.float32),
        accent=np.stack([_pick(rng, _ACCENTS, 0.03) for _ in range(count)]).astype(np.float32),
        at=at,
    )


def _trees(rng: np.random.Generator) -> tuple[Thing, ...]:
    trees = []
    for side in (-1, 1):
        gap = rng.uniform(11, 20)
        for z in np.arange(rng.uniform(0, gap), PERIOD - 4, gap):
            if rng.random() < 0.15:
                continue
            colours = _colours(
                p1=_pick(rng, ((0.36, 0.27, 0.20), (0.45, 0.40, 0.34)), 0.02), p2=_pick(rng, _LEAVES, 0.03)
            )
            at = z + rng.uniform(-1.5, 1.5)
            trees.append(Thing(int(rng.integers(6)), side * 6.5, at, 0.0, float(rng.uniform(0.7, 1.15)), colours))
    return tuple(trees)


def _car(rng: np.random.Generator, x: float, z: float, speed: float, facing: bool, leads: bool = False) -> Thing:
    colours = _colours(p1=_pick(rng, _PAINTS, 0.02), p2=(0.20, 0.26, 0.32), p3=(0.07, 0.07, 0.08),
                       p4=(0.72, 0.08, 0.07), p5=(0.93, 0.94, 0.9), p6=(0.9, 0.9, 0.82),
                       p7=(0.6, 0.61, 0.63))  # fmt: skip
    kind = int(rng.choice((0, 0, 1, 1, 2)))
    return Thing(kind, x, z, speed, 1.0, colours, float(rng.random()), facing, leads)


def _cars(rng: np.random.Generator, camera_speed: float) -> tuple[Thing, ...]:
    cars = []
    if rng.random() < 0.75:
        cars.append(_car(rng, 1.75, float(rng.uniform(12, 19)), 0.0, False, leads=True))
    speed = -float(rng.uniform(6.0, 10.0))
    z = rng.uniform(0, 20)
    while z < PERIOD - 15:
        cars.append(_car(rng, -1.75 + rng.uniform(-0.2, 0.2), z, speed, True))
        z += rng.uniform(18, 55)
    for side in (-1, 1):
        z = rng.uniform(0, 10)
        while z < PERIOD - 6:
            if rng.random() < 0.4 and min(abs(z + 2.5 - zebra) for zebra in ZEBRAS) > 7:
                cars.append(_car(rng, side * (4.5 + rng.uniform(-0.1, 0.1)), z, 0.0, side < 0))
            z += rng.uniform(5.8, 9.0)
    return tuple(cars)


def _person(rng: np.random.Generator, x: float, z: float, speed: float, crosses: bool = False) -> Thing:
    colours = _colours(p1=_pick(rng, _SKINS, 0.02), p2=_pick(rng, _CLOTHES, 0.03), p3=_pick(rng, _TROUSERS, 0.02),
                       p4=_pick(rng, _TROUSERS, 0.03) * 0.7, p5=_pick(rng, _HAIRS, 0.02),
                       p6=_pick(rng, _PAINTS, 0.02))  # fmt: skip
    scale = float(rng.uniform(0.92, 1.08))
    return Thing(int(rng.integers(3)), x, z, speed, scale, colours, float(rng.random()), speed < 0, crosses=crosses)


def _people(rng: np.random.Generator) -> tuple[Thing, ...]:
    people = []
    for side in (-1, 1):
        z = rng.uniform(0, 10)
        while z < PERIOD:
            speed = float(rng.choice((-1, 1)) * rng.uniform(0.9, 1.6))
            for _ in range(int(rng.choice((1, 1, 1, 2)))):
                people.append(_person(rng, side * rng.uniform(5.9, 8.6), z + rng.uniform(0, 0.8), speed))
            z += rng.uniform(3, 9)
    for zebra in ZEBRAS:
        for offset in rng.uniform(-1.1, 1.1, int(rng.integers(1, 4))):
            people.append(_person(rng, 0.0, zebra + float(offset), 0.0, crosses=True))
    return tuple(people)

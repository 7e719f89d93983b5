"""Renders the street with its labels: a drive past houses, trees, cars and people in changing weather.

`street_stream` is a drive to adapt a model to, `street_stills` are pictures of clear days to train it on. Pictures
depend on seed, size, time and weather only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ttt_adapt.data.street.layout import PERIOD, WALL, Layout, Thing
from ttt_adapt.data.street.raster import SAMPLES, Camera, Canvas
from ttt_adapt.data.street.sprites import BELT, HEADLIGHT, PARTS, TAIL_LIGHT, car_shapes, person_sprites, tree_sprites
from ttt_adapt.data.street.surfaces import BUILDING, CAR, LABELS, PERSON, TREE, Painter
from ttt_adapt.data.street.weather import Light, Weather, drift, light_of
from ttt_adapt.errors import ConfigError

__all__ = ["CLASSES", "IGNORE", "PALETTE", "StreetScene", "Weather", "drift", "street_stills", "street_stream"]

CLASSES = LABELS
PALETTE = ((110, 170, 230), (150, 110, 95), (95, 80, 120), (225, 130, 205), (70, 150, 60), (30, 60, 200), (225, 40, 60))
IGNORE = 255  # no pixel has it; loss functions ask for an ignored label
MIN_SIZE = (48, 64)
_VIEW = 130.0  # trees, cars and people farther ahead than this are not drawn, metres


class StreetScene:
    """One street, and a camera that drives along it.

    Args:
        seed: 0 or more. Each seed is a street with its own houses, trees, traffic and camera.
        size: height and width of the pictures, pixels, at least 48 x 64.

    Raises:
        ConfigError: the seed is not an integer of 0 or more, or the size is too small or not a pair of integers.
    """

    def __init__(self, seed: int = 0, size: tuple[int, int] = (128, 192)) -> None:
        self.seed, self.size = _checked_seed(seed), _checked_size(size)
        rng = np.random.default_rng([self.seed, 1])
        self._layout = Layout(rng)
        self._camera = Camera(
            self.size,
            x=1.75 + rng.uniform(-0.35, 0.25),
            height=rng.uniform(1.45, 1.85),
            horizon=rng.uniform(0.43, 0.5),
            zoom=rng.uniform(0.72, 0.88),
        )
        self._painter = Painter(self.seed, self.size, self._camera, self._layout, rng)

    def render(self, time: float, weather: Weather = Weather()) -> tuple[np.ndarray, np.ndarray]:  # noqa: B008
        """Draw the street at one moment.

        Args:
            time: seconds since the start of the drive, 0 or more.
            weather: light and weather; a clear day if not given.

        Returns:
            The picture, uint8 [H, W, 3] RGB in [0, 255], and the labels, uint8 [H, W] with indices into `CLASSES`.
            The same call gives the same bytes.

        Raises:
            ConfigError: `time` is negative or not finite, or `weather` is no Weather.
        """
        if not isinstance(weather, Weather):
            raise ConfigError(f"weather is {type(weather).__name__}; expected a Weather such as Weather(fog=0.5).")
        if not _is_number(time) or not np.isfinite(time) or time < 0:
            raise ConfigError(f"time is {time!r}; expected seconds, finite and 0 or more.")
        light = light_of(weather)
        camera_z = float((self._layout.start + self._layout.speed * time) % PERIOD)
        canvas = Canvas(self._camera)
        houses = self._place_houses(canvas, camera_z)
        for thing in self._layout.trees:
            self._draw_tree(canvas, thing, time, camera_z, light)
        for thing in self._layout.cars:
            self._draw_car(canvas, thing, time, camera_z, light)
        for thing in self._layout.people:
            self._draw_person(canvas, thing, time, camera_z, light)
        colour = self._painter.shade(canvas, houses, time, camera_z, light)
        picture = self._painter.expose(colour, time, weather, light)
        return picture, np.ascontiguousarray(canvas.label[::SAMPLES, ::SAMPLES])

    # What stands where.

    def _place_houses(self, canvas: Canvas, camera_z: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw ground and houses. Returns for each sample: the house, metres along its front, and level of blur."""
        camera, houses = self._camera, self._layout.buildings
        top = camera.horizon
        canvas.depth[top:] = camera.ground_z
        canvas.label[top:] = self._painter.ground_label
        right = (camera.right[0] > 0).astype(np.int64)
        z = camera.wall_z[0] + camera_z
        house = houses.at[right, (z % PERIOD).astype(np.int64)]
        along = ((z - houses.start[house]) % PERIOD).astype(np.float32)
        wall = camera.above_ground & (camera.wall_y <= houses.height[house])
        np.copyto(canvas.depth, camera.wall_z, where=wall)
        np.copyto(canvas.label, np.uint8(BUILDING), where=wall)
        stretch = np.sqrt(camera.wall_z[0] / np.where(right > 0, WALL - camera.x, WALL + camera.x))
        level = np.digitize(camera.wall_z[0] / camera.focal * stretch, (0.09, 0.22, 0.5, 1.4))
        maps = tuple(np.repeat(line[None], camera.rows, 0) for line in (house, along, level))
        for side in (0, 1):
            self._draw_ends(canvas, maps, side, camera_z)
        return maps[0], maps[1], maps[2]

    def _draw_ends(self, canvas: Canvas, maps: tuple[np.ndarray, ...], side: int, camera_z: float) -> None:
        """Draw the walls that face the camera, where a house is taller than the one before it."""
        camera, houses = self._camera, self._layout.buildings
        for index in np.unique(houses.at[side]):
            before = houses.at[side, int(houses.start[index] - 1) % PERIOD]
            z = float((houses.start[index] - camera_z) % PERIOD)
            if not 1.0 < z < 200.0 or houses.height[index] <= houses.height[before]:
                continue
            edge = round(camera.column(WALL if side else -WALL, z))
            span = slice(max(edge, 0), camera.columns) if side else slice(0, max(min(edge, camera.columns), 0))
            r0 = max(0, round(camera.row(houses.height[index], z)))
            r1 = max(r0, min(camera.rows, round(camera.row(houses.height[before] - 1.0, z))))
            area = np.s_[r0:r1, span]
            hit = canvas.depth[area] > z
            if not hit.any():
                continue
            away = np.abs(camera.right[0, span] * (z / camera.focal) + camera.x) - WALL
            np.copyto(canvas.depth[area], np.float32(z), where=hit)
            np.copyto(canvas.label[area], np.uint8(BUILDING), where=hit)
            np.copyto(maps[0][area], index, where=hit)
            np.copyto(maps[1][area], -away.astype(np.float32), where=hit)  # negative marks an end wall
            np.copyto(maps[2][area], np.digitize(z / camera.focal, (0.09, 0.22, 0.5, 1.4)), where=hit)

    # What stands on the ground.

    def _draw_tree(self, canvas: Canvas, tree: Thing, time: float, camera_z: float, light: Light) -> None:
        x, z = tree.place(time, camera_z)
        if not 1.5 < z < _VIEW:
            return
        half, height = 2.8 * tree.scale, 7.0 * tree.scale
        entry = canvas.add(_glowing(tree.colours))
        canvas.face(
            tree_sprites()[tree.kind], entry, TREE, z, (x - half, x + half, 0.0, height), self._painter.sun_side > 0
        )
        canvas.shadow(x - self._painter.sun_side * 2.2, z, 2.6 * tree.scale, 2.0 * tree.scale, 0.4 * light.sun)
        canvas.shadow(x, z, 0.7, 0.7, 0.35)

    def _draw_car(self, canvas: Canvas, car: Thing, time: float, camera_z: float, light: Light) -> None:
        x, z = car.place(time, camera_z)
        shape = car_shapes()[car.kind]
        if not -shape.length < z < _VIEW:
            return
        lamps = light.lamps if car.leads or car.speed else 0.0
        entry = canvas.add(_glowing(car.colours, headlight=lamps, tail=lamps))
        half, near_side = shape.width / 2, -1 if x > self._camera.x else 1
        span = (z, z + shape.length) if car.facing else (z + shape.length, z)
        for reach, part_of in ((0.97, (0.0, BELT)), (0.86, (BELT - 0.12, 1.0))):
            canvas.side(shape.side, entry, CAR, x + near_side * half * reach, span, (0.0, shape.height), part_of)
        sprite = shape.front if car.facing else shape.rear
        box = (x - half, x + half, 0.0, shape.height)
        set_back = shape.bonnet if car.facing else shape.boot
        canvas.face(sprite, entry, CAR, z, box, part_of=(0.0, BELT if set_back > 0.3 else 1.0))
        if set_back > 0.3:
            canvas.face(sprite, entry, CAR, z + set_back, box, part_of=(0.52, 1.0))
            for share in (0.3, 0.65) if z < 12 else ():  # the bonnet's or boot's lid, seen from above
                canvas.face(sprite, entry, CAR, z + set_back * share, box, part_of=(0.52, BELT))
        for further in (0.3, 0.6) if z < 40 else ():  # closes the corners between the face and the side
            inner = (x - 0.9 * half, x + 0.9 * half, 0.0, shape.height)
            canvas.face(sprite, entry, CAR, z + set_back + further, inner, part_of=(BELT, 1.0))
        canvas.shadow(x, z + shape.length / 2, half * 1.15, shape.length * 0.56, 0.72)

    def _draw_person(self, canvas: Canvas, person: Thing, time: float, camera_z: float, light: Light) -> None:
        x, z = person.place(time, camera_z)
        if not 1.0 < z < _VIEW:
            return
        half, height = 0.475 * person.scale, 1.75 * person.scale
        sprite = person_sprites()[person.kind][person.step(time, z)]
        entry = canvas.add(_glowing(person.colours))
        canvas.face(sprite, entry, PERSON, z, (x - half, x + half, 0.0, height), x > self._camera.x)
        canvas.shadow(x, z, 0.45, 0.35, 0.5)
        canvas.shadow(x - self._painter.sun_side * 0.8, z, 0.9, 0.3, 0.4 * light.sun)


def street_stream(frames: int = 200, size: tuple[int, int] = (128, 192), seed: int = 0, fps: float = 10.0,
                  weather: Callable[[float], Weather] = drift) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """A drive along one street while light and weather change.

    Args:
        frames: number of frames, 1 or more.
        size: height and width, pixels.
        seed: which street.
        fps: frames per second of the drive.
        weather: function from the progress of the drive, in [0, 1], to the weather of that frame.

    Returns:
        An iterator of (picture uint8 [H, W, 3] RGB, labels uint8 [H, W]); a frame is drawn when it is asked for.

    Raises:
        ConfigError: at the call itself, if an argument is out of range.
    """
    _checked_count(frames, "frames")
    if not _is_number(fps) or not np.isfinite(fps) or fps <= 0:
        raise ConfigError(f"fps is {fps!r}; expected frames per second above 0, such as 10.0.")
    scene = StreetScene(seed, size)
    return (scene.render(i / fps, weather(i / max(frames - 1, 1))) for i in range(frames))


def street_stills(count: int, size: tuple[int, int] = (128, 192), seed: int = 0,
                  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Clear-day pictures to train on, each of another street at another moment.

    Args:
        count: number of pictures, 1 or more.
        size: height and width, pixels.
        seed: which set of streets. `street_stream` shows none of them for a seed below 2**20.

    Returns:
        An iterator of (picture uint8 [H, W, 3] RGB, labels uint8 [H, W]); a picture is drawn when it is asked for.

    Raises:
        ConfigError: at the call itself, if an argument is out of range.
    """
    _checked_count(count, "count")
    size, seed = _checked_size(size), _checked_seed(seed)

    def still(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, 4, index])
        scene = StreetScene(int(rng.integers(2**20, 2**62)), size)
        return scene.render(float(rng.uniform(0, 60)), Weather(darkness=float(rng.uniform(0, 0.05))))

    return (still(index) for index in range(count))


def _glowing(colours: np.ndarray, headlight: float = 0.0, tail: float = 0.0) -> np.ndarray:
    """Colours of an object's parts, and the light that the parts emit, float32 [PARTS, 6]."""
    table = np.zeros((PARTS, 6), np.float32)
    table[:, :3] = colours
    table[HEADLIGHT, 3:] = np.array([1.0, 0.95, 0.8]) * headlight
    table[TAIL_LIGHT, 3:] = np.array([0.75, 0.08, 0.06]) * tail
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(side, (int, np.integer)) for side in pair):
        raise ConfigError(f"size is {size!r}; expected (height, width) as two integers, such as (128, 192).")
    if pair[0] < MIN_SIZE[0] or pair[1] < MIN_SIZE[1]:
        raise ConfigError(f"size is {pair}; expected at least {MIN_SIZE} (height, width). Ask for a larger picture.")
    return int(pair[0]), int(pair[1])


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; expected an integer, 0 or more.")
    return int(seed)


def _checked_count(count: int, name: str) -> None:
    if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{name} is {count!r}; expected an integer, 1 or more.")

"""Paints the surfaces of the rendered street: ground, sky, houses and things in their light, as a camera records them.

Fog, rain and reflections are added by `weather`. Arrays are in samples as in `raster`; colours are RGB float32 in
[0, 1] until the camera rounds them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ttt_adapt.data.street.layout import KERB, PERIOD, SHOP_HEIGHT, WALL, ZEBRAS, Layout
from ttt_adapt.data.street.raster import Camera, Canvas
from ttt_adapt.data.street.texture import CELL, box_blur, clouds, facade_cells, ground_cells
from ttt_adapt.data.street.weather import Light, Weather, add_fog, add_rain, add_reflections, rain_streaks

LABELS = ("sky", "building", "road", "pavement", "tree", "car", "person")
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON = range(len(LABELS))
_LAMP_GAP = 24  # metres between wall lamps


class Painter:
    """Computes the colours of one street as one camera sees it.

    Args:
        seed: the noise of the camera depends on it, and on the time.
        size: height and width of the picture, pixels.
        camera: where the samples look.
        layout: what stands on the street.
        rng: source of the sun's place, the clouds and the colours of the ground.

    Attributes:
        ground_label: uint8 [rows below the horizon, columns], the class of the bare ground.
        sun_side: 1 if the sun stands to the right, -1 if to the left.
    """

    def __init__(
        self, seed: int, size: tuple[int, int], camera: Camera, layout: Layout, rng: np.random.Generator
    ) -> None:
        self._seed, self._size, self._camera, self._layout = seed, size, camera, layout
        self.sun_side = int(rng.choice((-1, 1)))
        self._sun_slope = float(rng.uniform(0.25, 0.75))
        self._exposure = float(rng.uniform(0.93, 1.05))
        self._cloud_cover, self._cloud_start = float(rng.uniform(0.42, 0.62)), rng.integers(0, 512, 2)
        self._glass = np.array([0.30, 0.36, 0.43], np.float32)
        self._prepare_ground(rng)
        self._prepare_sky()

    def _prepare_ground(self, rng: np.random.Generator) -> None:
        camera = self._camera
        self._cells = ground_cells(bool(rng.random() < 0.4)).reshape(-1, 3)
        metres = camera.ground_z[:, 0] ** 2 / (camera.focal * camera.height)  # along the street, per row
        self._ground_level = np.digitize(metres, (0.1, 0.45, 1.6))
        self._ground_column = np.clip((camera.ground_x + 11) * 24, 0, 527).astype(np.int64)
        road = np.abs(camera.ground_x) <= KERB
        self.ground_label = np.where(road, ROAD, PAVEMENT).astype(np.uint8)
        asphalt = rng.uniform(0.4, 0.5) * np.array([1.0, 1.0, 1.03]) + rng.normal(0, 0.008, 3)
        slabs = rng.uniform(0.58, 0.7) * np.array([1.0, 0.97, 0.92]) + rng.normal(0, 0.015, 3)
        self._ground_base = np.where(road[..., None], asphalt, slabs).astype(np.float32)
        # The row of houses towards the sun: how far its shadow reaches at each 0.1 m of the street.
        houses = self._layout.buildings
        reach = houses.height[houses.at[(self.sun_side + 1) // 2]].repeat(10) * np.float32(self._sun_slope)
        self._shadow_reach = box_blur(reach, (15,))
        self._sun_reach = WALL - self.sun_side * camera.ground_x
        self._shadow_shift = self._sun_reach * np.float32(rng.uniform(-0.9, 0.9))
        self._zebra = ((camera.ground_x % 1.0) < 0.52) & (np.abs(camera.ground_x) < 4.9)

    def _prepare_sky(self) -> None:
        camera = self._camera
        rows = int(camera.horizon)
        up = (-camera.down[:rows] / camera.focal).astype(np.float32)
        across = camera.right / camera.focal
        self._sky_up = np.clip(up / 0.55, 0.0, 1.0)
        self._cloud_row = (300.0 / (up + 0.12)).astype(np.int64)
        self._cloud_column = (across * 150.0 / (up + 0.25)).astype(np.int64)

    def shade(
        self, canvas: Canvas, houses: tuple[np.ndarray, ...], time: float, camera_z: float, light: Light
    ) -> np.ndarray:
        """The colour of every sample, with light, fog and reflections.

        Args:
            canvas: what each sample shows.
            houses: for each sample, house, metres along its front and level of blur, each [rows, columns].
            time: seconds.
            camera_z: where the camera is along the street, metres.
            light: the light of the frame.

        Returns:
            float32 [rows, columns, 3].
        """
        rows, columns = canvas.label.shape
        top = self._camera.horizon
        colour = np.empty((rows, columns, 3), np.float32)
        colour[top:], puddles = self._ground_colours(canvas, camera_z, light)
        colour[:top] = self._sky_colours(time, light)
        flat = colour.reshape(-1, 3)
        beams = self._beams * np.float32(light.lamps * 0.9) * np.exp(canvas.depth * np.float32(-1 / 16.0))
        beams = beams.reshape(-1, 1)

        walls = np.flatnonzero((canvas.label == BUILDING) & (canvas.entry < 0))
        flat[walls] = self._wall_colours(canvas, houses, walls, camera_z, light, beams)
        sprites = np.flatnonzero(canvas.entry >= 0)
        paint = canvas.table().take(canvas.entry.reshape(-1).take(sprites), axis=0)
        lit = light.ambient * np.float32(0.92) + beams[sprites]
        flat[sprites] = paint[:, :3] * canvas.shade.reshape(-1, 1)[sprites] * lit + paint[:, 3:]

        add_fog(colour, canvas.depth, light)
        if light.wet > 0:
            add_reflections(colour, puddles, canvas.label[top:] == self.ground_label, light)
        return colour

    @cached_property
    def _beams(self) -> np.ndarray:
        camera = self._camera
        across, down = camera.right / camera.focal, camera.down / camera.focal - 0.08
        return np.exp(-((across / 0.45) ** 2) - (down / 0.24) ** 2).astype(np.float32)

    def _lamp_glow(self, z: np.ndarray, light: Light) -> np.ndarray:
        off = (z % _LAMP_GAP) - _LAMP_GAP / 2
        return np.exp(-((off / 4.0) ** 2)).astype(np.float32) * np.float32(light.lamps)

    def _ground_colours(self, canvas: Canvas, camera_z: float, light: Light) -> tuple[np.ndarray, np.ndarray]:
        """Colours of the bare ground, and how deep the puddles are."""
        camera = self._camera
        z = camera.ground_z[:, 0] + camera_z
        first = (self._ground_level * 480 + (z * 20).astype(np.int64) % 480) * 528
        cells = self._cells.take(first[:, None] + self._ground_column, axis=0)
        paint = cells[..., 1]
        for zebra in ZEBRAS:
            rows = np.flatnonzero(np.abs((z - zebra + 240) % PERIOD - 240) < 1.7)
            paint[rows] = np.maximum(paint[rows], 0.8 * self._zebra[rows])
        colour = self._ground_base * cells[..., :1]
        colour += (np.float32(0.88) - colour) * paint[..., None]
        colour *= np.float32(1 - 0.42 * light.wet)
        origin = ((self._shadow_shift + z[:, None].astype(np.float32)) * 10).astype(np.int64) % (10 * PERIOD)
        sun = np.clip((self._sun_reach - self._shadow_reach.take(origin)) * np.float32(1.4) + 0.5, 0.0, 1.0)
        direct = 1 - np.float32(0.33 * light.sun) * (1 - sun)
        glow = self._lamp_glow(z, light)[:, None] * np.exp(-(((WALL - np.abs(camera.ground_x)) / 3.5) ** 2))
        glow = np.clip(glow, 0, None)[..., None] * np.array([0.75, 0.55, 0.3], np.float32)
        beams = self._beams[camera.horizon :] * np.exp(camera.ground_z * np.float32(-1 / 16.0))
        open_light = light.ambient * (direct * canvas.sunlight)[..., None]
        beam_light = beams[..., None] * np.array([0.9, 0.85, 0.7], np.float32) * light.lamps
        return colour * (open_light + glow + beam_light), cells[..., 2]

    def _sky_colours(self, time: float, light: Light) -> np.ndarray:
        row = (self._cloud_row + int(self._cloud_start[0])) % 512
        column = (self._cloud_column + int(self._cloud_start[1] + 4.0 * time)) % 512
        density = np.clip((clouds()[row, column] - np.float32(self._cloud_cover)) * 4.5, 0.0, 1.0)[..., None]
        density *= np.float32(1.0 - light.veil)
        ramp = self._sky_up[..., None] ** 0.8
        sky = light.sky_low + (light.sky_top - light.sky_low) * ramp
        shaded = light.cloud * (1 - 0.16 * density**2)
        return sky + (shaded - sky) * (density * (0.35 + 0.65 * ramp))

    def _wall_colours(self, canvas: Canvas, houses: tuple[np.ndarray, ...], at: np.ndarray, camera_z: float,
                      light: Light, beams: np.ndarray) -> np.ndarray:  # fmt: skip
        camera, table = self._camera, self._layout.buildings
        house, along, level = (item.reshape(-1).take(at) for item in houses)
        depth = canvas.depth.reshape(-1).take(at)
        y = camera.height - camera.down[:, 0].take(at // camera.columns) * depth * np.float32(1 / camera.focal)
        end = along < 0
        bay = along / table.bay[house] + 64
        floor = np.maximum((y - SHOP_HEIGHT) / table.floor[house] + 1, 0)
        shop = y < SHOP_HEIGHT
        floor = np.where(shop, y * np.float32(1 / SHOP_HEIGHT), floor)
        column, row = bay.astype(np.int64), floor.astype(np.int64)
        u, v = ((bay - column) * CELL).astype(np.int64), ((floor - row) * CELL).astype(np.int64)
        style = np.where(shop, table.shop[house], table.style[house])
        count = len(facade_cells()[0])
        cells = facade_cells().reshape(-1, 3).take(((level * count + style) * CELL + v) * CELL + u, axis=0)
        roof = table.height[house] - y < 0.55
        cells[roof] = (0.0, 0.0, 0.9)
        cells[end & ~roof] *= (1.0, 0.0, 0.0)
        cells[end & ~roof, 0] = 0.86
        shade = np.where((camera.right[0] > 0).take(at % camera.columns) == (self.sun_side > 0), -0.16, 0.08)
        shade = 1.0 + np.where(end, -0.08, shade).astype(np.float32) * np.float32(light.sun)
        shade *= np.float32(0.86) + 0.14 * np.clip(y * np.float32(0.4), 0, 1)
        stain = clouds()[(y * 14).astype(np.int64) % 512, (np.abs(along) * 14 + house * 37).astype(np.int64) % 512]
        shade *= 0.84 + 0.3 * stain
        glass = self._glass + (light.sky_low - self._glass) * np.float32(0.22)
        colour = table.wall[house] * (cells[:, :1] * (1 - np.float32(0.12 * light.wet)))
        colour += glass * cells[:, 1:2] + table.accent[house] * cells[:, 2:]
        glow = self._lamp_glow(depth + camera_z, light) * np.exp(-(((y - 3.4) / 2.4) ** 2)) * ~end
        lit = light.ambient * shade[:, None] + glow[:, None] * np.array([0.7, 0.5, 0.28], np.float32)
        colour *= lit + beams[at]
        chance = (house * 7919 + column * 10473 + row * 13007) * 2654435761 % 65536 // 256
        on = (chance < np.where(row == 0, 200, 120)) * cells[:, 1] * np.float32(min(1.0, 1.2 * light.lamps) * 0.85)
        return colour + on[:, None] * (np.array([0.95, 0.74, 0.42], np.float32) - 0.08 * (chance % 4)[:, None])

    def expose(self, colour: np.ndarray, time: float, weather: Weather, light: Light) -> np.ndarray:
        """The picture that the camera records, uint8 [H, W, 3]: the mean of the samples, with rain and noise."""
        height, width = self._size
        halves = colour[::2] + colour[1::2]
        picture = (halves[:, ::2] + halves[:, 1::2]) * np.float32(0.25 * self._exposure)
        bits = np.frombuffer(np.float64(time).tobytes(), np.uint32)
        rng = np.random.default_rng([self._seed, 2, *map(int, bits)])
        if weather.rain > 0:
            add_rain(picture, self._streaks, weather, light, rng)
        grain = rng.standard_normal((height, width, 3), dtype=np.float32)
        picture += grain * np.float32(light.noise) * (0.5 + np.sqrt(np.clip(picture, 0, 1)))
        return (np.clip(picture, 0.0, 1.0) * np.float32(255) + np.float32(0.5)).astype(np.uint8)

    @cached_property
    def _streaks(self) -> np.ndarray:
        return rain_streaks(np.random.default_rng([self._seed, 3]), self._size)

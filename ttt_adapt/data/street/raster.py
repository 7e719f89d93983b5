"""Camera and canvas of the rendered street: computes where each pixel looks, and draws with a depth test.

Every pixel of the picture is the mean of `SAMPLES` x `SAMPLES` samples; arrays here are in samples.
"""

from __future__ import annotations

import numpy as np

from ttt_adapt.data.street.layout import WALL
from ttt_adapt.data.street.sprites import PARTS, Sprite

SAMPLES = 2
FAR = 1.0e4  # depth of the sky, metres
NEAR = 0.7  # nothing nearer is drawn, metres


class Camera:
    """A camera that looks straight along the street, and what follows from that for every sample.

    Args:
        size: height and width of the picture, pixels.
        x: metres to the right of the road's middle.
        height: metres above the ground.
        horizon: share of the picture above the horizon.
        zoom: focal length over the picture's width.
    """

    def __init__(self, size: tuple[int, int], x: float, height: float, horizon: float, zoom: float) -> None:
        self.rows, self.columns = size[0] * SAMPLES, size[1] * SAMPLES
        self.x, self.height, self.focal = x, height, zoom * self.columns
        self.horizon = round(horizon * self.rows)
        self.middle = self.columns / 2
        self.down = (np.arange(self.rows, dtype=np.float32) + 0.5 - self.horizon)[:, None]
        self.right = (np.arange(self.columns, dtype=np.float32) + 0.5 - self.middle)[None]
        # Ground: one depth per row below the horizon.
        self.ground_z = (self.focal * height / self.down[self.horizon :]).astype(np.float32)
        self.ground_x = (x + self.right * self.ground_z / self.focal).astype(np.float32)
        # House fronts: one depth per column.
        reach = np.where(self.right > 0, WALL - x, WALL + x)
        self.wall_z = np.minimum(reach * self.focal / np.abs(self.right), 2000.0).astype(np.float32)
        self.wall_y = (height - self.down * self.wall_z / self.focal).astype(np.float32)
        self.above_ground = self.wall_y >= 0

    def column(self, x: float, z: float) -> float:
        """Column of a point `x` metres from the road's middle and `z` metres ahead."""
        return self.middle + self.focal * (x - self.x) / z

    def row(self, y: float, z: float) -> float:
        """Row of a point `y` metres above the ground and `z` metres ahead."""
        return self.horizon + self.focal * (self.height - y) / z


class Canvas:
    """What each sample shows: depth, class, and for sprites an entry of the colour table and a shade.

    Args:
        camera: where the samples look.

    Attributes:
        depth: float32 [rows, columns], metres.
        label: uint8 [rows, columns].
        entry: int32 [rows, columns], row of `table()`; -1 where no sprite is.
        shade: float32 [rows, columns].
        sunlight: float32 [rows below the horizon, columns], 1 where the ground is in the open.
    """

    def __init__(self, camera: Camera) -> None:
        shape = (camera.rows, camera.columns)
        self.camera = camera
        self.depth = np.full(shape, FAR, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.entry = np.full(shape, -1, np.int32)
        self.shade = np.ones(shape, np.float32)
        self.sunlight = np.ones(camera.ground_x.shape, np.float32)
        self._tables: list[np.ndarray] = []

    def table(self) -> np.ndarray:
        """Colours of all objects so far, float32 [objects * PARTS, channels]."""
        return np.concatenate(self._tables) if self._tables else np.zeros((1, 6), np.float32)

    def add(self, colours: np.ndarray) -> int:
        """Register an object's colour table, float32 [PARTS, channels]; returns its first entry."""
        self._tables.append(colours)
        return (len(self._tables) - 1) * PARTS

    def face(self, sprite: Sprite, entry: int, label: int, z: float, box: tuple[float, float, float, float],
             flip: bool = False, part_of: tuple[float, float] = (0.0, 1.0)) -> None:  # fmt: skip
        """Draw a sprite that faces the camera.

        Args:
            sprite: the drawing.
            entry: first entry of its colours.
            label: class of its samples.
            z: metres ahead.
            box: left, right, foot and top in metres.
            flip: mirror it.
            part_of: draw only this part of its height, shares from the foot up.
        """
        if z < NEAR:
            return
        camera = self.camera
        x0, x1, y0, y1 = box
        left, right = camera.column(x0, z), camera.column(x1, z)
        top, foot = camera.row(y1, z), camera.row(y0, z)
        cut = [foot + (top - foot) * share for share in part_of]
        c0, c1 = max(0, round(left)), min(camera.columns, round(right))
        r0, r1 = max(0, round(cut[1])), min(camera.rows, round(cut[0]))
        if c0 >= c1 or r0 >= r1:
            return
        h, w = sprite.part.shape
        u = np.clip((np.arange(c0, c1) + 0.5 - left) * (w / (right - left)), 0, w - 1).astype(np.int64)
        v = np.clip((np.arange(r0, r1) + 0.5 - top) * (h / (foot - top)), 0, h - 1).astype(np.int64)
        at = v[:, None] * w + (w - 1 - u if flip else u)
        part = sprite.part.take(at)
        self._put(np.s_[r0:r1, c0:c1], (part > 0) & (self.depth[r0:r1, c0:c1] > z), part, at, sprite, entry, label, z)

    def side(self, sprite: Sprite, entry: int, label: int, x: float, span: tuple[float, float],
             heights: tuple[float, float], part_of: tuple[float, float]) -> None:  # fmt: skip
        """Draw a sprite that lies along the street.

        Args:
            sprite: the drawing; its column 0 is at `span[0]`.
            entry: first entry of its colours.
            label: class of its samples.
            x: metres from the road's middle.
            span: metres ahead of its first and last column; the first may be the farther one.
            heights: metres of its foot and top.
            part_of: draw only this part of its height, shares from the foot up.
        """
        camera = self.camera
        if max(span) <= NEAR:
            return
        ends = sorted(camera.column(x, max(z, NEAR)) for z in span)
        c0, c1 = max(0, round(ends[0])), min(camera.columns, round(ends[1]))
        if c0 >= c1:
            return
        z = camera.focal * (x - camera.x) / camera.right[0, c0:c1]
        near = max(min(span), NEAR)
        r0 = max(0, round(min(camera.row(heights[1], near), camera.row(heights[1], max(span)))))
        r1 = min(camera.rows, round(camera.row(heights[0], near)) + 1)
        if r0 >= r1:
            return
        y = camera.height - camera.down[r0:r1] * (z / camera.focal)
        share = (y - heights[0]) / (heights[1] - heights[0])
        h, w = sprite.part.shape
        u = np.clip((z - span[0]) / (span[1] - span[0]) * w, 0, w - 1).astype(np.int64)
        v = np.clip((1.0 - share) * h, 0, h - 1).astype(np.int64)
        at = v * w + u
        part = sprite.part.take(at)
        hit = (part > 0) & (share >= part_of[0]) & (share < part_of[1]) & (self.depth[r0:r1, c0:c1] > z)
        self._put(np.s_[r0:r1, c0:c1], hit, part, at, sprite, entry, label, np.broadcast_to(z, hit.shape))

    def _put(self, area: tuple[slice, slice], hit: np.ndarray, part: np.ndarray, at: np.ndarray, sprite: Sprite,
             entry: int, label: int, z: float | np.ndarray) -> None:  # fmt: skip
        np.copyto(self.depth[area], z, where=hit, casting="same_kind")
        np.copyto(self.label[area], np.uint8(label), where=hit)
        np.copyto(self.entry[area], part.astype(np.int32) + entry, where=hit)
        np.copyto(self.shade[area], sprite.shade.take(at), where=hit)

    def shadow(self, x: float, z: float, half_width: float, half_length: float, strength: float) -> None:
        """Darken the ground under something.

        Args:
            x: metres from the road's middle.
            z: metres ahead.
            half_width: metres across.
            half_length: metres along.
            strength: share of light that is taken away.
        """
        camera = self.camera
        far, near = z + 1.5 * half_length, max(z - 1.5 * half_length, 1.0)
        if far <= 1.0 or strength <= 0.01:
            return
        r0 = max(0, int(camera.row(0.0, far)) - camera.horizon)
        r1 = min(len(camera.ground_z), int(camera.row(0.0, near)) - camera.horizon + 1)
        edges = [camera.column(x + s * 1.5 * half_width, d) for s in (-1, 1) for d in (near, far)]
        c0, c1 = max(0, int(min(edges))), min(camera.columns, int(max(edges)) + 1)
        if r0 >= r1 or c0 >= c1:
            return
        across = ((camera.ground_x[r0:r1, c0:c1] - np.float32(x)) / np.float32(half_width)) ** 2
        along = ((camera.ground_z[r0:r1] - np.float32(z)) / np.float32(half_length)) ** 2
        self.sunlight[r0:r1, c0:c1] *= 1.0 - np.float32(strength) * np.exp(-((across + along) ** 2))

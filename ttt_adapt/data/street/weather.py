"""Weather of the rendered street: when it changes, the light that follows from it, and how fog and rain are painted.

`drift` says when night, fog and rain come and go, `light_of` which colours and strengths follow. `add_fog`,
`add_reflections` and `add_rain` paint them into a picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from ttt_adapt.data.street.raster import FAR
from ttt_adapt.errors import ConfigError

_CLEAR = 0.05
"""Weather below this strength is not seen."""
_NIGHT = 0.7
"""From this darkness on, it is night and no longer dusk."""


@dataclass(frozen=True)
class Weather:
    """Light and weather of one frame; without arguments, a clear day.

    Args:
        darkness: 0 is day, 0.5 a warm dusk, 1 a blue night with lit windows and headlights.
        fog: 0 is clear air; at 1, the fog takes half of the light of an object 14 m away.
        rain: 0 is dry; 1 has dense streaks, a wet road with reflections, grey light and a noisy camera.

    Raises:
        ConfigError: a value is not a number in [0, 1].
    """

    darkness: float = 0.0
    fog: float = 0.0
    rain: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            unit_interval(getattr(self, field.name), f"Weather.{field.name}")

    @property
    def kind(self) -> str:
        """What is strongest, in words: "clear day", "dusk", "night", "fog" or "rain"."""
        name, strength = max(((field.name, getattr(self, field.name)) for field in fields(self)), key=lambda it: it[1])
        if strength < _CLEAR:
            return "clear day"
        return name if name != "darkness" else "night" if strength >= _NIGHT else "dusk"

    @property
    def title(self) -> str:
        """`kind` with its strength, such as "night 0.8"; of a clear day without."""
        strength = max(getattr(self, field.name) for field in fields(self))
        return self.kind if self.kind == "clear day" else f"{self.kind} {strength:.1f}"


def unit_interval(value: float, name: str) -> None:
    """Check that `value` is a number in [0, 1].

    Args:
        value: what to check.
        name: its name in the message.

    Raises:
        ConfigError: the value is not a number, not finite, or outside of [0, 1].
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is {value!r}; expected a number in [0, 1]. Clip or rescale it.")


# For each quantity, points (progress of the stream, value); straight lines join them. It is a clear day before, between
# and after them, so that a model which has adapted to the night or to the fog has to find back.
_SCHEDULE = {
    "darkness": ((0.06, 0.0), (0.155, 0.9), (0.245, 0.9), (0.34, 0.0)),
    "fog": ((0.39, 0.0), (0.485, 0.9), (0.555, 0.9), (0.65, 0.0)),
    "rain": ((0.70, 0.0), (0.795, 0.9), (0.865, 0.9), (0.96, 0.0)),
}


def drift(progress: float) -> Weather:
    """The weather of a stream: night, then fog, then rain; each comes and goes, and the days between are clear.

    Args:
        progress: how much of the stream has passed, in [0, 1].

    Returns:
        The weather then; it changes continuously with `progress`.

    Raises:
        ConfigError: `progress` is not a number in [0, 1].
    """
    unit_interval(progress, "progress")
    values = {}
    for name, knots in _SCHEDULE.items():
        at, value = np.array(knots).T
        values[name] = float(np.interp(progress, at, value))
    return Weather(**values)


@dataclass(frozen=True)
class Light:
    """The light of a frame, as it follows from the weather. Every colour is RGB float32 [3] in [0, 1].

    Args:
        ambient: factor on every surface colour.
        sky_top: sky at the upper edge.
        sky_low: sky at the horizon.
        cloud: clouds.
        air: the colour that distant things fade to.
        extinction: share of light lost per metre of air, in 1/m.
        veil: how much the clouds are hidden, in [0, 1].
        sun: strength of cast shadows, in [0, 1].
        lamps: strength of lamps, lit windows and headlights, in [0, 1].
        wet: how much the ground mirrors, in [0, 1].
        noise: standard deviation of the sensor noise, in units of full scale.
    """

    ambient: np.ndarray
    sky_top: np.ndarray
    sky_low: np.ndarray
    cloud: np.ndarray
    air: np.ndarray
    extinction: float
    veil: float
    sun: float
    lamps: float
    wet: float
    noise: float


# Each colour at darkness 0, 0.5 and 1.
_COLOURS = {
    "ambient": ((1.0, 1.0, 1.0), (0.70, 0.55, 0.48), (0.24, 0.26, 0.38)),
    "sky_top": ((0.34, 0.57, 0.88), (0.30, 0.33, 0.55), (0.05, 0.07, 0.17)),
    "sky_low": ((0.80, 0.89, 0.97), (0.98, 0.66, 0.40), (0.20, 0.19, 0.31)),
    "cloud": ((1.0, 1.0, 1.0), (0.90, 0.58, 0.50), (0.14, 0.14, 0.23)),
}


def light_of(weather: Weather) -> Light:
    """The light that follows from a weather.

    Args:
        weather: the weather of the frame.

    Returns:
        The light of the frame.
    """
    colour = {
        name: np.array([np.interp(weather.darkness, (0.0, 0.5, 1.0), channel) for channel in np.array(knots).T])
        for name, knots in _COLOURS.items()
    }
    overcast = max(weather.fog, 0.9 * weather.rain)
    level = 0.2 + 0.55 * float(colour["ambient"].mean()) + 0.03 * weather.fog - 0.22 * weather.rain
    grey = max(level, 0.1) * np.array([0.97, 0.99, 1.03])
    for name in ("sky_top", "sky_low", "cloud"):
        colour[name] += (
            grey * (1.0 - 0.1 * (1.0 - weather.fog) if name == "sky_top" else 1.0) - colour[name]
        ) * overcast
    flat = colour["ambient"].mean() * (1.0 - 0.12 * weather.fog - 0.4 * weather.rain)
    colour["ambient"] += (flat * np.array([0.97, 1.0, 1.04]) - colour["ambient"]) * overcast
    haze = 0.6 * colour["sky_low"] + 0.4 * colour["sky_top"]
    air = haze + (grey - haze) * overcast
    return Light(
        **{name: value.astype(np.float32) for name, value in colour.items()},
        air=air.astype(np.float32),
        extinction=0.0016 + math.log(2.0) / 14.0 * weather.fog**1.5 + 0.009 * weather.rain,
        veil=weather.fog**0.5,
        sun=max(0.0, 1.0 - 1.6 * weather.darkness) * (1.0 - overcast),
        lamps=min(1.0, 1.25 * weather.darkness + 0.25 * overcast),
        wet=weather.rain,
        noise=0.008 + 0.022 * weather.darkness + 0.018 * weather.rain,
    )


def add_fog(colour: np.ndarray, depth: np.ndarray, light: Light) -> None:
    """Let things fade to the colour of the air with their distance; the sky stays.

    Args:
        colour: float32 [rows, columns, 3], changed in place.
        depth: float32 [rows, columns], metres.
        light: the light of the frame.
    """
    clear = np.exp(depth[..., None] * np.float32(-light.extinction))
    clear[depth >= FAR] = 1.0
    colour -= light.air
    colour *= clear
    colour += light.air


def add_reflections(colour: np.ndarray, puddles: np.ndarray, bare: np.ndarray, light: Light) -> None:
    """Let wet ground show what is above it, most at a flat angle and in puddles.

    Args:
        colour: float32 [rows, columns, 3], changed in place; its last rows are the ground.
        puddles: float32 [rows of ground, columns], how deep they are.
        bare: bool [rows of ground, columns], True where nothing stands on the ground.
        light: the light of the frame.
    """
    rows, below = len(colour), len(bare)
    top = rows - below
    steps = np.arange(below)
    image = sum(colour[np.clip(top - 1 - (steps * k).astype(np.int64), 0, top - 1)] for k in (0.8, 1.0, 1.25)) / 3
    flat_angle = 1 / (1 + (steps / (0.22 * rows)) ** 2)
    strength = (0.22 + 0.42 * flat_angle[:, None]) * np.clip(0.35 + puddles, 0, 1.25) * light.wet
    strength = (strength * bare).astype(np.float32)
    colour[top:] += (image - colour[top:]) * strength[..., None]


def add_rain(
    picture: np.ndarray, streaks: np.ndarray, weather: Weather, light: Light, rng: np.random.Generator
) -> None:
    """Draw falling rain: a grey veil, and streaks at two places that `rng` chooses.

    Args:
        picture: float32 [H, W, 3], changed in place.
        streaks: of `rain_streaks`.
        weather: the weather of the frame.
        light: the light of the frame.
        rng: source of the places.
    """
    height, width = picture.shape[:2]
    veil = np.float32(0.2 * weather.rain)
    picture += (light.air - picture) * veil * np.float32(0.8)
    for strength in (0.30, 0.18):
        dy, dx = rng.integers(0, streaks.shape[0]), rng.integers(0, streaks.shape[1])
        moved = np.roll(streaks, (dy, dx), (0, 1))[:height, :width, None]
        picture += moved * np.float32(strength * weather.rain) * (light.air * 0.6 + 0.4)


def rain_streaks(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Streaks of falling drops for a picture of `size`, float32 [H + 16, W + 16] in [0, 1]."""
    height, width = size
    drops = np.where(rng.random((height + 16, width + 16)) < 0.006, rng.uniform(0.4, 1.0, (height + 16, width + 16)), 0)
    length = max(5, height // 9)
    trail = sum(np.roll(drops, (k, k // 5), (0, 1)) * (1 - abs(2 * k / length - 1)) for k in range(length))
    return np.clip(np.asarray(trail), 0, 1).astype(np.float32)

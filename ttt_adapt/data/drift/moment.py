"""When a frame is shown, and the random numbers of that moment; how a severity becomes a setting."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moment:
    """One frame's place in a drift.

    Attributes:
        name: of the drift; drifts with one seed draw different numbers.
        seed: of the drift, 0 or more.
        index: of the frame in the stream, 0 or more.
    """

    name: str
    seed: int
    index: int

    def steady(self) -> np.random.Generator:
        """Random numbers that are the same in every frame: which way the wind blows."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])

    def fresh(self) -> np.random.Generator:
        """Random numbers of this frame alone. They do not depend on which frames were asked for before."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), self.index + 1])


def level(severity: float, *values: float) -> float:
    """The setting at a severity: `values` are those at 0, 1, ..., 5; straight lines join them."""
    return float(np.interp(severity, range(len(values)), values))


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """Numbers in [0, 255], rounded and limited to it; uint8 of the same shape."""
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)

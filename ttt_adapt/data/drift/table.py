"""All drifts by name, and one drift of a certain strength: `Drift`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ttt_adapt.data.drift.camera import blur, jpeg, motion_blur, noise
from ttt_adapt.data.drift.light import exposure_flicker, low_contrast, night, white_balance
from ttt_adapt.data.drift.moment import Moment
from ttt_adapt.data.drift.weather import fog, rain
from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, nearest

SEVERITIES = (1, 2, 3, 4, 5)
"""From mild to extreme. Numbers between them, and between 0 and 1, are severities too."""
NONE = "none"
"""The name of no drift."""


class Kind(NamedTuple):
    """A kind of drift.

    Attributes:
        about: what it does to a frame, in a few words.
        paint: (uint8 RGB frame [H, W, 3], severity above 0, moment) -> another frame of the same type and shape.
    """

    about: str
    paint: Callable[[np.ndarray, float, Moment], np.ndarray]


DRIFTS = {
    "night": Kind("dark and blue, with sensor noise", night),
    "noise": Kind("Gaussian noise, new in every frame", noise),
    "fog": Kind("a grey veil of clouds that move slowly", fog),
    "rain": Kind("grey light and falling streaks, new in every frame", rain),
    "blur": Kind("a lens out of focus", blur),
    "motion-blur": Kind("a camera that moves while the shutter is open", motion_blur),
    "jpeg": Kind("strong JPEG compression", jpeg),
    "low-contrast": Kind("values close to the mean of the frame", low_contrast),
    "white-balance": Kind("a colour cast, orange for even seeds and blue for odd ones", white_balance),
    "exposure-flicker": Kind("an exposure that jumps from frame to frame", exposure_flicker),
}
"""All drifts by name. Names and idea follow "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (Hendrycks and Dietterich, ICLR 2019). The definitions are our own, and some of them move in time."""


@dataclass(frozen=True)
class Drift:
    """A drift of a certain strength: the same frame at the same index always becomes the same picture.

    Sizes in pixels, such as those of blur and raindrops, are in proportion to the frame's height. Blocks of JPEG and
    noise are not.

    Attributes:
        name: of `DRIFTS`, or "none"; underscores may stand for hyphens.
        severity: from 0 (the frame as it is) to 5 (extreme); 1 is mild. "none" has 0.
        seed: of all that is random; 0 or more.

    Raises:
        ConfigError: there is no such drift, or a number is out of range.
    """

    name: str
    severity: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        name = str(self.name).strip().replace("_", "-")
        if name != NONE and name not in DRIFTS:
            raise ConfigError(f"there is no drift {self.name!r}; {nearest(name, [*DRIFTS, NONE])}")
        if not _is_a(self.severity, numbers.Real) or not 0 <= self.severity <= SEVERITIES[-1]:
            raise ConfigError(
                f"the severity of {name} is {self.severity!r}; expected a number from 0 (no drift) to "
                f"{SEVERITIES[-1]} (extreme)"
            )
        if not _is_a(self.seed, numbers.Integral) or self.seed < 0:
            raise ConfigError(f"the seed of {name} is {self.seed!r}; expected a whole number from 0 on")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "severity", 0.0 if name == NONE else float(self.severity))
        object.__setattr__(self, "seed", int(self.seed))

    def apply(self, frame: np.ndarray, index: int = 0) -> np.ndarray:
        """The frame under this drift, as a new array.

        Args:
            frame: uint8 RGB [H, W, 3]; it is not changed.
            index: of the frame in the stream, 0 or more.

        Returns:
            uint8 RGB [H, W, 3].

        Raises:
            FrameTypeError, FrameError: the frame is no such array.
            ConfigError: the index is negative.
        """
        _check_frame(frame)
        if index < 0:
            raise ConfigError(f"index is {index}; expected the frame's place in its stream, 0 or more")
        if not self.severity:
            return frame.copy()
        return DRIFTS[self.name].paint(frame, self.severity, Moment(self.name, self.seed, int(index)))

    def __str__(self) -> str:
        """As `parse_drift` reads it: "night:3", "none"."""
        return self.name if self.name == NONE else f"{self.name}:{self.severity:g}"


def parse_drift(text: str, seed: int = 0) -> Drift:
    """ "night:3" -> Drift("night", 3); "night" has severity 3, and "none" is no drift.

    Args:
        text: NAME or NAME:SEVERITY.
        seed: of the drift.

    Raises:
        ConfigError: anything else.
    """
    name, colon, strength = text.partition(":")
    if not colon:
        return Drift(name, seed=seed)
    if name.strip() == NONE:
        raise ConfigError(f"got the drift {text!r}; {NONE!r} has no severity: leave it out")
    try:
        severity = float(strength)
    except ValueError:
        severity = math.nan
    if math.isnan(severity):
        raise ConfigError(f"got the drift {text!r}; expected NAME or NAME:SEVERITY, such as night:3")
    return Drift(name, severity, seed)


def every_drift(
    frame: np.ndarray, severities: Sequence[float] = SEVERITIES, index: int = 0, seed: int = 0
) -> Iterator[tuple[Drift, np.ndarray]]:
    """A frame under all drifts of `DRIFTS` at all severities, drift after drift: for a sheet of pictures.

    Args:
        frame: uint8 RGB [H, W, 3].
        severities: of each drift.
        index: of the frame in its stream.
        seed: of the drifts.

    Yields:
        The drift, and the frame under it.
    """
    for name in DRIFTS:
        for severity in severities:
            drift = Drift(name, severity, seed)
            yield drift, drift.apply(frame, index)


def drifted(frames: Iterable[np.ndarray], drift: Drift) -> Iterator[np.ndarray]:
    """Frames without labels under a drift, one by one.

    Args:
        frames: uint8 RGB [H, W, 3] each.
        drift: what happens to them.
    """
    return (drift.apply(frame, index) for index, frame in enumerate(frames))


def _is_a(value: Any, kind: type) -> bool:
    """Whether it is such a number, of Python or NumPy; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_frame(frame: np.ndarray) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        came = f"an array of {frame.dtype}" if isinstance(frame, np.ndarray) else f"a {type(frame).__name__}"
        raise FrameTypeError(f"got {came}; a drift expects uint8 RGB frames, NumPy arrays [H, W, 3]")
    if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise FrameError(f"got a frame of shape {list(frame.shape)}; a drift expects RGB frames [H, W, 3]")

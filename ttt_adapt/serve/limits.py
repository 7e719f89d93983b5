"""What a client of the server may ask for at most."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ttt_adapt.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of a server; all are above 0.

    Attributes:
        streams: how many are open at most.
        queue: how many calls wait for the model at most, beside the one that it works on.
        requests: how many requests are in work at most.
        rate: frames a second that one stream takes; None: as many as the model does.
        frame_bytes: of one picture as it comes.
        frame_pixels: of one picture when it is decoded.
        state_bytes: of the saved state of a stream.
        body_seconds: within which a client sends the whole of its request.

    Raises:
        ConfigError: one of them is not above 0, or no whole number where it counts something.
    """

    streams: int = 16
    queue: int = 32
    requests: int = 256
    rate: float | None = None
    frame_bytes: int = 16 * 2**20
    frame_pixels: int = 2**25
    state_bytes: int = 2**30
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            whole = "float" not in str(each.type)
            if value is None and each.name == "rate":
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ConfigError(f"{each.name} is {value!r}; expected a {'whole ' if whole else ''}number above 0")
            if not 0 < value < math.inf:
                raise ConfigError(f"{each.name} is {value!r}; expected a number above 0")


class Rate:
    """Lets so many frames a second pass, and as many at once after a rest.

    Args:
        rate: frames a second; None: no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._most = self._left = 1.0 if rate is None else max(rate, 1.0)
        self._seen: float | None = None

    def wait(self, now: float) -> float:
        """Take a frame if it may pass.

        Args:
            now: seconds of a clock that does not go back.

        Returns:
            0, or the seconds after which the next frame may pass.
        """
        if self._rate is None:
            return 0.0
        past = 0.0 if self._seen is None else now - self._seen
        self._seen, self._left = now, min(self._left + past * self._rate, self._most)
        if self._left < 1.0:
            return (1.0 - self._left) / self._rate
        self._left -= 1.0
        return 0.0

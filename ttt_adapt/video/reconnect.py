"""A live source that is opened again when it is lost, within limits, with growing and random pauses."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from ttt_adapt.errors import ConfigError, VideoError
from ttt_adapt.video.live import TIMEOUT, LiveStream, LostError
from ttt_adapt.video.sources import Kind, checked
from ttt_adapt.video.stats import Clock, FrameCounts

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reconnect:
    """How long a live source is waited for, and how often it is opened again when it is lost.

    A source is lost when it breaks, ends, or gives no frame for `read_timeout`. A pause comes before each new try. The
    n-th one is at most `first_pause * 2 ** (n - 1)`, or `longest_pause` where that is shorter, and at least half of it.
    It is random between the two, so that programs that lost one server do not all come back in the same moment ("equal
    jitter", M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015). The pauses grow on while a
    source breaks again and again; they begin anew once it has been there for longer than `longest_pause`.

    Attributes:
        tries: how often in a row a lost source is tried; 0: never, and its end is the end of the video; None: no limit.
        max_silence: seconds without a frame after which it is given up, whatever else; None: no limit.
        tries_at_start: how often it is tried before its first frame, so that a wrong address is an error at once; None:
            no limit.
        open_timeout: seconds until the first frame of a connection.
        read_timeout: seconds without a frame after which a connection is lost.
        first_pause: seconds before the first new try.
        longest_pause: seconds between tries at most.

    Raises:
        ConfigError: a number is out of range.
    """

    tries: int | None = 10
    max_silence: float | None = None
    tries_at_start: int | None = 1
    open_timeout: float = TIMEOUT
    read_timeout: float = TIMEOUT
    first_pause: float = 1.0
    longest_pause: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("tries", 0), ("tries_at_start", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(
                    f"{name} is {value!r}; expected a whole number of at least {least}, or no limit (None)"
                )
        for name in ("max_silence", "open_timeout", "read_timeout", "first_pause", "longest_pause"):
            value = getattr(self, name)
            if value is None and name == "max_silence":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}; expected a number of seconds above 0")

    @property
    def timeouts(self) -> tuple[float, float]:
        """Seconds for opening, and for reading; the latter are never more than the whole silence that is allowed."""
        return self.open_timeout, min(self.read_timeout, self.max_silence or math.inf)

    @property
    def patience(self) -> float | None:
        """Seconds after which a source is given up even if its last read never ends, as with a driver that hangs."""
        return None if self.max_silence is None else self.max_silence + 3 * self.open_timeout + self.read_timeout

    def silence_left(self, silence: float) -> float:
        """Seconds until the source is given up, after so many without a frame."""
        return math.inf if self.max_silence is None else self.max_silence - silence

    def pauses(self, uniform: Callable[[], float]) -> Iterator[float]:
        """Seconds before each new try, one after the other without end.

        Args:
            uniform: gives random numbers from 0 to 1.
        """
        longest = min(self.first_pause, self.longest_pause)
        while True:
            yield longest * (1 + uniform()) / 2
            longest = min(2 * longest, self.longest_pause)


class Reconnecting:
    """A live source that is opened again when it is lost. A `FrameSource`.

    What happens is said once: that it is lost and why, another reason why it cannot be opened, and that it is back.

    Args:
        connect: opens it.
        limits: how often, and how long.
        counts: gets the numbers of losses and tries.
        say: is told what happens, in words; also from the thread that reads.
        clock: gives seconds.
        uniform: gives random numbers from 0 to 1.
        sleep: waits for so many seconds; None: by a wait that `interrupt` ends.

    Attributes:
        connection: the present one. Its `kind` may be "film": a film on a server is not live, and is read as it is.

    Raises:
        VideoError: it cannot be opened.
    """

    kind: Kind = "live"
    restarts = False
    length: int | None = None
    sounds = 0
    uneven = False

    def __init__(
        self,
        connect: Callable[[], LiveStream],
        limits: Reconnect,
        *,
        counts: FrameCounts,
        say: Say,
        clock: Clock = time.monotonic,
        uniform: Callable[[], float] = random.random,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._connect, self._limits, self._counts, self._say = connect, limits, counts, say
        self._clock, self._uniform, self._sleep = clock, uniform, sleep
        self._stop = threading.Event()  # of the iteration that runs
        self._turn = threading.Lock()  # a thread that could not be interrupted may still read for an earlier iteration
        self._closed, self._index = False, 0
        self._last = clock()  # when the last frame came
        self._pauses = limits.pauses(uniform)
        self.connection = self._first_connection()
        self._connected, self.patience = clock(), limits.patience
        self.name, self.fps, self.size = self.connection.name, self.connection.fps, self.connection.size

    def _first_connection(self) -> LiveStream:
        try:
            return self._connect()
        except LostError as error:
            lost = error
        tries = self._limits.tries_at_start
        if lost.hopeless or tries == 1:
            raise lost
        self._say(f"{lost}; it is tried again")
        left = None if tries is None else tries - 1
        found = self._again(left, "tries_at_start", str(lost), lost.why, threading.Event())
        assert found is not None  # nobody can interrupt yet
        return found

    def frames(self, any_size: bool = False) -> Generator[np.ndarray, None, None]:
        """Yield frames; each iteration goes on where the source is.

        Raises:
            VideoError: it was lost and did not come back within the limits, or its size changed.
        """
        self._stop = threading.Event()
        return self._frames(any_size, self._stop)

    def _frames(self, any_size: bool, stop: threading.Event) -> Generator[np.ndarray, None, None]:
        while (frame := self._next(stop)) is not None:
            yield frame if any_size else checked(frame, self.size, self.name, self._index - 1)

    def _next(self, stop: threading.Event) -> np.ndarray | None:
        """The next frame, of this connection or another; None at the end, and where `stop` is set."""
        with self._turn:
            while not stop.is_set():
                frame, why = self._read()
                if frame is not None:
                    self._last, self._index = self._clock(), self._index + 1
                    return frame
                if stop.is_set() or self._limits.tries == 0 or not self._reopen(why, stop):
                    break
            return None

    def _read(self) -> tuple[np.ndarray | None, str]:
        """The next frame of this connection; or None, and why there is none."""
        try:
            return self.connection.next_frame(), "the source ended the connection"
        except LostError as error:
            if self._limits.tries == 0:
                raise LostError(f"{self.name} broke at frame {self._index}: {error.why}", error.why) from None
            return None, error.why

    def _reopen(self, why: str, stop: threading.Event) -> bool:
        """Open a lost source again. Returns False where it is over, or nobody waits for it any more."""
        self.connection.close()
        self._counts.lost += 1
        if self._clock() - self._connected > self._limits.longest_pause:
            self._pauses = self._limits.pauses(self._uniform)
        self._say(f"{self.name} is lost: {why}; it is opened again")
        before = self._counts.tries
        connection = self._again(
            self._limits.tries, "tries", f"{self.name} is lost at frame {self._index}: {why}", why, stop
        )
        if connection is None:
            return False
        self.connection, self._connected = connection, self._clock()
        if self._closed:
            connection.close()
        if connection.kind == "film":  # a broadcast that is over
            self._say(f"{self.name} is a finished film now: the live video is over")
            return False
        self._say(
            f"{self.name} is back after {self._clock() - self._last:.1f} s, {_tries(self._counts.tries - before)}"
        )
        return True

    def _again(self, tries: int | None, option: str, lost: str, why: str, stop: threading.Event) -> LiveStream | None:
        """Try until the source is open. None where `stop` is set.

        Args:
            tries: how often; None: no limit.
            option: the name of that limit.
            lost: how it was lost, as a sentence.
            why: the same in a few words; the same reason is not said twice.
            stop: ends the waiting.

        Raises:
            VideoError: a limit is reached.
        """
        made = 0
        while not stop.is_set():
            left = self._limits.silence_left(self._clock() - self._last)
            if left <= 0 or made == tries:
                after = f"{lost}; {_tries(made)} in {self._clock() - self._last:.1f} s did not help ({why})"
                raise VideoError(f"{after}. `{option if left > 0 else 'max_silence'}` sets when it is given up.")
            self._wait(min(next(self._pauses), left), stop)
            if stop.is_set():
                break
            made += 1
            self._counts.tries += 1
            try:
                return self._connect()
            except VideoError as error:
                reason = error.why if isinstance(error, LostError) else str(error)
                if reason != why:
                    self._say(f"{str(error).rstrip('.')}; it is tried on")
                why = reason
        return None

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        if self._sleep is None:
            stop.wait(seconds)
        else:
            self._sleep(seconds)

    def interrupt(self) -> None:
        """End the iteration that runs: at once if it waits for a new try, otherwise after its read."""
        self._stop.set()

    def close(self) -> None:
        """End the iteration that runs, and release the connection."""
        self._closed = True
        self._stop.set()
        self.connection.close()


def _tries(number: int) -> str:
    return "1 try" if number == 1 else f"{number} tries"

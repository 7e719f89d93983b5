"""A lost source is opened again, within limits: with a clock, pauses and random numbers of the test's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ttt_adapt.errors import ConfigError, VideoError
from ttt_adapt.video import Reconnect
from ttt_adapt.video.live import LostError
from ttt_adapt.video.reconnect import Reconnecting
from ttt_adapt.video.stats import FrameCounts


class Connection:
    """Gives frames of these levels, then breaks for the reason; "" ends it."""

    name, fps, size = "cam", 25.0, (4, 4)

    def __init__(self, levels=(), why="", kind="live", seconds=0.0):
        self.kind, self.closed, self.why, self.seconds = kind, False, why, seconds
        self.levels = iter(levels)

    def next_frame(self):
        self.world.now += self.seconds
        for level in self.levels:
            return np.full((4, 4, 3), level, np.uint8)
        if self.why:
            raise LostError(f"cam broke: {self.why}", self.why)
        return None

    def close(self):
        self.closed = True


class World:
    """Clock, pauses and a camera: each try takes the next of `plan`, a connection or the reason of a refusal."""

    def __init__(self, *plan, limits=None, uniform=1.0):
        self.now, self.pauses, self.said, self.counts = 0.0, [], [], FrameCounts()
        self.plan, self.limits, self.uniform = itertools.chain(plan), limits or Reconnect(), uniform
        self.made: list[Connection] = []

    def connect(self):
        found = next(self.plan)
        if isinstance(found, str):
            raise LostError(f"cam cannot be opened: {found}", found)
        found.world = self
        self.made.append(found)
        return found

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def open(self):
        return Reconnecting(
            self.connect, self.limits, counts=self.counts, say=self.said.append, clock=lambda: self.now,
            uniform=lambda: self.uniform, sleep=self.sleep,
        )  # fmt: skip

    def read(self, count=None):
        return [int(frame[0, 0, 0]) for frame in itertools.islice(self.open().frames(), count)]


def test_a_source_that_breaks_or_ends_goes_on_after_the_break_and_each_event_is_said_once():
    world = World(
        Connection([1, 2], "no frame for 10 s"), "refused", "refused", "404", Connection([3]), Connection([4, 5])
    )
    assert world.read(5) == [1, 2, 3, 4, 5]
    assert world.said == [
        "cam is lost: no frame for 10 s; it is opened again",
        "cam cannot be opened: refused; it is tried on",
        "cam cannot be opened: 404; it is tried on",
        "cam is back after 15.0 s, 4 tries",
        "cam is lost: the source ended the connection; it is opened again",
        "cam is back after 16.0 s, 1 try",
    ]
    assert (world.counts.lost, world.counts.tries) == (2, 5)
    assert [made.closed for made in world.made] == [True, True, False]


@pytest.mark.parametrize(("uniform", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_pauses_double_up_to_the_longest_and_are_random_between_their_half_and_their_whole(uniform, share):
    limits = Reconnect(first_pause=1, longest_pause=10, tries=6)
    world = World(Connection([1], "x"), *["refused"] * 6, limits=limits, uniform=uniform)
    with pytest.raises(VideoError):
        world.read()
    assert world.pauses == [share * pause for pause in (1, 2, 4, 8, 10, 10)]


def test_after_the_last_try_the_error_says_when_why_and_what_to_set():
    world = World(Connection([1, 2], "reset"), "refused", "refused", limits=Reconnect(tries=2))
    with pytest.raises(
        VideoError, match=r"cam is lost at frame 2: reset; 2 tries in 3\.0 s did not help \(refused\)"
    ) as caught:
        world.read()
    assert "`tries`" in str(caught.value)
    assert len(world.pauses) == 2


def test_tries_count_anew_after_a_frame():
    plan = [step for level in range(5) for step in (Connection([level], "x"), "refused", "refused")]
    world = World(*plan, Connection([5]), limits=Reconnect(tries=3))
    assert world.read(6) == [0, 1, 2, 3, 4, 5]


def test_the_silence_ends_it_after_a_last_try_and_no_pause_is_longer_than_what_is_left():
    limits = Reconnect(tries=None, max_silence=10)
    world = World(Connection([1], "x"), *["refused"] * 9, limits=limits)
    with pytest.raises(VideoError, match=r"4 tries in 10\.0 s did not help .* `max_silence`"):
        world.read()
    assert world.pauses == [1, 2, 4, 3]


def test_without_limits_it_is_tried_on_and_on():
    world = World(Connection([1], "x"), *["refused"] * 500, Connection([2]), limits=Reconnect(tries=None))
    assert world.read(2) == [1, 2]
    assert len(world.said) == 3  # lost, refused, back


def test_no_tries_end_the_video_where_it_ends_and_raise_where_it_breaks():
    assert World(Connection([1, 2]), limits=Reconnect(tries=0)).read() == [1, 2]
    world = World(Connection([1, 2], "reset"), limits=Reconnect(tries=0))
    with pytest.raises(VideoError, match="cam broke at frame 2: reset"):
        world.read()
    assert world.pauses == []


def test_pauses_grow_on_while_a_source_breaks_at_once_and_begin_anew_once_it_has_lasted():
    limits = Reconnect(first_pause=1, longest_pause=8)
    brief = [Connection([level], "x") for level in range(4)]
    world = World(*brief, Connection([4, 5, 6], "x", seconds=5), Connection([7]), limits=limits)
    assert world.read(8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert world.pauses == [1, 2, 4, 8, 1]


def test_a_wrong_address_is_an_error_at_once_unless_the_start_may_take_longer():
    world = World("refused", Connection([1]))
    with pytest.raises(LostError, match="cam cannot be opened: refused"):
        world.open()
    assert world.pauses == []
    world = World("refused", "refused", Connection([1]), limits=Reconnect(tries_at_start=3))
    assert world.read(1) == [1]
    assert world.said[0] == "cam cannot be opened: refused; it is tried again"
    world = World("refused", "refused", "refused", limits=Reconnect(tries_at_start=3))
    with pytest.raises(VideoError, match=r"2 tries in 3\.0 s did not help \(refused\)\. `tries_at_start`"):
        world.open()


def test_what_can_never_work_is_not_tried_again():
    class Unknown(World):
        def connect(self):
            raise LostError("cam cannot be opened: no such protocol", "no such protocol", hopeless=True)

    world = Unknown(limits=Reconnect(tries_at_start=None))
    with pytest.raises(LostError, match="no such protocol"):
        world.open()
    assert world.pauses == []


def test_a_broadcast_that_has_become_a_film_is_over():
    world = World(Connection([1, 2]), Connection([1, 2, 3], kind="film"))
    assert world.read() == [1, 2]
    assert world.said[-1] == "cam is a finished film now: the live video is over"


def test_an_interrupted_wait_ends_the_iteration_and_the_next_one_goes_on():
    world = World(Connection([1], "x"), Connection([2, 3]))
    source = world.open()
    frames = source.frames()
    assert int(next(frames)[0, 0, 0]) == 1
    source.interrupt()
    assert next(frames, None) is None
    assert [int(frame[0, 0, 0]) for frame in itertools.islice(source.frames(), 2)] == [2, 3]
    source.close()
    assert all(made.closed for made in world.made)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tries": -1}, {"tries": 1.5}, {"tries": True}, {"tries_at_start": 0}, {"max_silence": 0}, {"max_silence": -1},
        {"open_timeout": 0}, {"open_timeout": None}, {"read_timeout": float("nan")}, {"read_timeout": float("inf")},
        {"first_pause": "1"}, {"longest_pause": 0},
    ],
)  # fmt: skip
def test_limits_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is .*; expected"):
        Reconnect(**wrong)


def test_a_connection_waits_no_longer_than_the_whole_silence_that_is_allowed():
    assert Reconnect(read_timeout=10, max_silence=3).timeouts == (10, 3)
    assert Reconnect(read_timeout=2).timeouts == (10, 2)

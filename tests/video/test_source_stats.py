"""Frames are counted, and their rates are those of the last seconds."""

from __future__ import annotations

import json

from ttt_adapt.video.stats import RATE_SECONDS, FrameCounter, FrameCounts


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_is_that_of_the_last_seconds_and_fades_when_no_frame_comes():
    time = Time()
    counter = FrameCounter(time)
    for _ in range(50):
        time.now += 0.1
        counter.add()
    assert counter.count().frames == 50
    assert abs(counter.count().rate - 10) < 1e-6  # over the 5 s since the beginning
    for _ in range(200):
        time.now += 0.05
        counter.add()
    assert abs(counter.count().rate - 20) < 0.2  # the slow ones are forgotten
    time.now += RATE_SECONDS / 2
    assert abs(counter.count().rate - 10) < 0.2
    time.now += RATE_SECONDS
    assert counter.count().rate == 0
    assert counter.count().frames == 250


def test_nothing_is_divided_by_no_time():
    counter = FrameCounter(Time())
    counter.add()
    assert (counter.count().frames, counter.count().rate) == (1, 0.0)


def test_stats_say_how_long_no_frame_came_and_are_numbers_for_json():
    time = Time()
    counts = FrameCounts(time)
    time.now += 2
    counts.frame_came()
    counts.predicted.add()
    time.now += 3
    stats = counts.stats()
    assert (stats.seconds, stats.silence, stats.read.frames, stats.adapted.frames) == (5, 3, 1, 0)
    kept = json.loads(json.dumps(stats.as_dict()))
    assert kept["read"] == {"frames": 1, "rate": 0.2}
    assert (kept["silence"], kept["lost"]) == (3, 0)
    assert str(stats) == "1 frame read (0.2 a second), 0 dropped, 0 adapted to, 1 predicted (0.2 a second)"
    counts.lost = 1
    assert str(counts.stats()).endswith(", lost once")

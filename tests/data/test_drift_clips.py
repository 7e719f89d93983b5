"""Schedules of drifts, and clips under them."""

from __future__ import annotations

import numpy as np
import pytest

from ttt_adapt.data import Clip
from ttt_adapt.data.drift import (
    NONE,
    Drift,
    DriftedClip,
    ForthAndBack,
    Schedule,
    parse_drifts,
    parse_schedule,
)
from ttt_adapt.errors import ConfigError, DataError

NIGHT, RAIN, CLEAR = Drift("night", 3), Drift("rain", 3), Drift(NONE)


class Numbered(Clip):
    """A clip whose i-th frame and labels are full of i."""

    def __init__(self, count: int = 4, name: str = "numbered", **keywords) -> None:
        super().__init__(name, classes=("a", "b"), ignore=9, size=(6, 8), **keywords)
        self.count, self.checked = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        index = range(self.count)[index]
        return np.full((6, 8, 3), 10 * index, np.uint8), np.full((6, 8), index, np.uint8)

    def check_labels(self) -> None:
        self.checked += 1


def order(clip: Clip) -> list[int]:
    return [int(labels[0, 0]) for _, labels in clip]


def course(text: str, frames: int) -> list[str]:
    schedule = parse_schedule(text)
    return [str(schedule.drift_at(i, frames)) for i in range(frames)]


# ---- schedules


def test_parts_share_the_stream_evenly():
    schedule = Schedule((CLEAR, NIGHT, RAIN), ramp=0)
    names = [schedule.drift_at(i, 9).name for i in range(9)]
    assert names == ["none"] * 3 + ["night"] * 3 + ["rain"] * 3
    assert {schedule.drift_at(i, 9).severity for i in range(3, 9)} == {3.0}
    assert [schedule.drift_at(i, 4).name for i in range(4)] == ["none", "night", "rain", "rain"]


def test_a_drift_comes_and_goes_in_ramps_and_the_stream_has_none_at_its_ends():
    assert course("none@20..night:3@20..none@5", 45)[19:41] == [
        "none", "night:1", "night:2", *["night:3"] * 16, "night:2", "night:1", "none",
    ][:22]  # fmt: skip
    assert course("night:3@20..rain:3@20", 40) == [
        *["night:3"] * 18, "night:2", "night:1", "rain:1", "rain:2", *["rain:3"] * 18,
    ]  # fmt: skip


def test_one_drift_grows_without_going_away_between():
    assert course("night:1@20..night:4@20", 40)[18:24] == [
        "night:1",
        "night:1",
        "night:2",
        "night:3",
        "night:4",
        "night:4",
    ]


@pytest.mark.parametrize("frames", [5, 23, 100])
def test_severities_never_exceed_those_of_the_parts(frames):
    schedule = Schedule((NIGHT, Drift("fog", 5), CLEAR, Drift("rain", 1), Drift("night", 2)), ramp=0.5)
    most = {"night": 3, "fog": 5, "rain": 1, "none": 0}
    found = [schedule.drift_at(i, frames) for i in range(frames)]
    assert {drift.name for drift in found} == set(most)
    assert all(0 <= drift.severity <= most[drift.name] for drift in found)


@pytest.mark.parametrize("text", ["none..night:3..none", "none@100..night:2.5@50", "night:3", "rain:1@7"])
def test_text_of_schedules_is_read_and_written(text):
    assert str(parse_schedule(text)) == text
    assert parse_schedule(text, seed=5).parts[-1].seed == 5


def test_lengths_are_frames():
    assert parse_schedule("none@100..night@50") == Schedule((CLEAR, NIGHT), (100, 50))
    assert parse_schedule("none@100..night@50").frames == 150
    assert parse_schedule("none..night").frames is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("none..nigth:3", "nearest: 'night'"),
        ("none..", "no drift ''"),
        ("none@10..night", "2 parts and 1 lengths"),
        ("night@", "a number of frames behind @"),
        ("night@0", "a number of frames behind @"),
        ("night@-5", "a number of frames behind @"),
        ("night@ten", "a number of frames behind @"),
    ],
)
def test_text_that_is_no_schedule_says_what_was_expected(text, told):
    with pytest.raises(ConfigError, match=told):
        parse_schedule(text)


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="no parts"):
        Schedule(())
    with pytest.raises(ConfigError, match=r"2 parts has the lengths \[3\]"):
        Schedule((NIGHT, RAIN), (3,))
    for ramp in (-0.1, 0.6, float("nan")):
        with pytest.raises(ConfigError, match="ramp"):
            Schedule((NIGHT,), ramp=ramp)
    with pytest.raises(ConfigError, match="3 parts, and the stream has only 2 frames"):
        Schedule((NIGHT, RAIN, NIGHT)).drift_at(0, 2)
    with pytest.raises(ConfigError, match="has 5 frames, and the stream has 6"):
        Schedule((NIGHT,), (5,)).drift_at(0, 6)
    with pytest.raises(IndexError):
        Schedule((NIGHT,)).drift_at(6, 6)


def test_drifts_are_given_with_commas_or_one_by_one():
    expected = [CLEAR, NIGHT, parse_schedule("none..rain..none")]
    assert parse_drifts(["none,night:3", "none..rain..none"]) == expected
    assert parse_drifts(["none, night , none..rain:3..none"]) == expected
    assert parse_drifts([]) == []
    with pytest.raises(ConfigError, match="night:3 is given twice"):
        parse_drifts(["night", "night:3"])
    with pytest.raises(ConfigError, match="a drift is missing"):
        parse_drifts(["night,,rain"])


# ---- clips


def test_frames_drift_and_labels_times_and_names_stay():
    clip = Numbered(fps=5.0, times=(0.0, 0.5, 0.6, 2.0))
    night = DriftedClip(clip, NIGHT)
    assert (night.name, len(night), night.classes, night.ignore) == ("numbered night:3", 4, ("a", "b"), 9)
    assert (night.size, night.fps, night.times) == ((6, 8), 5.0, clip.times)
    for index, (frame, labels) in enumerate(night):
        np.testing.assert_array_equal(frame, NIGHT.apply(clip[index][0], index))
        np.testing.assert_array_equal(labels, clip[index][1])


def test_samples_by_index_are_those_of_the_iteration():
    clip = DriftedClip(Numbered(12), "none..rain:5..noise")
    for index, (frame, labels) in enumerate(clip):
        for place in (index, index - 12):
            np.testing.assert_array_equal(clip[place][0], frame)
            np.testing.assert_array_equal(clip[place][1], labels)
    with pytest.raises(IndexError):
        clip[12]


def test_a_frame_knows_its_drift():
    clip = DriftedClip(Numbered(6), "none..night:2..rain")
    assert [str(clip.drift_at(i)) for i in range(6)] == ["none", "none", "night:2", "night:2", "rain:3", "rain:3"]
    assert DriftedClip(Numbered(), NIGHT).drift_at(2) == NIGHT


def test_the_seed_wins_over_that_of_the_drift():
    clip = Numbered()
    assert DriftedClip(clip, Drift("noise", seed=4)).drift_at(0).seed == 4
    assert DriftedClip(clip, Drift("noise", seed=4), seed=7).drift_at(0) == Drift("noise", seed=7)
    schedule = DriftedClip(clip, "noise..none", seed=7)
    assert {schedule.drift_at(i).seed for i in range(4)} == {7}


def test_the_record_tells_clips_under_other_drifts_apart():
    clip = Numbered()
    others = [
        clip, DriftedClip(clip, "night:3"), DriftedClip(clip, "night:2"), DriftedClip(clip, "night:3", seed=1),
        DriftedClip(clip, "night:3", frames=9), DriftedClip(clip, "none..night:3"),
        DriftedClip(clip, Schedule((CLEAR, NIGHT), ramp=0.2)),
    ]  # fmt: skip
    records = [str(other.describe()) for other in others]
    assert len(set(records)) == len(records)
    assert str(DriftedClip(Numbered(), "night").describe()) == records[1]


def test_labels_are_checked_and_files_named_by_the_clip_below():
    clip = Numbered()
    DriftedClip(clip, "night", frames=9).check_labels()
    assert clip.checked == 1
    assert DriftedClip(clip, "night").files == clip.files


def test_a_clip_plays_forth_and_back_with_its_labels():
    assert order(ForthAndBack(Numbered(4), 10)) == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert order(ForthAndBack(Numbered(4), 3)) == [0, 1, 2]
    assert order(ForthAndBack(Numbered(1), 3)) == [0, 0, 0]
    assert order(ForthAndBack(Numbered(2), 5)) == [0, 1, 0, 1, 0]


def test_time_goes_on_while_a_clip_plays_back():
    longer = ForthAndBack(Numbered(3, fps=2.0, times=(1.0, 1.5, 3.0)), 6)
    assert longer.times == (1.0, 1.5, 3.0, 4.5, 5.0, 5.5)
    assert longer.fps == 2.0
    assert ForthAndBack(Numbered(3), 6).times is None


def test_a_schedule_with_lengths_makes_a_stream_of_that_length():
    clip = DriftedClip(Numbered(4), "none@3..night@5")
    assert len(clip) == 8
    assert order(clip) == [0, 1, 2, 3, 2, 1, 0, 1]
    assert clip.drift_at(3).name == "night"
    noise = DriftedClip(Numbered(2), "noise", frames=4)
    assert not np.array_equal(noise[0][0], noise[2][0])  # the same frame again, under new noise


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="expected at least 1"):
        ForthAndBack(Numbered(), 0)
    with pytest.raises(DataError, match="no frames to repeat"):
        ForthAndBack(Numbered(0), 5)
    with pytest.raises(ConfigError, match="5 parts, and the stream has only 4 frames"):
        DriftedClip(Numbered(4), "none..night..none..rain..none")
    with pytest.raises(ConfigError, match="has 8 frames, and the stream has 9"):
        DriftedClip(Numbered(4), "none@3..night@5", frames=9)
    with pytest.raises(ConfigError, match="got 2 drifts"):
        DriftedClip(Numbered(4), "night,rain")

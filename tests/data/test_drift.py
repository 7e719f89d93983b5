"""One drift on one frame: what it does, that it can be repeated, and what it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ttt_adapt.data.drift import DRIFTS, NONE, SEVERITIES, Drift, drifted, every_drift, parse_drift
from ttt_adapt.data.street.scene import StreetScene
from ttt_adapt.errors import ConfigError, FrameError, FrameTypeError, MissingPackageError

MOVING = ("night", "noise", "fog", "rain", "motion-blur", "exposure-flicker")
STEADY = ("blur", "jpeg", "low-contrast", "white-balance")


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    return StreetScene(3).render(2.0)[0]


def grey(height: int, width: int, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).mean())


# ---- every drift


def test_every_drift_is_known_to_move_or_to_be_steady():
    assert {*MOVING, *STEADY} == set(DRIFTS)


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (33, 7), (300, 20)])
def test_frames_of_any_size_keep_it_and_are_not_changed_themselves(name, size):
    before = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    given = before.copy()
    for severity in (0.1, 1, 5):
        found = Drift(name, severity).apply(given, 2)
        assert (found.shape, found.dtype) == (given.shape, np.uint8)
        assert not np.shares_memory(found, given)
        found[:] = 0  # it may be written to
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("name", DRIFTS)
def test_frames_that_lie_otherwise_in_memory_give_the_same_picture(name, frame):
    turned = np.ascontiguousarray(frame[:, ::-1])[:, ::-1]
    frozen = frame.copy()
    frozen.flags.writeable = False
    for other in (turned, frozen):
        np.testing.assert_array_equal(Drift(name).apply(other, 1), Drift(name).apply(frame, 1))


@pytest.mark.parametrize("name", DRIFTS)
def test_frames_read_in_any_order_are_the_same(name, frame):
    drift = Drift(name, seed=4)
    in_order = [drift.apply(frame, i) for i in range(6)]
    for index in (5, 0, 3, 3):
        np.testing.assert_array_equal(Drift(name, seed=4).apply(frame, index), in_order[index])


@pytest.mark.parametrize("name", DRIFTS)
def test_what_moves_moves_and_what_is_steady_does_not(name, frame):
    first, *others = [Drift(name).apply(frame, i) for i in range(4)]
    assert [not np.array_equal(first, other) for other in others] == [name in MOVING] * 3


@pytest.mark.parametrize("name", [*MOVING, "white-balance"])
def test_another_seed_is_another_drift(name, frame):
    assert distance(Drift(name, seed=0).apply(frame, 1), Drift(name, seed=1).apply(frame, 1)) > 0.5


@pytest.mark.parametrize("name", DRIFTS)
def test_a_higher_severity_is_farther_from_the_clean_frame(name, frame):
    severities = [0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5]
    found = [np.mean([distance(Drift(name, s).apply(frame, i), frame) for i in range(4)]) for s in severities]
    assert found[0] == 0
    assert found[3] > 0.5  # mild, and yet visible
    start = 3 if name == "jpeg" else 1  # the mildest JPEG is what most cameras do
    assert all(b > a for a, b in zip(found[start:], found[start + 1 :], strict=False))


@pytest.mark.parametrize("drift", [Drift(NONE), Drift("night", 0), Drift("jpeg", 0)])
def test_no_drift_gives_a_copy_of_the_frame(drift, frame):
    found = drift.apply(frame, 7)
    np.testing.assert_array_equal(found, frame)
    assert not np.shares_memory(found, frame)


# ---- what each of them is


def test_night_is_the_power_2_2_at_gain_0_45_and_bluer():
    flat = grey(200, 200, 180)
    dark = Drift("night", 3).apply(flat).reshape(-1, 3).mean(0)
    expected = 255 * 0.45 * (180 / 255) ** 2.2
    assert dark.mean() == pytest.approx(expected, rel=0.1)
    assert dark[2] > 1.3 * dark[0]


def test_night_is_equally_dark_in_all_frames_and_its_noise_is_new(frame):
    nights = [Drift("night", 4).apply(frame, i) for i in range(5)]
    assert np.ptp([night.mean() for night in nights]) < 0.2
    assert distance(nights[0], nights[1]) > 1


def test_noise_has_the_same_deviation_at_every_frame_size_and_is_new_in_every_frame():
    for size in ((60, 80), (240, 320)):
        a, b = (Drift("noise", 3).apply(grey(*size), i).astype(float) - 128 for i in range(2))
        assert a.std() == pytest.approx(0.13 * 255, rel=0.05)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("name", ["blur", "motion-blur"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_is_in_proportion_to_the_height(name, severity):
    """A point that is twice as large is smeared over twice the distance: the picture is the same at twice the size."""
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    large = small.repeat(2, 0).repeat(2, 1)
    found = Drift(name, severity).apply(large, 3).reshape(96, 2, 128, 2, 3).mean((1, 3))
    blurred = Drift(name, severity).apply(small, 3)
    assert distance(found, blurred) < 0.1 * distance(blurred, small)


@pytest.mark.parametrize("name", ["blur", "motion-blur"])
def test_blur_leaves_even_areas_as_they_are_up_to_the_edge(name):
    for value in (0, 77, 255):
        np.testing.assert_array_equal(Drift(name, 5).apply(grey(40, 60, value), 1), grey(40, 60, value))


def test_motion_blur_smears_along_a_line_that_turns_slowly():
    point = grey(61, 61, 0)
    point[29:32, 29:32] = 255
    spots = [np.stack(np.nonzero(Drift("motion-blur", 5).apply(point, i)[..., 0] > 8)) for i in range(12)]
    widths = [np.sqrt(np.linalg.eigvalsh(np.cov(spot))) for spot in spots]
    assert all(long > 2.5 * wide for wide, long in widths)
    angles = np.unwrap([2 * np.arctan2(*np.linalg.eigh(np.cov(spot))[1][:, 1]) for spot in spots]) / 2
    assert 0 < np.abs(np.diff(angles)).max() < 0.2
    assert np.ptp(angles) > 0.2


def test_jpeg_is_that_of_pillow(frame):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=9)
    np.testing.assert_array_equal(Drift("jpeg", 3).apply(frame), np.array(Image.open(file)))


def test_jpeg_without_pillow_says_what_to_install_and_the_others_need_none(frame, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingPackageError, match=r"ttt-adapt\[eval\]"):
        Drift("jpeg").apply(frame)
    for name in [*DRIFTS.keys() - {"jpeg"}]:
        Drift(name).apply(frame)


def test_low_contrast_keeps_the_mean_and_lowers_the_deviation(frame):
    found = Drift("low-contrast", 3).apply(frame)
    assert found.mean() == pytest.approx(frame.mean(), abs=0.5)
    assert found.std() == pytest.approx(0.4 * frame.std(), rel=0.05)


def test_fog_is_thinner_at_the_bottom_and_its_clouds_drift_slowly():
    veils = [Drift("fog", 4).apply(grey(96, 128, 0), i).mean(2) for i in (0, 1, 200)]
    assert veils[0][:20].mean() > 1.15 * veils[0][-20:].mean()
    assert 0 < distance(veils[0], veils[1]) < 0.1 * distance(veils[0], veils[2])


def test_rain_falls_in_every_part_of_the_picture_and_elsewhere_in_the_next_frame():
    wet = [Drift("rain", 3).apply(grey(96, 128, 60), i).mean(2) for i in range(8)]
    streaks = [picture > np.median(picture) + 20 for picture in wet]
    assert all(0.02 < streak.mean() < 0.5 for streak in streaks)
    sixths = np.mean(streaks, 0).reshape(2, 48, 4, 32).mean((1, 3))
    assert sixths.min() > 0.3 * sixths.max()
    overlap = (streaks[0] & streaks[1]).mean() / streaks[0].mean()
    assert overlap == pytest.approx(streaks[1].mean(), abs=0.1)  # as if by chance


def test_streaks_of_rain_are_upright():
    wet = Drift("rain", 3).apply(grey(96, 128, 60), 2).astype(float).mean(2)
    assert np.abs(np.diff(wet, axis=0)).mean() < 0.5 * np.abs(np.diff(wet, axis=1)).mean()


def test_white_balance_is_orange_or_blue_by_the_seed():
    red, green, blue = Drift("white-balance", seed=2).apply(grey(4, 4))[0, 0].astype(int)
    assert red > green > blue
    assert green == 128
    red, green, blue = Drift("white-balance", seed=3).apply(grey(4, 4))[0, 0].astype(int)
    assert red < green < blue


def test_exposure_flicker_is_brighter_and_darker_than_the_frame():
    light = [int(Drift("exposure-flicker", 3).apply(grey(2, 2), i)[0, 0, 0]) for i in range(40)]
    assert min(light) < 100
    assert max(light) > 160
    assert np.abs(np.diff(light)).mean() > 15


# ---- text, lists, errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("night", Drift("night", 3)),
        ("night:4", Drift("night", 4)),
        (" motion_blur : 2.5 ", Drift("motion-blur", 2.5)),
        ("none", Drift(NONE)),
    ],
)
def test_text_is_read_and_written(text, expected):
    assert parse_drift(text) == expected
    assert parse_drift(str(expected), seed=6) == Drift(expected.name, expected.severity, seed=6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nigth:3", "no drift 'nigth'; nearest: 'night'"),
        ("", "no drift ''"),
        ("night:6", r"severity of night is 6.0; expected a number from 0 .* to 5"),
        ("night:-1", "severity of night is -1.0"),
        ("night:nan", "expected NAME or NAME:SEVERITY"),
        ("night:", "expected NAME or NAME:SEVERITY"),
        ("night:3:100", "expected NAME or NAME:SEVERITY"),
        ("none:3", "'none' has no severity"),
    ],
)
def test_text_that_is_no_drift_says_what_was_expected(text, told):
    with pytest.raises(ConfigError, match=told):
        parse_drift(text)


@pytest.mark.parametrize("severity", [True, "3", None, float("nan"), float("inf")])
def test_a_severity_is_a_number(severity):
    with pytest.raises(ConfigError, match="severity of night"):
        Drift("night", severity)


def test_numbers_of_numpy_are_kept_as_plain_ones_for_the_record():
    drift = Drift("night", np.float32(2.5), np.int64(4))
    assert drift == Drift("night", 2.5, 4)
    assert (type(drift.severity), type(drift.seed)) == (float, int)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match="seed of night"):
        Drift("night", seed=seed)


@pytest.mark.parametrize("drift", [Drift("night"), Drift(NONE)])
def test_other_frames_are_refused(drift):
    with pytest.raises(FrameTypeError, match="array of float64; a drift expects uint8"):
        drift.apply(np.zeros((4, 4, 3)))
    with pytest.raises(FrameTypeError, match="a list"):
        drift.apply([[1, 2, 3]])
    for shape in ((4, 4), (3, 4, 4), (4, 4, 4), (0, 4, 3)):
        with pytest.raises(FrameError, match=rf"shape \[{shape[0]}"):
            drift.apply(np.zeros(shape, np.uint8))
    with pytest.raises(ConfigError, match="index is -1"):
        drift.apply(grey(4, 4), -1)


def test_all_drifts_of_a_frame_are_listed_in_the_order_of_the_table(frame):
    found = list(every_drift(frame, (1, 5), index=3, seed=2))
    assert [(drift.name, drift.severity) for drift, _ in found] == [(name, s) for name in DRIFTS for s in (1, 5)]
    for drift, picture in found:
        assert drift.seed == 2
        np.testing.assert_array_equal(picture, drift.apply(frame, 3))


def test_frames_without_labels_are_drifted_one_by_one(frame):
    asked = []

    def film():
        for i in range(3):
            asked.append(i)
            yield frame

    found = drifted(film(), Drift("rain"))
    np.testing.assert_array_equal(next(found), Drift("rain").apply(frame, 0))
    assert asked == [0]
    np.testing.assert_array_equal(next(found), Drift("rain").apply(frame, 1))

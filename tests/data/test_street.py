from __future__ import annotations

import itertools

import numpy as np
import pytest

from ttt_adapt.data.street.layout import Layout
from ttt_adapt.data.street.scene import (
    CLASSES,
    PALETTE,
    StreetScene,
    Weather,
    drift,
    street_stills,
    street_stream,
)
from ttt_adapt.errors import ConfigError

SMALL = (64, 96)
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON = range(7)


@pytest.fixture(scope="module")
def frames():
    return list(street_stream(frames=60, fps=3.0))


@pytest.fixture(scope="module")
def scene():
    return StreetScene(0)


def test_the_same_seed_time_and_weather_give_the_same_bytes(scene):
    weather = Weather(darkness=0.4, fog=0.2, rain=0.7)
    scene.render(9.0)  # what was drawn before leaves no trace
    for mine, other in zip(scene.render(3.3, weather), StreetScene(0).render(3.3, weather), strict=True):
        assert mine.tobytes() == other.tobytes()


def test_rendering_leaves_shared_textures_and_earlier_frames_untouched(scene):
    image, labels = scene.render(1.0)
    copies = image.copy(), labels.copy()
    scene.render(2.0, Weather(rain=1.0))
    assert np.array_equal(image, copies[0])
    assert np.array_equal(labels, copies[1])
    again, labels_again = scene.render(1.0)
    assert np.array_equal(again, image)
    assert np.array_equal(labels_again, labels)


def test_another_seed_is_another_street(scene):
    (image, labels), (other, other_labels) = scene.render(2.0), StreetScene(1).render(2.0)
    assert (labels != other_labels).mean() > 0.05
    assert np.abs(image.astype(int) - other).mean() > 10


def test_pictures_and_labels_have_the_promised_types(frames):
    for image, labels in frames[::20]:
        assert image.shape == (128, 192, 3)
        assert image.dtype == np.uint8
        assert labels.shape == (128, 192)
        assert labels.dtype == np.uint8
        assert labels.max() < len(CLASSES)


def test_every_class_occurs_over_a_stream_and_none_fills_it(frames):
    counts = np.bincount(np.concatenate([labels.ravel() for _, labels in frames]), minlength=len(CLASSES))
    shares = counts / counts.sum()
    assert (shares > 0.004).all()
    assert (shares < 0.6).all()


def test_palette_has_one_colour_for_each_class():
    assert len(PALETTE) == len(CLASSES) == len(set(PALETTE))
    assert all(0 <= channel <= 255 for colour in PALETTE for channel in colour)


def test_sky_is_above_the_road(frames):
    for _, labels in frames:
        sky, road = np.nonzero(labels == SKY)[0], np.nonzero(labels == ROAD)[0]
        assert sky.max() < road.min()


def test_pavement_lies_on_both_sides_of_the_road():
    columns = [[np.nonzero(labels == c)[1] for c in (ROAD, PAVEMENT)] for _, labels in street_stills(4)]
    for road, pavement in columns:
        assert pavement.min() < np.median(road) < pavement.max()


@pytest.mark.parametrize("size", [(48, 64), (96, 160), (101, 131), (256, 384), (128, 128)])
def test_any_size_works(size):
    image, labels = StreetScene(3, size).render(4.0, Weather(0.3, 0.3, 0.3))
    assert image.shape == (*size, 3)
    assert labels.shape == size
    assert {SKY, BUILDING, ROAD, PAVEMENT} <= set(np.unique(labels))


def test_sizes_show_the_same_scene():
    small, large = (StreetScene(5, size).render(4.0)[1] for size in ((96, 144), (192, 288)))
    assert (small == large[::2, ::2]).mean() > 0.95


def test_a_drive_goes_on_for_hours_and_repeats_nothing_at_once(scene):
    first, labels = scene.render(36000.0)
    later, _ = scene.render(36010.0)
    assert labels.max() < len(CLASSES)
    assert np.abs(first.astype(int) - later).mean() > 5


def test_night_fog_and_rain_come_and_go_with_clear_days_between():
    for clear in (0.0, 0.05, 0.37, 0.67, 0.98, 1.0):
        assert drift(clear) == Weather(), clear
    assert drift(0.2) == Weather(darkness=0.9)
    assert drift(0.52) == Weather(fog=0.9)
    assert drift(0.83) == Weather(rain=0.9)


def test_weather_says_in_words_what_it_is():
    words = {
        Weather(): "clear day",
        Weather(darkness=0.04, fog=0.03): "clear day",
        Weather(darkness=0.4): "dusk 0.4",
        Weather(darkness=0.8): "night 0.8",
        Weather(darkness=0.3, fog=0.6): "fog 0.6",
        Weather(fog=0.2, rain=1.0): "rain 1.0",
    }
    assert {weather: weather.title for weather in words} == words
    assert [weather.kind for weather in words] == ["clear day", "clear day", "dusk", "night", "fog", "rain"]


def test_drift_is_continuous():
    steps = [drift(i / 500) for i in range(501)]
    for a, b in itertools.pairwise(steps):
        assert max(abs(a.darkness - b.darkness), abs(a.fog - b.fog), abs(a.rain - b.rain)) < 0.02


def test_dusk_is_darker_and_lights_its_windows(scene):
    day, labels = scene.render(2.0)
    dusk, dusk_labels = scene.render(2.0, Weather(darkness=0.9))
    assert np.array_equal(labels, dusk_labels)
    assert dusk.mean() < 0.55 * day.mean()
    walls = dusk[labels == BUILDING].mean(-1)
    assert np.percentile(walls, 99) > 3 * np.median(walls)


def test_light_at_dusk_turns_warm_then_blue(scene):
    def warmth(darkness):
        image, labels = scene.render(2.0, Weather(darkness=darkness))
        red, _, blue = image[labels == ROAD].mean(0)
        return red / blue

    assert warmth(0.5) > 1.1 * warmth(0.0)
    assert warmth(1.0) < 0.9 * warmth(0.5)


def test_fog_takes_more_contrast_from_far_than_from_near(scene):
    clear, labels = scene.render(2.0)
    fog, _ = scene.render(2.0, Weather(fog=1.0))
    across = np.abs(np.arange(191) - 95)[None]
    same = (labels[:, 1:] == labels[:, :-1]) & ((labels[:, 1:] == BUILDING) | (labels[:, 1:] == CAR))

    def contrast(image, area):
        return np.abs(np.diff(image.astype(int).mean(-1), axis=1))[same & area].mean()

    far, near = (contrast(fog, area) / contrast(clear, area) for area in (across < 30, across > 65))
    assert far < 0.7 * near
    assert near < 1


def test_rain_is_noisier_and_duller_than_a_clear_day(scene):
    clear, labels = scene.render(2.0)
    rain, rain_labels = scene.render(2.0, Weather(rain=1.0))
    assert np.array_equal(labels, rain_labels)
    assert rain.mean() < 0.95 * clear.mean()
    assert (
        np.ptp(rain.astype(int), axis=-1)[labels == TREE].mean()
        < 0.75 * np.ptp(clear.astype(int), axis=-1)[labels == TREE].mean()
    )
    sky = labels == SKY
    both = sky[:, 1:] & sky[:, :-1]
    rough = [np.abs(np.diff(image.astype(int).mean(-1), axis=1))[both].mean() for image in (clear, rain)]
    assert rough[1] > 1.5 * rough[0]


def test_weather_changes_gradually_between_frames(frames):
    means = [image.mean() for image, _ in frames]
    assert max(abs(a - b) for a, b in itertools.pairwise(means)) < 25


def test_cars_and_people_move(scene):
    (_, before), (_, after) = scene.render(2.0), scene.render(2.4)
    for label in (CAR, PERSON):
        a, b = before == label, after == label
        assert (a ^ b).sum() > 0.1 * (a | b).sum()


def test_people_walk_relative_to_the_ground():
    walkers = [thing for thing in Layout(np.random.default_rng(0)).people if not thing.crosses]
    for walker in walkers[:5]:
        (_, z0), (_, z1) = walker.place(0.0, 0.0), walker.place(0.5, 0.0)
        assert 0.3 < abs(z1 - z0) < 1.0
        assert walker.step(0.0, z0) != walker.step(0.5, z1)


def test_labels_follow_the_drawn_objects(scene):
    image, labels = scene.render(2.0)
    sky, tree = (image[labels == c].astype(int).mean(0) for c in (SKY, TREE))
    assert sky[2] > sky[0]
    assert tree[1] > max(tree[0], tree[2])


def test_the_stream_draws_a_frame_only_when_asked():
    asked = []

    def weather(progress):
        asked.append(progress)
        return Weather()

    stream = street_stream(frames=5, size=SMALL, weather=weather)
    assert asked == []
    next(stream)
    assert asked == [0.0]
    assert len(list(stream)) == 4
    assert asked == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_stream_of_one_frame_works():
    assert len(list(street_stream(frames=1, size=SMALL))) == 1


def test_stills_are_clear_diverse_and_the_same_each_time():
    stills = list(street_stills(4, SMALL, seed=7))
    again = list(street_stills(4, SMALL, seed=7))
    assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(stills, again, strict=True))
    for (a, _), (b, _) in itertools.combinations(stills, 2):
        assert np.abs(a.astype(int) - b).mean() > 10
    assert all(image.mean() > 80 for image, _ in stills)
    assert not np.array_equal(stills[0][0], next(street_stills(1, SMALL, seed=8))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StreetScene(0, (20, 192)), r"\(20, 192\).*at least \(48, 64\)"),
        (lambda: StreetScene(0, 128), "two integers"),
        (lambda: StreetScene(0, (128.0, 192.0)), "two integers"),
        (lambda: StreetScene(-1), "seed is -1"),
        (lambda: StreetScene(0, SMALL).render(-1.0), "time is -1.0"),
        (lambda: StreetScene(0, SMALL).render(float("nan")), "time is nan"),
        (lambda: StreetScene(0, SMALL).render("now"), "time is 'now'"),
        (lambda: StreetScene(0, SMALL).render(0.0, "rain"), "expected a Weather"),
        (lambda: Weather(fog=1.5), r"Weather.fog is 1.5; expected a number in \[0, 1\]"),
        (lambda: Weather(rain=float("nan")), "Weather.rain is nan"),
        (lambda: Weather(darkness="dark"), "Weather.darkness is 'dark'"),
        (lambda: drift(1.01), "progress is 1.01"),
        (lambda: drift(-0.1), "progress is -0.1"),
        (lambda: street_stream(frames=0), "frames is 0"),
        (lambda: street_stream(fps=0), "fps is 0"),
        (lambda: street_stream(size=(8, 8)), "at least"),
        (lambda: street_stills(0), "count is 0"),
        (lambda: street_stills(1, (8, 8)), "at least"),
    ],
)
def test_invalid_arguments_say_what_came_and_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message):
        call()

"""What the demo shows: frame, changes and both predictions in four panels above a legend."""

from __future__ import annotations

import numpy as np
import pytest

from ttt_adapt.data.street import StreetClip
from ttt_adapt.evaluation.demo_video import SCALE, middle_of_the_night, pictures
from ttt_adapt.view.overlay import panels

pytest.importorskip("PIL", reason='needs Pillow: pip install "ttt-adapt[video]"')
pytest.importorskip("torchmetrics", reason='needs torchmetrics: pip install "ttt-adapt[eval]"')


@pytest.fixture(scope="module")
def street() -> StreetClip:
    return StreetClip(seed=0, frames=8, size=(48, 64))


def test_every_frame_gives_a_picture_of_one_size_with_the_frame_in_its_first_panel(street):
    truth = [labels for _, labels in street]
    shown = list(pictures(street, truth, truth))
    assert len(shown) == len(street)
    assert len({picture.shape for picture in shown}) == 1
    height, width = 48 * SCALE, 64 * SCALE
    bar = panels({"x": np.zeros((height, width, 3), np.uint8)}).shape[0] - height
    for picture, (frame, _) in zip(shown, street, strict=True):
        assert np.array_equal(picture[bar : bar + height : SCALE, :width:SCALE], frame)
        assert picture.shape[0] > 2 * (bar + height)  # the legend is below the panels


def test_the_captions_name_the_weather_and_the_scores_of_both_models(street, monkeypatch):
    captions = []
    monkeypatch.setattr(
        "ttt_adapt.evaluation.demo_video.panels",
        lambda images, columns: captions.append(list(images)) or panels(images),
    )
    truth = [labels for _, labels in street]
    wrong = [np.where(labels == 0, 1, 0).astype(labels.dtype) for labels in truth]
    list(pictures(street, wrong, truth))
    assert [text[0] for text in captions] == [f"frame: {street.weather(i).title}" for i in range(len(street))]
    for _, _, fixed, adapted in captions:
        assert fixed == "fixed model: mIoU 0.0 now, 0.0 so far"
        assert adapted == "adapted model: mIoU 100.0 now, 100.0 so far"


def test_the_picture_of_the_night_is_from_the_middle_of_the_darkest_frames():
    street = StreetClip(seed=0, frames=240, size=(48, 64))
    assert street.weather(middle_of_the_night(street)).title == "night 0.9"
    darkest = [i for i in range(240) if street.weather(i).darkness == 0.9]
    assert abs(middle_of_the_night(street) - np.mean(darkest)) <= 1

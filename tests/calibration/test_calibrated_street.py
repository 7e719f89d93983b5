"""The shipped street model: fresh stills of an ordinary day lie below the limit, bad weather lies above it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttt_adapt import StreamAdapter
from ttt_adapt.data.drift import parse_drift
from ttt_adapt.data.street import WEIGHTS, street_stills
from ttt_adapt.tasks.checkpoint import load_checkpoint

CLEAR, BAD = 100, 20


@pytest.fixture(scope="module")
def trained():
    return load_checkpoint(WEIGHTS)


@pytest.fixture(scope="module")
def stills(trained) -> list[np.ndarray]:
    """Stills of streets that the model was neither trained nor calibrated on."""
    return [frame for frame, _ in street_stills(CLEAR, trained.spec.size, seed=7)]


def drifts_of(trained, frames) -> np.ndarray:
    """The drift of every frame, as a stream shows it."""
    found = []
    with StreamAdapter(trained.model, calibration=trained.calibration, preprocess=trained.spec.preprocess()) as adapter:
        for frame in frames:
            adapter.step(frame)
            found.append(adapter.drift)
    return np.array(found)


def test_its_own_stills_have_a_mean_drift_of_one_and_five_of_a_hundred_lie_above_the_limit(trained):
    calibration = trained.calibration
    drifts = np.array(calibration.drifts) / calibration.usual_drift
    assert len(drifts) == calibration.stills == 40
    assert drifts.mean() == pytest.approx(1.0)
    assert (drifts > calibration.limit).mean() == pytest.approx(0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_of_it_in_half_precision_is_known(dtype):
    trained = load_checkpoint(WEIGHTS)
    trained.calibration.check(trained.model.to(dtype))


def test_fresh_stills_of_an_ordinary_day_are_usual(trained, stills):
    drifts = drifts_of(trained, stills)
    assert (drifts <= trained.calibration.limit).mean() >= 0.9
    assert drifts.mean() == pytest.approx(1.0, abs=0.1)
    assert trained.calibration.limit == pytest.approx(np.quantile(drifts, 0.95), rel=0.15)


@pytest.mark.parametrize("name", ["night:3", "fog:3", "rain:3", "noise:3"])
def test_bad_weather_is_not_usual(trained, stills, name):
    drift = parse_drift(name, 0)
    frames = [drift.apply(frame, i) for i, frame in enumerate(stills[:BAD])]
    assert (drifts_of(trained, frames) > trained.calibration.limit).mean() >= 0.8

"""Short streams made of stills, and the choice of how gradient steps are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.calibration.agreement import ByAgreement, ByLabels
from ttt_adapt.calibration.calibrate import TOLERANCE, calibrate
from ttt_adapt.calibration.pans import SHARE, pan
from ttt_adapt.calibration.settings import CANDIDATES, FRAMES, Way, choose_settings
from ttt_adapt.data.drift import parse_drift
from ttt_adapt.errors import ConfigError

SIZE = (32, 48)


def smooth_still(seed: int = 0, size=SIZE) -> np.ndarray:
    """A picture of gentle slopes, uint8 [H, W, 3]."""
    generator = np.random.default_rng(seed)
    y, x = (np.linspace(0, 1, side) for side in size)
    waves = [np.sin(3 * (a * y[:, None] + b * x[None] + c)) for a, b, c in generator.uniform(-1, 1, (3, 3))]
    return (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


# ---- pans


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (5, 64)])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_frames_have_the_size_of_the_still_and_stay_in_its_range(size, frames):
    still = np.random.default_rng(0).integers(40, 200, (*size, 3), dtype=np.uint8)
    label = np.random.default_rng(1).choice([0, 3, 7, 255], size)
    found = list(pan(still, label, frames))
    assert len(found) == frames
    for frame, ids in found:
        assert (frame.shape, frame.dtype, ids.shape, ids.dtype) == (still.shape, still.dtype, label.shape, label.dtype)
        assert still.min() <= frame.min()
        assert frame.max() <= still.max()
        assert set(np.unique(ids)) <= set(np.unique(label))


def test_the_crop_moves_from_the_upper_left_to_the_lower_right_without_leaving_the_still():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    still = np.stack([4 * y, 4 * x, 0 * x], -1).astype(np.uint8)  # its colour says where a pixel was
    frames = [frame.astype(int) for frame, _ in pan(still, None, 5)]
    for channel, side in ((0, SIZE[0]), (1, SIZE[1])):
        starts, ends = (
            [frame[..., channel].min() / 4 for frame in frames],
            [f[..., channel].max() / 4 for f in frames],
        )
        assert starts == sorted(starts)
        assert starts[0] == pytest.approx(0, abs=0.5)
        assert ends[-1] == pytest.approx(side - 1, abs=0.5)
        spans = [end - start + 1 for start, end in zip(starts, ends, strict=True)]
        assert spans == pytest.approx([round(side * SHARE)] * 5, abs=0.75)


def test_labels_move_with_the_picture():
    label = (np.mgrid[: SIZE[0], : SIZE[1]].sum(0) // 20).astype(np.int64)
    still = np.repeat((label * 40).astype(np.uint8)[..., None], 3, -1)  # the picture of its label
    previous = None
    for frame, ids in pan(still, label, 4):
        shown = frame[..., 0] / 40
        inside = np.abs(shown - np.round(shown)) < 1e-6  # no edge between two ids
        agree = (np.round(shown) == ids)[inside].mean()
        assert inside.mean() > 0.7
        assert agree > 0.97
        assert previous is None or not np.array_equal(ids, previous)
        previous = ids


@pytest.mark.parametrize("label", [None, 3, np.int64(4), torch.tensor(2)])
def test_an_answer_for_the_whole_still_stays_as_it_is(label):
    assert all(ids is label for _, ids in pan(smooth_still(), label, 3))


# ---- settings


@pytest.fixture
def model() -> nn.Module:
    return settle_norms(zoo.UNet())


def branch_of(model: nn.Module) -> MAEBranch:
    torch.manual_seed(5)
    return MAEBranch.attach(model, "encoder")


STILLS = [smooth_still(seed) for seed in range(16)]
LABELS = [(still[..., 0] // 52).astype(np.int64) for still in STILLS]


def run(model: nn.Module, branch: MAEBranch | None, **keywords):
    return calibrate(
        model, keywords.pop("stills", STILLS), branch=branch, preprocess=Normalize(), drifts=["night"], **keywords
    )


@pytest.mark.parametrize("labels", [None, LABELS], ids=["agreement", "labels"])
def test_the_settings_gain_most_among_those_that_lose_little_without_a_drift(model, labels):
    branch = branch_of(model)
    with left_as_it_was(model):
        before = {name: value.clone() for name, value in branch.state_dict().items()}
        found = run(model, branch, labels=labels, steps=True)
        assert same_bits(dict(branch.state_dict()), before)
    assert branch.calibration is found
    fixed, *rows = found.record["settings"]
    assert (fixed["settings"], fixed["gain"], fixed["loss"]) == ("fixed", 0.0, 0.0)
    assert [row["settings"] for row in rows] == [dict(each) for each in CANDIDATES]
    assert {"iterations": 0} in [row["settings"] for row in rows]
    for row in rows:
        assert row["scores"].keys() == {"none", "night:3"}
        assert row["gain"] == pytest.approx(row["scores"]["night:3"] / fixed["scores"]["night:3"] - 1)
        assert row["loss"] == pytest.approx(1 - row["scores"]["none"] / fixed["scores"]["none"])
    tolerance = TOLERANCE["agreement" if labels is None else "labels"]
    allowed = [row for row in rows if row["loss"] <= tolerance] or [{"settings": {"iterations": 0}, "gain": 0.0}]
    assert found.settings == max(allowed, key=lambda row: row["gain"])["settings"]
    assert found.digest == run(model, branch, labels=labels).digest  # the rule is chosen as without steps


@pytest.mark.parametrize("labels", [None, LABELS[:2]], ids=["agreement", "labels"])
def test_the_scores_are_those_of_streams_that_a_user_would_run(model, labels):
    branch, drift = branch_of(model), parse_drift("night", 0)
    calibration = run(model, branch, choose=False)
    _, (fixed, *rows) = choose_settings(
        branch, calibration, STILLS[:2], labels, [drift], 1.0, Way(preprocess=Normalize(), seed=3)
    )
    moving = [each for i in range(2) for each in pan(STILLS[i], None if labels is None else labels[i], FRAMES)]
    clean = [frame for frame, _ in moving]
    pictures = {"none": clean, "night:3": [drift.apply(frame, i) for i, frame in enumerate(clean)]}
    with torch.no_grad():
        plain = {name: [model(Normalize()(frame)) for frame in frames] for name, frames in pictures.items()}
    score = ByAgreement(plain["none"]) if labels is None else ByLabels([ids for _, ids in moving])
    for name, frames in pictures.items():
        assert fixed["scores"][name] == pytest.approx(score(plain[name]))
        config = StreamConfig.online(lr=1e-4, source_pull=0.1, seed=3)
        with StreamAdapter(model, branch, config=config, calibration=calibration, preprocess=Normalize()) as adapter:
            assert rows[2]["scores"][name] == pytest.approx(score(list(adapter.stream(frames))))


def test_where_everything_loses_too_much_no_gradient_step_is_taken(model):
    branch = branch_of(model)
    calibration = run(model, branch, choose=False)
    settings, _ = choose_settings(
        branch, calibration, STILLS[:1], None, [parse_drift("night", 0)], -1.0, Way(preprocess=Normalize())
    )
    assert settings == {"iterations": 0}


def test_the_same_stills_give_the_same_settings_and_scores(model):
    first, again = (run(model, branch_of(model), steps=True).record["settings"] for _ in range(2))
    assert first == again


BAD = {
    "few stills": ({"stills": STILLS[:15]}, "there are fewer than 16 stills"),
    "no branch": ({}, "there is no branch: pass branch="),
    "no choice": ({"choose": False}, "choose is False"),
    "floats": ({"stills": [torch.randn(3, *SIZE) for _ in range(16)]}, "stills are not uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_steps_without_what_they_need_are_refused_and_nothing_changes(model, case):
    keywords, message = BAD[case]
    branch = None if case == "no branch" else branch_of(model)
    with left_as_it_was(model), pytest.raises(ConfigError, match=message):
        run(model, branch, steps=True, **keywords)
    assert branch is None or branch.calibration is None

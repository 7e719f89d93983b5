"""A calibration in words says what it holds, and whether it belongs to the model."""

from __future__ import annotations

import itertools

import pytest
import torch

from arm_inputs import VIT, checkpoint, frames
from ttt_adapt.calibration.describe import (
    FAR,
    candidates_of,
    describe_calibration,
    describe_distance,
    describe_rule,
    drifts_of,
    in_columns,
    is_far,
    tried_settings,
)
from ttt_adapt.model.rule import Rule
from ttt_adapt.tasks.calibrate import SourceStills, calibrate_checkpoint

KINDS = ("batchnorm", "norms", "blocks", "input", "input+norms", "input+blocks")
RULES = [
    Rule(points, per, margin, strength, largest)
    for points, per, margin, strength, largest in itertools.product(
        KINDS, ("layer", "channel"), ("mean", "high"), (1.0, 1.5), (0.5, 0.8)
    )
    if points != "input" or margin == "mean"  # the image has a margin of its own
]


@pytest.fixture(scope="module")
def made():
    found = checkpoint()
    stills = SourceStills([frame for frame, _ in frames(16)], of=16, unlabelled="there are none")
    calibrate_checkpoint(found, stills, drifts=["night", "fog:2"])
    return found


def test_every_rule_has_words_of_its_own():
    assert len({describe_rule(rule) for rule in RULES}) == len({in_columns(rule) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", [Rule("none"), Rule("batchnorm", largest=0.0)])
def test_a_rule_that_corrects_nothing_says_so(rule):
    assert describe_rule(rule) == "no frame is corrected"
    assert in_columns(rule) == ("nowhere: the model as it is", "", "")


def test_the_rules_that_were_tried_come_best_first_and_one_of_them_is_chosen(made):
    tried = candidates_of(made.calibration)
    assert [each.gain for each in tried] == sorted((each.gain for each in tried), reverse=True)
    assert sum(each.chosen for each in tried) == 1
    assert drifts_of(made.calibration) == ["night:3", "fog:2"]
    for rule in (tried[0].rule, tried[-1].rule, Rule("batchnorm", largest=0.0)):
        assert sum(each.chosen for each in candidates_of(made.calibration.replace(rule=rule))) == 1


def test_without_a_choice_there_is_nothing_to_compare(made):
    plain = made.calibration.replace(record={})
    assert candidates_of(plain) == drifts_of(plain) == []
    assert "not chosen" in dict(describe_calibration(plain, made.model))["chosen"]


def test_chosen_settings_are_shown_with_what_they_gained(made):
    settings, rows = {"lr": 1e-3}, [{"settings": {"lr": 1e-3}, "gain": 0.25, "loss": 0.004, "scores": {}}]
    chosen = made.calibration.replace(settings=settings, record={**made.calibration.record, "settings": rows})
    assert dict(describe_calibration(chosen, made.model))["settings"] == "lr=0.001: +25.0% under drifts, -0.4% without"
    assert dict(describe_calibration(made.calibration, made.model))["settings"] == "those of the preset"


def test_the_settings_that_were_tried_come_best_first_with_the_fixed_model_among_them(made):
    rows = [
        {"settings": "fixed", "gain": 0.0, "loss": 0.0, "scores": {}},
        {"settings": {"iterations": 0}, "gain": 0.05, "loss": 0.001, "scores": {}},
        {"settings": {"lr": 1e-4, "gate": "calibrated"}, "gain": 0.25, "loss": 0.004, "scores": {}},
    ]
    chosen = made.calibration.replace(settings={"iterations": 0}, record={**made.calibration.record, "settings": rows})
    tried = tried_settings(chosen)
    assert [each.words for each in tried] == [
        "lr=0.0001, gate='calibrated'", "iterations=0 (no gradient step)", "the fixed model",
    ]  # fmt: skip
    assert [(each.gain, each.loss, each.chosen) for each in tried] == [
        (0.25, 0.004, False), (0.05, 0.001, True), (0.0, 0.0, False),
    ]  # fmt: skip
    assert tried_settings(made.calibration) == []


def test_weights_that_were_not_calibrated_are_told(made):
    other = checkpoint(1)
    assert "of these weights" in dict(describe_calibration(made.calibration, made.model))["calibration"]
    assert "OTHER WEIGHTS" in dict(describe_calibration(made.calibration, other.model))["calibration"]


def test_only_batchnorm_knows_how_far_the_stills_are(made):
    shifted = checkpoint()
    with torch.no_grad():
        for name, value in shifted.model.state_dict().items():
            if name.endswith("running_mean"):
                value.add_(100.0)
    stills = SourceStills([frame for frame, _ in frames(10)], of=10)
    far = calibrate_checkpoint(shifted, stills, choose=False)
    assert far.distance > FAR
    assert is_far(far)
    assert "far" in describe_distance(far)
    bare = checkpoint(**VIT)
    unknown = calibrate_checkpoint(bare, stills, choose=False)
    batchnorm = "batchnorm" in unknown.statistics
    assert (unknown.distance is None) == (not batchnorm)
    if not batchnorm:
        assert not is_far(unknown)
        assert "unknown" in describe_distance(unknown)

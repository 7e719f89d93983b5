"""`calibrate`: all or nothing, and the best candidate by the written rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, settle_norms
from ttt_adapt import MAEBranch, Normalize
from ttt_adapt.calibration.agreement import ByAgreement, ByLabels
from ttt_adapt.calibration.calibrate import TOLERANCE, calibrate, candidates
from ttt_adapt.errors import ConfigError, FrameError, TTTAdaptError

DRIFTS = ("night", "noise")


def stills(count: int = 8, size=(32, 48), seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return list(generator.integers(0, 256, (count, *size, 3), dtype=np.uint8))


def run(model: nn.Module, frames=None, **keywords):
    frames = stills() if frames is None else frames
    return calibrate(model, frames, **{"preprocess": Normalize(), "drifts": DRIFTS, **keywords})


@pytest.fixture
def model() -> nn.Module:
    return settle_norms(zoo.UNet())


BAD = {
    "too few stills": ({"frames": stills(3)}, "got 3 stills; expected at least 8"),
    "stills of two sizes": ({"frames": [*stills(4), *stills(4, (32, 64))]}, "still 4"),
    "a drift misspelt": ({"drifts": ("nihgt",)}, "nihgt"),
    "too few labels": ({"labels": [np.zeros((32, 48), int)] * 3}, "got 3 labels for 8 stills"),
    "labels of another size": ({"labels": [np.zeros((8, 8), int)] * 8}, r"shape \(8, 8\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(model, case):
    keywords, message = BAD[case]
    branch = MAEBranch.attach(model, "encoder")
    with left_as_it_was(model), pytest.raises(TTTAdaptError, match=message):
        run(model, branch=branch, **keywords)
    assert branch.calibration is None


def test_a_branch_of_another_model_is_refused(model):
    branch = MAEBranch.attach(zoo.UNet(), "encoder")
    with pytest.raises(ConfigError, match="attached to another model"):
        run(model, branch=branch)
    assert branch.calibration is None


def test_a_still_that_is_no_frame_is_refused(model):
    with pytest.raises(FrameError, match="still 7"):
        run(model, [*stills(7), np.zeros((32, 48), np.uint8)])


def test_the_branch_gets_what_is_returned(model):
    branch = MAEBranch.attach(model, "encoder")
    found = run(model, branch=branch)
    assert branch.calibration is found
    assert found.loss is not None


def test_the_same_stills_give_the_same_calibration(model):
    assert run(model).digest == run(model).digest


def rows_of(record) -> list[dict]:
    return [row for row in record["candidates"] if row["rule"] != "fixed"]


@pytest.mark.parametrize(
    ("make", "size", "labelled"),
    [(zoo.UNet, (32, 48), False), (zoo.UNet, (32, 48), True), (zoo.swin_features, (64, 64), False)],
)
def test_the_rule_gains_most_among_those_that_lose_little_without_a_drift(make, size, labelled):
    model = settle_norms(make())
    labels = [np.random.default_rng(i).integers(0, 5, size) for i in range(8)] if labelled else None
    found = run(model, stills(size=size), labels=labels)
    record, by = found.record, "labels" if labelled else "agreement"
    assert (record["by"], record["tolerance"]) == (by, TOLERANCE[by])
    rows = rows_of(record)
    assert len(rows) == len(candidates(found.statistics))
    fixed = record["candidates"][0]["scores"]
    for row in rows:
        gains = [row["scores"][name] / fixed[name] - 1 for name in fixed if name != "none"]
        assert len(gains) == len(DRIFTS)
        assert row["gain"] == pytest.approx(np.mean(gains))
        assert row["loss"] == pytest.approx(1 - row["scores"]["none"] / fixed["none"])
    allowed = [row for row in rows if row["loss"] <= record["tolerance"] and row["gain"] > 0]
    if allowed:
        assert vars(found.rule) == max(allowed, key=lambda row: row["gain"])["rule"]
    else:
        assert found.rule.points == "none" or found.rule.largest == 0.0


def test_labels_may_be_arrays_or_tensors(model):
    labels = [np.random.default_rng(i).integers(0, 5, (32, 48)) for i in range(8)]
    arrays = run(model, labels=labels)
    tensors = run(model, labels=[torch.as_tensor(label) for label in labels])
    small = run(model, labels=[label.astype(np.uint8) for label in labels])
    assert arrays.record == tensors.record == small.record


def test_a_classifier_is_scored_by_one_class_for_each_image():
    model = settle_norms(zoo.resnet())
    found = run(model, stills(size=(64, 64)), labels=[0, 1, 2, 3, 4, 0, 1, 2])
    assert found.record["by"] == "labels"
    scores = found.record["candidates"][0]["scores"].values()
    assert all(0.0 <= score <= 1.0 and score * 4 == round(score * 4) for score in scores)  # 4 stills are held out


def test_floats_are_measured_and_nothing_is_chosen(model):
    found = run(model, [torch.randn(3, 32, 48) for _ in range(8)])
    assert (found.rule.points, dict(found.record)) == ("batchnorm", {})
    assert dict(run(model, choose=False).record) == {}


# ---- scores


def test_accuracy_and_mean_iou_are_those_of_hand():
    scores = torch.zeros(1, 3, 1, 4)
    for i, kind in enumerate((0, 1, 1, 2)):
        scores[0, kind, 0, i] = 1.0
    assert ByLabels([np.array([[0, 1, 2, 255]])])([scores]) == pytest.approx((1 + 1 / 2 + 0) / 3)
    logits = [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])]
    assert ByLabels([1, 1])(logits) == 0.5
    with pytest.raises(ConfigError, match="no class scores"):
        ByLabels([1])([torch.zeros(1, 1)])


def test_agreement_is_one_for_the_same_and_less_for_others():
    clean = [torch.tensor([[0.0, 3.0]]), torch.tensor([[3.0, 0.0]])]
    same = ByAgreement(clean)
    assert same(clean) == pytest.approx(1.0)
    p = torch.tensor([0.0, 3.0]).softmax(0)
    swapped = 1 - float((p - p.flip(0)).abs().sum()) / 2
    assert same(clean[::-1]) == pytest.approx(swapped, rel=1e-5)


def test_agreement_of_dense_regression_falls_with_the_difference():
    clean = torch.linspace(-1, 1, 11).view(1, 1, 1, 11)
    agree = ByAgreement([clean])
    deviation = float((clean - clean.mean()).abs().mean())
    assert agree([clean]) == 1.0
    assert agree([clean + 0.5]) == pytest.approx(1 / (1 + 0.5 / deviation))
    with pytest.raises(ConfigError, match="no tensors of one size"):
        agree([torch.zeros(1, 1, 1, 5)])

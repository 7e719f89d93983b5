"""`calibrate`: all or nothing, and the best candidate by the written rule."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter
from ttt_adapt.calibration.agreement import ByAgreement, ByLabels
from ttt_adapt.calibration.calibrate import TOLERANCE, calibrate, candidates
from ttt_adapt.errors import ConfigError, FrameError, StateError, TTTAdaptError
from ttt_adapt.model.measure import take_stills, with_drifts
from ttt_adapt.model.rule import Rule

DRIFTS = ("night", "noise")


def stills(count: int = 16, size=(32, 48), seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return list(generator.integers(0, 256, (count, *size, 3), dtype=np.uint8))


def run(model: nn.Module, frames="sixteen", **keywords):
    frames = stills() if isinstance(frames, str) and frames == "sixteen" else frames
    return calibrate(model, frames, **{"preprocess": Normalize(), "drifts": DRIFTS, **keywords})


@pytest.fixture
def model() -> nn.Module:
    return settle_norms(zoo.UNet())


BAD = {
    "no stills": ({"frames": None}, "stills is None; expected frames"),
    "a path": ({"frames": "stills/"}, "stills is 'stills/'; expected frames"),
    "too few stills": ({"frames": stills(3)}, "got 3 stills; expected at least 8"),
    "stills of two sizes": ({"frames": [*stills(4), *stills(4, (32, 64))]}, "still 4"),
    "a drift misspelt": ({"drifts": ("nihgt",)}, "nihgt"),
    "too few labels": ({"labels": [np.zeros((32, 48), int)] * 3}, "got 3 labels for 16 stills"),
    "labels of another size": ({"labels": [np.zeros((8, 8), int)] * 16}, r"shape \(8, 8\)"),
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
    labels = [np.random.default_rng(i).integers(0, 5, size) for i in range(16)] if labelled else None
    found = run(model, stills(size=size), labels=labels)
    record, by = found.record, "labels" if labelled else "agreement"
    assert (record["by"], record["tolerance"]) == (by, TOLERANCE[by])
    rows = rows_of(record)
    assert [row["rule"] for row in rows] == [vars(rule) for rule in candidates(found.statistics)]
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


def test_the_image_is_tried_alone_and_together_with_every_rule_inside_of_the_model():
    for kinds in (("norms", "blocks"), ("batchnorm", "norms", "blocks")):
        inside, both = candidates(kinds), candidates((*kinds, "input"))
        beside = [dataclasses.replace(rule, points=f"input+{rule.points}") for rule in inside]
        assert sorted(both, key=str) == sorted([*inside, *beside, Rule("input")], key=str)
        assert len(set(both)) == len(both)
    assert candidates(("input",)) == [Rule("input")]


def test_the_tones_of_the_image_are_corrected_where_light_is_all_that_drifts():
    """A model without norms and blocks: a curve of the tones is all that could help it."""
    torch.manual_seed(0)
    pictures = [np.clip(each * 0.3 + 100, 0, 255).astype(np.uint8) for each in stills(24)]
    found = run(zoo.PlainSeg(), pictures, drifts=("night:5", "low-contrast:5"))
    assert found.rule == Rule("input")
    (best,) = rows_of(found.record)
    assert best["gain"] > 0


def test_labels_may_be_arrays_or_tensors(model):
    labels = [np.random.default_rng(i).integers(0, 5, (32, 48)) for i in range(16)]
    arrays = run(model, labels=labels)
    tensors = run(model, labels=[torch.as_tensor(label) for label in labels])
    small = run(model, labels=[label.astype(np.uint8) for label in labels])
    assert arrays.record == tensors.record == small.record


def test_a_classifier_is_scored_by_one_class_for_each_image():
    model = settle_norms(zoo.resnet())
    found = run(model, stills(size=(64, 64)), labels=[i % 5 for i in range(16)])
    assert found.record["by"] == "labels"
    scores = found.record["candidates"][0]["scores"].values()
    assert all(0.0 <= score <= 1.0 and score * 8 == round(score * 8) for score in scores)  # 8 stills are held out


def test_floats_are_measured_and_nothing_is_chosen(model):
    found = run(model, [torch.randn(3, 32, 48) for _ in range(16)])
    assert (found.rule.points, dict(found.record)) == ("batchnorm", {})
    assert dict(run(model, choose=False).record) == {}


def test_a_choice_needs_16_stills(model):
    few = run(model, stills(15))
    assert (few.rule, dict(few.record), few.stills, len(few.drifts)) == (Rule("batchnorm"), {}, 15, 15)
    assert rows_of(run(model, stills(16)).record)


def test_the_drifts_are_of_the_chosen_rule_and_of_all_stills(model):
    found = run(model)
    taken = take_stills(model, stills(), Normalize())
    assert found.drifts == with_drifts(model, found, taken).drifts
    assert len(found.drifts) == 16


def test_held_out_stills_are_spread_over_all_stills(model):
    """Stills that drifts are made of are those that are held out: their places show in what drifts are given."""
    frames = [np.full((32, 48, 3), i, np.uint8) for i in range(32)]
    for frame in frames:
        frame[::2] += 100
    seen = []

    def preprocess(frame):
        seen.append(int(np.asarray(frame)[1, 0, 0]))
        return Normalize()(frame)

    passes: list[int] = []

    def predict(x):
        passes.append(len(seen))
        return model(x)

    run(model, frames, preprocess=preprocess, predict=predict, drifts=())
    # the stills of every pass: first all are measured, then those that are not held out, then those that are
    measured = [seen[n - 1] for n in passes]
    rest = measured[len(frames) + 1 :]
    held = sorted(set(range(32)) - set(rest[: 32 - 12 + 1]))
    assert len(held) == 12
    gaps = np.diff([-1, *held, 32])
    assert gaps.max() <= 4


def test_a_model_that_a_stream_adapts_is_not_calibrated(model):
    branch = MAEBranch.attach(model, "encoder")
    with StreamAdapter(model, branch), pytest.raises(StateError):
        run(model, branch=branch)
    assert branch.calibration is None


@pytest.mark.parametrize("labelled", [False, True])
def test_only_a_handful_of_outputs_is_alive_at_once(model, labelled):
    alive: list[weakref.ref] = []
    most = 0

    def predict(x):
        nonlocal most
        output = model(x)
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(output))
        most = max(most, len(alive))
        return output

    labels = [np.random.default_rng(i).integers(0, 5, (32, 48)) for i in range(24)] if labelled else None
    branch = MAEBranch.attach(model, "encoder")
    run(model, stills(24), labels=labels, predict=predict, branch=branch, drifts=("night",), steps=True)
    assert 1 <= most <= 4


# ---- scores


def test_accuracy_and_mean_iou_are_those_of_hand():
    scores = torch.zeros(1, 3, 1, 4)
    for i, kind in enumerate((0, 1, 1, 2)):
        scores[0, kind, 0, i] = 1.0
    assert ByLabels([np.array([[0, 1, 2, 255]])])([scores]) == pytest.approx((1 + 1 / 2 + 0) / 3)
    logits = [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])]
    assert ByLabels([1, 1])(logits) == 0.5
    with pytest.raises(ConfigError, match=r"returned a tensor of \(1, 1\); expected class scores"):
        ByLabels([1])([torch.zeros(1, 1)])


@pytest.mark.parametrize("classes", [2, 3, 300])
def test_labels_may_have_any_number_of_classes(classes):
    label = np.array([[0, classes - 1], [1, classes - 1]])
    scores = torch.zeros(1, classes, 2, 2)
    for y, x in np.ndindex(2, 2):
        scores[0, int(label[y, x]), y, x] = 1.0
    assert ByLabels([label], ignore=None)([scores]) == 1.0
    last = [torch.nn.functional.one_hot(torch.tensor([classes - 1]), classes).float()]
    assert ByLabels([classes - 1])(last) == 1.0


def test_single_ids_all_count():
    logits = torch.zeros(1, 300)
    logits[0, 255] = 1.0
    assert ByLabels([255, 7], ignore=255)([logits, logits]) == 0.5


@pytest.mark.parametrize("wrong", [5, 254, -1])
def test_a_label_out_of_range_is_refused(model, wrong):
    labels = [np.zeros((32, 48), int) for _ in range(16)]
    for label in labels:
        label[3, 4] = wrong
    with left_as_it_was(model), pytest.raises(ConfigError, match=r"the model has 5 classes, from 0 on; id 255 is ign"):
        run(model, labels=labels)
    with pytest.raises(ConfigError, match="the model has 2 classes"):
        ByLabels([wrong])([torch.tensor([[0.0, 1.0]])])
    found = run(model, labels=labels, ignore=wrong)
    assert found.record["by"] == "labels"


def test_agreement_is_one_for_the_same_and_less_for_others():
    clean = [torch.tensor([[0.0, 3.0]]), torch.tensor([[3.0, 0.0]])]
    same = ByAgreement(clean, distribution=True)
    assert same(clean) == pytest.approx(1.0)
    p = torch.tensor([0.0, 3.0]).softmax(0)
    swapped = 1 - float((p - p.flip(0)).abs().sum()) / 2
    assert same(clean[::-1]) == pytest.approx(swapped, rel=1e-5)


def test_an_output_with_few_channels_is_no_distribution_unless_somebody_says_so():
    generator = torch.Generator().manual_seed(3)
    for channels in (1, 2, 3, 4, 7):
        clean, other = torch.randn(2, 1, channels, 5, 6, generator=generator)
        overlap = float(torch.minimum(clean.softmax(1), other.softmax(1)).sum(1).mean())
        deviation = float((clean - clean.mean()).abs().mean())
        difference = 1 / (1 + float((clean - other).abs().mean()) / deviation)
        expected = {None: overlap if channels >= 4 else difference, True: overlap, False: difference}
        for distribution, value in expected.items():
            if channels > 1 or not distribution:  # one channel holds no distribution
                assert ByAgreement([clean], distribution)([other]) == pytest.approx(value, rel=1e-5)


def test_the_caller_may_say_what_outputs_are(model):
    scores = [
        run(model, distribution=distribution).record["candidates"][0]["scores"]["night:3"]
        for distribution in (None, True, False)
    ]
    assert scores[0] == scores[1] != scores[2]


def test_agreement_of_dense_regression_falls_with_the_difference():
    clean = torch.linspace(-1, 1, 11).view(1, 1, 1, 11)
    agree = ByAgreement([clean])
    deviation = float((clean - clean.mean()).abs().mean())
    assert agree([clean]) == 1.0
    assert agree([clean + 0.5]) == pytest.approx(1 / (1 + 0.5 / deviation))
    with pytest.raises(ConfigError, match="no tensors of one size"):
        agree([torch.zeros(1, 1, 1, 5)])


@pytest.mark.parametrize(
    "model", [None, "resnet18", lambda x: x, stills(8)], ids=["None", "text", "function", "stills"]
)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ConfigError, match=f"the model is a {type(model).__name__}; expected a torch.nn.Module"):
        calibrate(model, stills(8))


def test_a_preprocess_that_raises_is_told_with_the_number_of_the_still():
    def mine(frame):
        raise ValueError("mine")

    with pytest.raises(FrameError, match="still 0: preprocess raised ValueError: mine"):
        calibrate(zoo.resnet(), stills(8), preprocess=mine)

"""Modifiers of arms: what `+smooth`, `+vote` and `+class` compute, and how names are put together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arm_inputs import CONFIG, checkpoint, frames, predictions
from conftest import photograph, same_bits
from ttt_adapt.arms import ARMS, find_arm
from ttt_adapt.errors import ConfigError
from ttt_adapt.evaluation.runners import start
from ttt_adapt.evaluation.runners.modifiers import ClassBalanced, Smoothed, Voting
from ttt_adapt.evaluation.runners.streaming import Adapting


class Fake:
    """Hands out scores that are given; `predict` is a fixed linear map of the image."""

    loss = None

    def __init__(self, scores):
        self.scores, self.model = iter(scores), nn.Conv2d(3, 4, 1)

    def step(self, frame):
        return next(self.scores)

    def predict(self, x):
        with torch.no_grad():
            return self.model(x)

    def close(self):
        pass


def test_smoothing_is_the_mean_of_the_last_distributions():
    given = [torch.randn(1, 4, 3, 5) for _ in range(5)]
    smoothed = Smoothed(Fake(given), 3)
    for t in range(5):
        found = smoothed.step(None).softmax(1)
        expected = np.mean([s.double().softmax(1).numpy() for s in given[max(t - 2, 0) : t + 1]], axis=0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_the_vote_is_the_majority_of_views_and_ties_go_to_the_likelier_class():
    fake = Fake([torch.randn(1, 4, 16, 24) * 0.1])
    x = torch.randn(1, 3, 16, 24)
    first = fake.scores.__reduce__()[1][0][0]
    labels, likely = [], []
    for size in ((16, 24), (8, 12), (24, 36)):
        scaled = x if size == (16, 24) else F.interpolate(x, size, mode="bilinear", antialias=True)
        for flip in (False, True):
            scores = first if size == (16, 24) and not flip else fake.predict(scaled.flip(3) if flip else scaled)
            scores = scores.flip(3) if flip else scores
            scores = F.interpolate(scores, (16, 24), mode="bilinear")
            likely.append(scores.softmax(1).numpy())
            labels.append(scores.argmax(1).numpy())
    found = Voting(fake, lambda frame: frame, scales=(0.5, 1.5)).step(x).argmax(1).numpy()
    votes = np.stack([(np.stack(labels) == c).sum(0) for c in range(4)], 1)
    expected = (votes + np.mean(likely, 0)).argmax(1)
    np.testing.assert_array_equal(found, expected)
    assert (votes == votes.max(1, keepdims=True)).sum(1).max() > 1, "no tie in this example"


def test_class_balance_counts_classes_of_the_source_model_and_of_the_adapted_one():
    made = checkpoint()
    (first, _), (second, _) = frames(2)
    with torch.no_grad():
        source = made.model(made.spec.preprocess()(second)).argmax(1).unique().numel()
    assert source > 1
    runner = ClassBalanced(start(ARMS["self-train-plain"], made, CONFIG.replace(lr=0.0)), length=3)
    runner.step(first)
    assert list(runner.fewer) == [0]
    with torch.no_grad():
        next(p for name, p in reversed([*made.model.head.named_parameters()]) if "bias" in name)[0] += 1e4
    assert runner.step(second).argmax(1).unique().tolist() == [0]
    assert list(runner.fewer) == [0, source - 1]
    runner.close()


def of_classes(count: int) -> torch.Tensor:
    """Scores of three pixels that show so many of three classes."""
    return F.one_hot(torch.tensor([[[0], [1], [2]]]).clamp(max=count - 1), 3).movedim(-1, 1).float()


class Scripted:
    """A runner that predicts as many classes as it is told; its source model predicts three. It is its own adapter."""

    loss = None

    def __init__(self, counts):
        self.counts, self.events = iter(counts), []
        self.model, self.preprocess, self.adapter = nn.Identity(), None, self
        self.model.forward = lambda x: of_classes(3)

    def step(self, frame):
        self.events.append("step")
        return of_classes(next(self.counts))

    def reset(self):
        self.events.append("reset")


def test_class_balance_resets_where_the_mean_difference_over_the_buffer_is_above_a_half():
    fewer, buffer, expected = [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1], [], []
    resets = 0
    for less in fewer:
        reset = len(buffer) == 3 and sum(buffer) / len(buffer) > 0.5
        buffer = ([] if reset else buffer[-2:]) + [less]
        expected += ["reset", "step"] if reset else ["step"]
        resets += reset
    assert 1 < resets < 6
    scripted = Scripted(3 - less for less in fewer)
    runner = ClassBalanced(scripted, length=3)
    for _ in fewer:
        runner.step(torch.zeros(3, 4, 4))
    assert scripted.events == expected
    assert (runner.resets, list(runner.fewer)) == (resets, buffer)


def test_after_a_reset_class_balance_goes_on_like_a_new_stream():
    made = checkpoint()
    alone = [predictions("self-train-plain", made, clip=[pair])[0] for pair in frames(3)]
    runner = ClassBalanced(start(ARMS["self-train-plain"], made, CONFIG), length=1, slack=-99.0)  # at every frame
    found = [runner.step(frame).clone() for frame, _ in frames(3)]
    runner.close()
    assert same_bits(found, alone)
    assert runner.resets == 2


def test_names_are_put_together_from_left_to_right():
    arm = find_arm("tent+class+smooth-8")
    assert (arm.name, arm.title, arm.streaming) == ("tent+class+smooth-8", "Tent + Class + smoothing 8", True)
    runner = start(arm, checkpoint(), CONFIG)
    assert isinstance(runner, Smoothed)
    assert isinstance(runner.runner, ClassBalanced)
    assert isinstance(runner.runner.runner, Adapting)
    runner.close()
    assert not find_arm("online-shuffled+vote").streaming
    assert find_arm("offline-oracle+smooth").oracle
    every = start(find_arm("every-8"), checkpoint(), CONFIG)
    assert every.adapter.config.every == 8
    every.close()


def test_names_in_the_table_are_their_own():
    assert [find_arm(name).name for name in ARMS] == list(ARMS)
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onlin", "'onlin'; nearest: 'online'"),
        ("every-0", "no arm 'every-0'"),
        ("online+smoth", r"'\+smoth'; expected one of \+class-N, \+smooth-N, \+vote"),
        ("online+vote-3", r"'\+vote-3'"),
        ("online+smooth-0", r"'\+smooth-0'"),
        ("online+", "expected one of"),
    ],
)
def test_a_name_that_means_nothing_comes_with_what_would(name, message):
    with pytest.raises(ConfigError, match=message):
        find_arm(name)


@pytest.mark.parametrize("arm", ["fixed+class", "norm-ema+class", "offline-6+class", "online+smooth+class"])
def test_class_balance_refuses_arms_that_adapt_no_weights_and_gives_the_model_back(arm):
    made = checkpoint()
    before = photograph(made.model)
    with pytest.raises(ConfigError, match="right behind an arm that adapts weights"):
        start(find_arm(arm), made, CONFIG)
    assert photograph(made.model) == before
    predictions("online", made)  # the model has no adapter left

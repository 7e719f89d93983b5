"""Arms: what each may see, what it may depend on, and what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arm_inputs import CLASSES, CONFIG, SIZE, VIT, arm_run_by, checkpoint, frames, predictions, suited
from conftest import photograph, same_bits
from ttt_adapt.arms import ARMS, find_arm
from ttt_adapt.errors import ConfigError, DataError
from ttt_adapt.evaluation.run_arm import run_arm
from ttt_adapt.evaluation.runners import Fixed, configured, start

pytestmark = pytest.mark.usefixtures("small_collections")

SHORT = {"offline": "offline-6", "offline-oracle": "offline-oracle-6", "every-4": "every-2"}
COMPOSED = ["online+smooth-2", "fixed+vote", "tent+class", "self-train-plain+class-2+smooth"]
EVERY = [*(SHORT.get(name, name) for name in ARMS), *COMPOSED]
STREAMING = [name for name in EVERY if find_arm(name).streaming]
RECONSTRUCTING = [
    "no-memory",
    "implicit",
    "explicit",
    "online",
    "online-gate",
    "every-2",
    "online-shuffled",
    "offline-6",
]
LEARNING = [*RECONSTRUCTING, "self-train", "self-train-plain", "ema-teacher", "rotation"]


def classes_of(outputs) -> torch.Tensor:
    return torch.cat([output.argmax(1) for output in outputs])


# ---- every arm


def test_the_fixed_arm_is_the_plain_model_bitwise():
    made = checkpoint()
    normalize = made.spec.preprocess()
    with torch.no_grad():
        plain = [made.model(normalize(frame)) for frame, _ in frames()]
    assert same_bits(predictions("fixed", made), plain)


@pytest.mark.parametrize("arm", LEARNING)
def test_without_a_learning_rate_every_learning_arm_is_the_fixed_one(arm):
    made = suited(arm)
    found, fixed = predictions(arm, made, CONFIG.replace(lr=0.0)), predictions("fixed", made)
    if arm == "online-shuffled":  # keeps classes, not scores
        assert torch.equal(classes_of(found), classes_of(fixed))
    else:
        assert same_bits(found, fixed)


def test_without_a_learning_rate_tent_is_the_model_with_the_statistics_of_each_frame():
    assert same_bits(
        predictions("tent", checkpoint(**VIT), CONFIG.replace(lr=0.0)), predictions("fixed", checkpoint(**VIT))
    )
    made, plain = checkpoint(), checkpoint()
    found = predictions("tent", made, CONFIG.replace(lr=0.0))
    own = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in own:  # by the formula: each channel of the frame with its own mean and biased variance
        module.forward = lambda x, m=module: (
            ((x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + m.eps).sqrt())
            * m.weight[:, None, None]
            + m.bias[:, None, None]
        )
    assert own
    with torch.no_grad():
        for output, (frame, _) in zip(found, frames(), strict=True):
            torch.testing.assert_close(output, plain.model(plain.spec.preprocess()(frame)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arm", [name for name in EVERY if name != "fixed"])
def test_every_other_arm_changes_predictions_and_repeats_itself(arm):
    made = suited(arm)
    first, again = predictions(arm, made), predictions(arm, made)
    assert same_bits(first, again)
    assert not torch.equal(first[-1], predictions("fixed", made)[-1])


@pytest.mark.parametrize("arm", ["online", "online-shuffled", "offline-6", "rotation"])
def test_another_seed_draws_otherwise(arm):
    made = suited(arm)
    other = predictions(arm, made, CONFIG.replace(seed=1, lr=0.1))
    assert not same_bits(predictions(arm, made, CONFIG.replace(lr=0.1)), other)


@pytest.mark.parametrize("arm", EVERY)
@pytest.mark.parametrize("breaks", [False, True], ids=["to the end", "broken off"])
def test_an_arm_leaves_weights_buffers_and_flags_as_they_were(arm, breaks):
    made = suited(arm)
    model, branch = photograph(made.model), {k: v.clone() for k, v in made.branch.state_dict().items()}

    class Clip(list):
        def __iter__(self):
            yield from list.__iter__(self)
            if breaks:
                raise OSError("the disk is gone")

    if breaks:
        with pytest.raises(OSError, match="disk"):
            run_arm(find_arm(arm), made, Clip(frames(3)), CONFIG, name="clip")
    else:
        run_arm(find_arm(arm), made, Clip(frames(3)), CONFIG, name="clip")
    assert photograph(made.model) == model
    assert same_bits(branch, dict(made.branch.state_dict()))


@pytest.mark.parametrize("arm", EVERY)
def test_two_streams_of_an_arm_share_nothing(arm):
    """Step by step side by side, each predicts what it predicts alone."""
    ours, theirs = frames(), frames(seed=5)
    alone = [predictions(arm, suited(arm, 0), clip=ours), predictions(arm, suited(arm, 3), clip=theirs)]
    runners = [start(find_arm(arm), suited(arm, seed), CONFIG) for seed in (0, 3)]
    both: list[list] = [[], []]
    for runner, clip in zip(runners, (ours, theirs), strict=True):
        if not find_arm(arm).streaming:
            first = clip[0][0]
            oracle = find_arm(arm).oracle
            runner.prepare([frame for frame, _ in clip], (lambda p, f=first: float(p(f).std())) if oracle else None)
    for pair in zip(ours, theirs, strict=True):
        for runner, (frame, _), out in zip(runners, pair, both, strict=True):
            out.append(runner.step(frame).clone())
    for runner in runners:
        runner.close()
    assert same_bits(both, alone)


@pytest.mark.parametrize("arm", ["tent", "self-train", "self-train-plain", "ema-teacher", "fixed"])
def test_arms_that_need_no_branch_run_without_one(arm):
    made = checkpoint(branch=None)
    assert len(predictions(arm, made)) == 4


def test_an_arm_that_fails_in_mid_stream_gives_the_model_back():
    made = checkpoint()
    before = photograph(made.model)
    clip = [*frames(2), (np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8))]
    with pytest.raises(ValueError, match="40"):
        run_arm(ARMS["online"], made, clip, CONFIG, name="clip")
    assert photograph(made.model) == before
    run_arm(ARMS["online"], made, frames(2), CONFIG, name="clip")


# ---- the streaming rule


@pytest.mark.parametrize("arm", STREAMING)
def test_a_frame_is_predicted_before_the_next_is_read(arm):
    events = []

    def clip():
        for index, pair in enumerate(frames()):
            events.append(f"read {index}")
            yield pair

    run_arm(
        find_arm(arm), suited(arm), clip(), CONFIG, name="clip", on_frame=lambda i, *_: events.append(f"predict {i}")
    )
    assert events == [f"{what} {i}" for i in range(4) for what in ("read", "predict")]


@pytest.mark.parametrize("arm", EVERY)
def test_a_prediction_depends_on_the_future_only_where_the_arm_says_so(arm):
    """Two clips that part after the second frame; a peek shows in the first two predictions."""
    made, config = suited(arm), CONFIG.replace(lr=0.1)
    one, other = frames(), [*frames()[:2], *frames(seed=9)[:2]]
    seen = [predictions(arm, made, config, clip)[:2] for clip in (one, other)]
    if find_arm(arm).streaming:
        assert same_bits(*seen)
    else:
        assert not same_bits(*seen)


class Peeking(Fixed):
    """Predicts the mean of the next frame, if it is let: right everywhere on the clip below."""

    def __init__(self, *args):
        super().__init__(*args)
        self.frames, self.index = [], -1

    def prepare(self, frames, score=None):
        self.frames = list(frames)

    def step(self, frame):
        self.index += 1
        now = self.frames[min(self.index + 1, len(self.frames) - 1)] if self.frames else frame
        label = torch.full((1, *SIZE), int(now.mean()) // 64)
        return F.one_hot(label, 3).movedim(-1, 1).float()


def test_a_model_that_would_profit_from_a_peek_cannot(monkeypatch):
    """Labels are the brightness of the next frame; only an arm that is marked as not streaming gets at it."""
    brightness = [0, 1, 2, 0, 2, 1, 2]
    clip = [
        (np.full((*SIZE, 3), 64 * now + 10, np.uint8), np.full(SIZE, after, np.uint8))
        for now, after in zip(brightness, [*brightness[1:], 2], strict=True)
    ]
    made = checkpoint()
    accuracy = {}
    for streaming in (True, False):
        arm = arm_run_by(
            monkeypatch, lambda c, _: Peeking(c.model, c.spec.preprocess()), "peeking", streaming=streaming
        )
        accuracy[streaming] = run_arm(arm, made, clip, CONFIG, name="clip").scores["pixel_accuracy"]
    assert accuracy[False] == 1.0
    assert accuracy[True] < 0.2


def test_an_arm_that_sees_the_whole_clip_needs_one_that_can_be_read_again():
    with pytest.raises(DataError, match="online-shuffled.*generator"):
        run_arm(ARMS["online-shuffled"], checkpoint(), (pair for pair in frames()), CONFIG, name="clip")


@pytest.mark.parametrize("arm", [name for name in EVERY if "oracle" not in name])
def test_labels_reach_the_score_and_nothing_else(arm):
    """Other labels, same predictions and losses."""
    seen = {}
    for name, shift in (("true", 0), ("other", 1)):
        clip = [
            (frame, np.where(labels == 255, 255, (labels + shift) % 3).astype(np.uint8)) for frame, labels in frames()
        ]
        seen[name] = []
        torch.manual_seed(0)
        run = run_arm(
            find_arm(arm), suited(arm), clip, CONFIG, name="clip",
            on_frame=lambda _i, _f, prediction, _m, loss, to=seen[name]: to.append((prediction.tobytes(), loss)),
        )  # fmt: skip
        seen[name].append(run.losses)
        seen[f"{name} score"] = run.per_frame
    assert seen["true"] == seen["other"]
    assert seen["true score"] != seen["other score"]


def test_only_arms_that_say_oracle_are_given_a_score_and_a_score_is_all_they_get(monkeypatch):
    given = {}

    class Recording(Fixed):
        def prepare(self, frames, score=None):
            given[name] = score and score(self.step)
            assert all(frame.dtype == np.uint8 and frame.shape == (*SIZE, 3) for frame in frames)

    for name, oracle in (("honest", False), ("oracle", True)):
        arm = arm_run_by(
            monkeypatch,
            lambda c, _: Recording(c.model, c.spec.preprocess()),
            name,
            streaming=False,
            oracle=oracle,
        )
        run = run_arm(arm, checkpoint(), frames(), CONFIG, name="clip")
        given[f"{name} run"] = run.scores["miou"]
    assert given["honest"] is None
    assert given["oracle"] == given["oracle run"]
    assert [name for name, arm in ARMS.items() if arm.oracle] == ["offline-oracle"]


def test_the_runner_is_given_frames_only(monkeypatch):
    given = []

    class Recording:
        loss = None

        def step(self, *args):
            given.append(args)
            return torch.zeros(1, 3, *SIZE)

        def close(self):
            given.append("closed")

    clip = frames()
    run = run_arm(arm_run_by(monkeypatch, lambda *_: Recording()), checkpoint(), clip, CONFIG, name="clip")
    assert [len(args) for args in given[:-1]] == [1] * 4
    assert all(args[0] is frame for args, (frame, _) in zip(given[:-1], clip, strict=True))
    assert given[-1] == "closed"
    assert run.losses == [None] * 4


# ---- configurations


def test_a_run_holds_one_loss_and_score_per_frame():
    run = run_arm(ARMS["online"], checkpoint(), frames(), CONFIG.replace(seed=7), name="street", label="ours")
    assert (run.arm, run.clip, run.seed) == ("ours", "street", 7)
    assert len(run.per_frame) == len(run.losses) == 4
    assert all(loss > 0 for loss in run.losses)
    assert set(run.per_class) == set(CLASSES)
    assert 0 <= run.scores["miou"] <= 1
    assert run.ms_per_frame > 0


def test_memories_are_what_their_names_say():
    made = checkpoint()
    carry = {}
    for arm in ("no-memory", "implicit", "explicit", "online"):
        runner = start(ARMS[arm], made, CONFIG)
        carry[arm] = (runner.adapter.config.window, runner.adapter.config.carry_weights)
        runner.close()
    assert carry == {"no-memory": (1, False), "implicit": (1, True), "explicit": (3, False), "online": (3, True)}


@pytest.mark.parametrize(
    ("arm", "change"),
    [
        ("no-memory", {"window": 8}), ("explicit", {"carry_weights": True}), ("online", {"carry_weights": False}),
        ("every-4", {"every": 2}), ("offline-20", {"source_pull": 0.3}), ("online-gate+smooth", {"gate": "none"}),
    ],
)  # fmt: skip
def test_changes_that_would_make_another_arm_are_refused(arm, change):
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r} would make another arm of {arm.replace('+', '.')}"):
        start(find_arm(arm), checkpoint(), CONFIG, change)


def test_changes_of_an_arm_that_adapts_nothing_are_refused():
    with pytest.raises(ConfigError, match="fixed adapts no weights, so lr would change nothing"):
        start(ARMS["fixed"], checkpoint(), CONFIG, {"lr": 0.1})


def test_an_arm_is_what_it_is_whatever_the_configuration_of_the_online_arm():
    config = CONFIG.replace(window=2, carry_weights=False, every=3, gate="surprise", iterations=2)
    memories = {name: configured(ARMS[name], config) for name in ("no-memory", "implicit", "explicit", "online")}
    found = {name: (made.window, made.carry_weights) for name, made in memories.items()}
    assert found == {"no-memory": (1, False), "implicit": (1, True), "explicit": (2, False), "online": (2, True)}
    assert configured(find_arm("every-8+smooth"), config).every == 8
    offline = configured(find_arm("offline-20"), config)
    assert (offline.every, offline.gate, offline.iterations, offline.source_pull) == (1, "none", 1, 0.0)


def test_changes_win_over_defaults_of_an_arm():
    assert configured(ARMS["tent"], CONFIG).source_pull == 0.0
    made = configured(ARMS["tent"], CONFIG, {"source_pull": 0.25, "norm_stats": "frozen", "lr": 0.5})
    assert (made.source_pull, made.norm_stats, made.lr) == (0.25, "frozen", 0.5)

"""Arms: what each may see, what it may depend on, and what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arm_inputs import CLASSES, CONFIG, SIZE, VIT, arm_run_by, checkpoint, frames
from conftest import photograph, same_bits, settle_norms
from ttt_adapt import StreamConfig
from ttt_adapt.arms import ARMS, find_arm
from ttt_adapt.errors import ConfigError, DataError, StateError
from ttt_adapt.evaluation.runner import run_arm
from ttt_adapt.evaluation.runners import Fixed, configured, start
from ttt_adapt.evaluation.runners.modifiers import ClassBalanced, Smoothed, Voting
from ttt_adapt.evaluation.runners.streaming import Adapting, LayerStatistics, NormBlend
from ttt_adapt.evaluation.runners.whole_clip import Offline, Shuffled
from ttt_adapt.objectives import PseudoLabel, Rotation
from ttt_adapt.tasks.checkpoint import Checkpoint

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


def suited(name: str, seed: int = 0) -> Checkpoint:
    """A checkpoint that the arm applies to."""
    if name.startswith("ln-adapt"):
        return checkpoint(seed, **VIT)
    made = checkpoint(seed)
    if name == "rotation":
        return Checkpoint(made.model, Rotation.attach(made.model, "backbone"), made.spec)
    return made


def predictions(name: str, made: Checkpoint, config=CONFIG, clip=None) -> list[torch.Tensor]:
    clip = frames() if clip is None else clip
    arm = find_arm(name)
    runner = start(arm, made, config)
    try:
        if not arm.streaming:
            first = clip[0][0]
            runner.prepare([frame for frame, _ in clip], (lambda p: float(p(first).std())) if arm.oracle else None)
        return [runner.step(frame).clone() for frame, _ in clip]
    finally:
        runner.close()


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


# ---- single arms


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


def test_online_norm_ema_moves_the_statistics_and_online_does_not():
    made = checkpoint()
    before = {name: b.clone() for name, b in made.model.named_buffers() if "running" in name}
    moved = {}
    for arm in ("online", "online-norm-ema"):
        runner = start(ARMS[arm], made, CONFIG)
        runner.step(frames(1)[0][0])
        now = {name: b for name, b in made.model.named_buffers() if "running" in name}
        moved[arm] = sum(not torch.equal(now[name], before[name]) for name in before)
        runner.close()
    assert moved == {"online": 0, "online-norm-ema": len(before)}
    assert all(torch.equal(b, before[name]) for name, b in made.model.named_buffers() if name in before)


@pytest.mark.parametrize("arm", ["norm-ema", "norm-blend", "online-norm-ema", "online-norm-blend"])
def test_norm_arms_refuse_a_model_without_batchnorm(arm):
    with pytest.raises(ConfigError, match="no BatchNorm"):
        start(ARMS[arm], checkpoint(**VIT), CONFIG)


def test_arms_say_where_they_do_not_apply():
    with pytest.raises(ConfigError, match="no LayerNorm.*norm-ema"):
        start(ARMS["ln-adapt"], checkpoint(), CONFIG)
    with pytest.raises(ConfigError, match="no rotation head.*train --objective rotation"):
        start(ARMS["rotation"], checkpoint(), CONFIG)
    with pytest.raises(ConfigError, match="trained for Rotation"):
        start(ARMS["online"], suited("rotation"), CONFIG)


@pytest.mark.parametrize("arm", ["no-memory", "implicit", "explicit", "online", "online-shuffled", "offline"])
def test_reconstructing_arms_refuse_a_model_without_a_branch(arm):
    with pytest.raises(ConfigError, match="main task alone"):
        start(ARMS[arm], checkpoint(branch=None), CONFIG)


def test_blended_statistics_are_those_of_the_formula_in_every_layer_of_one_pass():
    made, plain = checkpoint(), checkpoint()
    passes = []
    made.model.register_forward_hook(lambda *_: passes.append(1))
    found = predictions("norm-blend", made)
    assert len(passes) == len(found)
    own = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def blended(m, x):
        mean = 0.5 * m.running_mean + 0.5 * x.mean((0, 2, 3))
        variance = 0.5 * m.running_var + 0.5 * x.var((0, 2, 3))
        y = (x - mean[:, None, None]) / (variance + m.eps).sqrt()[:, None, None]
        return y * m.weight[:, None, None] + m.bias[:, None, None]

    for module in own:
        module.forward = lambda x, m=module: blended(m, x)
    with torch.no_grad():
        for output, (frame, _) in zip(found, frames(), strict=True):
            torch.testing.assert_close(output, plain.model(plain.spec.preprocess()(frame)), rtol=1e-3, atol=1e-4)


def test_a_blend_without_a_share_is_the_fixed_model_also_where_batchnorm_activates():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = settle_norms(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), BatchNormAct2d(4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frame = torch.randn(1, 3, 8, 8)
    plain = Fixed(model, lambda x: x).predict(frame)
    assert (plain >= 0).all()
    assert torch.equal(NormBlend(model, lambda x: x, share=0.0).predict(frame), plain)
    blended = NormBlend(model, lambda x: x, share=0.5).predict(frame)
    assert (blended >= 0).all()
    assert not torch.equal(blended, plain)
    assert same_bits(before, model.state_dict())


def test_online_with_blended_statistics_and_no_rate_is_the_blend():
    blended = predictions("norm-blend", checkpoint())
    runner = start(ARMS["online-norm-blend"], checkpoint(), CONFIG, {"lr": 0.0})
    for output, (frame, _) in zip(blended, frames(), strict=True):
        torch.testing.assert_close(runner.step(frame), output)
    runner.close()


def test_averaged_statistics_are_those_of_pytorchs_training_mode():
    made, plain = checkpoint(), checkpoint()
    found = predictions("norm-ema", made)
    norms = [module for module in plain.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 0.05
    with torch.no_grad():
        for output, (frame, _) in zip(found, frames(), strict=True):
            for training in (True, False):
                for module in norms:
                    module.train(training)
                expected = plain.model(plain.spec.preprocess()(frame))
            assert torch.equal(output, expected)


def test_blended_statistics_start_from_the_source_at_every_frame():
    made = checkpoint()
    runner = start(ARMS["norm-blend"], made, CONFIG)
    (first, _), (second, _) = frames(2)
    alone = runner.step(second).clone()
    runner.step(first)
    assert torch.equal(runner.step(second), alone)
    runner.close()


def test_ln_adapt_refuses_a_layernorm_that_may_do_more_than_normalise():
    from timm.layers import LayerNormAct2d

    with pytest.raises(ConfigError, match="LayerNormAct2d of this model may do more"):
        LayerStatistics(nn.Sequential(nn.LayerNorm(4), LayerNormAct2d(4)), lambda frame: frame, 0.05, 0.1)


class Tokens(nn.Module):
    """A norm on tokens that are given, whatever image comes."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.tokens = norm, None

    def forward(self, _image):
        return self.norm(self.tokens)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 6, 4, 3)], ids=["tokens", "channels first"])
def test_ln_adapt_normalises_by_the_blend_of_own_and_running_statistics(shape):
    from timm.layers import LayerNorm2d

    norm = (nn.LayerNorm if len(shape) == 3 else LayerNorm2d)(6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    model = Tokens(norm)
    runner = LayerStatistics(model, lambda frame: frame, momentum=0.25, share=0.4)
    running = None
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (seed + 1)
            tokens = (x if len(shape) == 3 else x.permute(0, 2, 3, 1)).numpy()
            mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
            now = np.array([mean.mean(), variance.mean()])
            running = now if running is None else 0.75 * running + 0.25 * now
            mean, variance = 0.6 * mean + 0.4 * running[0], 0.6 * variance + 0.4 * running[1]
            expected = (tokens - mean) / np.sqrt(variance + norm.eps) * norm.weight.numpy() + norm.bias.numpy()
            model.tokens = x
            found = runner.step(torch.zeros(3, 4, 4))
            found = found if len(shape) == 3 else found.permute(0, 2, 3, 1)
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_ln_adapt_without_a_share_is_the_fixed_model_up_to_rounding():
    made = checkpoint(**VIT)
    runner = LayerStatistics(made.model, made.spec.preprocess(), momentum=0.05, share=0.0)
    found = [runner.step(frame) for frame, _ in frames()]
    torch.testing.assert_close(found, predictions("fixed", made), atol=1e-5, rtol=1e-5)


# ---- the whole clip


class Echo:
    """Predicts the brightness of the frame; its loss counts the steps."""

    def __init__(self):
        self.loss, self.seen = None, []

    def step(self, frame):
        self.seen.append(int(frame))
        self.loss = float(len(self.seen))
        return F.one_hot(torch.full((1, 2, 2), int(frame)), 9).movedim(-1, 1).float()

    def close(self):
        pass


def test_shuffled_frames_are_seen_in_random_order_and_predictions_are_put_back():
    echo = Echo()
    runner = Shuffled(echo, seed=3)
    runner.prepare(list(range(9)))
    assert sorted(echo.seen) == list(range(9))
    assert echo.seen != sorted(echo.seen)
    found, losses = [], []
    for frame in range(9):
        found.append(int(runner.step(frame).argmax(1)[0, 0, 0]))
        losses.append(int(runner.loss))
    assert found == list(range(9))
    assert losses == [echo.seen.index(frame) + 1 for frame in range(9)]
    with pytest.raises(StateError, match="more frames than prepare"):
        runner.step(9)


def test_offline_adapts_to_shuffled_frames_for_a_fixed_number_of_steps():
    made, clip = checkpoint(), frames()
    runner = start(find_arm("offline-10"), made, CONFIG.replace(source_pull=0.5, every=2))
    seen = []
    adapt = runner.runner.adapter.adapt
    runner.runner.adapter.adapt = lambda frame: (seen.append(frame), adapt(frame))
    runner.prepare([frame for frame, _ in clip])
    position = [next(i for i, (frame, _) in enumerate(clip) if frame is one) for one in seen]
    assert len(seen) == 10
    assert sorted(position[:4]) == sorted(position[4:8]) == [0, 1, 2, 3]
    config = runner.runner.adapter.config
    assert (config.source_pull, config.every, config.carry_weights) == (0.0, 1, True)
    weights = {k: v.clone() for k, v in made.model.state_dict().items()}
    runner.step(clip[0][0])
    assert same_bits(weights, dict(made.model.state_dict()))
    runner.close()


@pytest.mark.parametrize("best", [0, 1, 5, 12])
def test_the_oracle_keeps_the_weights_of_the_best_step_it_looked_at(best):
    made, clip = checkpoint(), [frame for frame, _ in frames()]
    scored = []
    runner = start(find_arm("offline-oracle-12"), made, CONFIG)
    assert isinstance(runner, Offline)

    stops = [0, 1, 2, 5, 10, 12]

    def score(predict):
        scored.append({k: v.clone() for k, v in made.model.state_dict().items()})
        return float(stops[len(scored) - 1] == best)

    runner.prepare(clip, score)
    assert len(scored) == len(stops)
    assert same_bits(dict(made.model.state_dict()), scored[stops.index(best)])
    runner.close()


def test_methods_of_others_have_no_pull_unless_they_are_given_one():
    config = StreamConfig.online()
    for name in ("tent", "self-train", "self-train-plain", "ema-teacher"):
        for changes, pull in (({}, 0.0), ({"source_pull": 0.25}, 0.25)):
            runner = start(find_arm(name), checkpoint(), config, changes)
            assert runner.adapter.config.source_pull == pull
            runner.close()
    runner = start(find_arm("online"), checkpoint(), config)
    assert runner.adapter.config == config
    runner.close()


# ---- modifiers


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


def test_the_ema_arm_predicts_with_the_teacher():
    made = checkpoint()
    runner = start(ARMS["ema-teacher"], made, CONFIG.replace(lr=0.05))
    runner.step(frames()[0][0])
    objective = runner.adapter.branch
    assert isinstance(objective, PseudoLabel)
    x = made.spec.preprocess()(frames()[1][0])
    assert torch.equal(runner.predict(x), objective.teach(x))
    assert not torch.equal(runner.predict(x), made.model(x))
    runner.close()

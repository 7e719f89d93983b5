"""What guards do: nothing to an ordinary video; what is blank, frozen, broken or collapsed teaches a model nothing."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.arms import PRESETS
from ttt_adapt.errors import CheckpointError, ConfigError

SIZE = (32, 48)
NORMALIZE = Normalize((0.5,) * 3, (0.5,) * 3)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, seed=4)
BLACK = np.zeros((*SIZE, 3), np.uint8)


def video(count: int, seed: int = 0) -> list[np.ndarray]:
    """A camera that pans over a picture, with noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 12 + count // 8, 3)).astype(np.float64)
    scene = np.kron(coarse, np.ones((8, 8, 1)))
    noise = random.normal(0, 3, (count, *SIZE, 3))
    frames = [scene[: SIZE[0], i : i + SIZE[1]] + each for i, each in enumerate(noise)]
    return [frame.clip(0, 255).astype(np.uint8) for frame in frames]


def attached(config: StreamConfig = CONFIG, **more) -> StreamAdapter:
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    return StreamAdapter(model, MAEBranch.attach(model, "backbone"), config=config, preprocess=NORMALIZE, **more)


def learned(adapter: StreamAdapter) -> dict:
    """What a stream has learned: all of its state but what watches and counts."""
    return {name: part for name, part in adapter.state_dict().items() if name not in ("config", "guards", "tally")}


def run(adapter: StreamAdapter, frames) -> list:
    """Pairs (prediction, reason)."""
    return [(adapter.step(frame), adapter.last.reason) for frame in frames]


class Spoiling(torch.optim.SGD):
    """Writes a value into all weights of the encoder at one of its steps."""

    def __init__(self, groups, at: int, value: float) -> None:
        super().__init__([{**group, "lr": 1e-3} for group in groups])
        self.at, self.value, self.taken = at, value, 0

    def step(self, closure=None):
        super().step()
        self.taken += 1
        if self.taken == self.at:
            for group in self.param_groups:
                for p in group["params"] if group["name"].startswith("encoder") else ():
                    p.fill_(self.spoilt(p))

    def spoilt(self, _parameter) -> float:
        return self.value


class Collapsing(Spoiling):
    """Features that are the same everywhere."""

    def spoilt(self, parameter) -> float:
        return 0.0 if parameter.ndim > 1 else self.value


# ---- an ordinary video


@pytest.mark.parametrize("preset", PRESETS)
def test_an_ordinary_video_gets_the_same_bits_with_guards(preset):
    found = []
    for guards in (True, False):
        config = StreamConfig.for_arm(
            preset, batch_size=2, window=min(4, StreamConfig.for_arm(preset).capacity), seed=3
        )
        adapter = attached(config.replace(guards=guards))
        outputs = run(adapter, video(70))
        assert all(reason == "" for _, reason in outputs)
        found.append((outputs, learned(adapter)))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_stats": "ema"},
        {"iterations": 2},
        {"gate": "surprise"},
        {"window": "auto"},
        {"every": 3},
        {"on_cut": "reset"},
    ],
    ids=str,
)
def test_an_ordinary_video_gets_the_same_bits_with_other_settings_too(changes):
    guarded = attached(CONFIG.replace(**changes))
    plain = attached(CONFIG.replace(**{**changes, "guards": False, "on_cut": "keep"}))
    assert same_bits(run(guarded, video(24)), run(plain, video(24)))
    assert same_bits(learned(guarded), learned(plain))


@pytest.mark.parametrize("arm", ["paper", "no-memory", "implicit", "explicit", "tent", "self-train"])
def test_recipes_of_papers_run_without_guards(arm):
    assert not StreamConfig.for_arm(arm).guards
    assert StreamConfig.for_arm("online").guards


# ---- the camera


@pytest.mark.parametrize("picture", ["black", "blue", "float"])
def test_500_blank_frames_teach_the_model_nothing_and_are_not_drawn_later(picture):
    adapter, frames = attached(), video(20)
    run(adapter, frames[:10])
    blank = {"black": BLACK, "blue": BLACK + np.array([0, 0, 255], np.uint8), "float": torch.zeros(3, *SIZE)}[picture]
    for _ in range(4):
        adapter.step(blank)
    before = learned(adapter)
    for _ in range(496):
        adapter.step(blank)
        assert (adapter.last.adapted, adapter.last.reason) == (False, "blank")
    after = learned(adapter)
    assert before.pop("progress") != after.pop("progress")
    assert same_bits(after, before)
    seen, loss = [], adapter.branch.loss
    adapter.branch.loss = lambda images, generator=None: (
        seen.append(images.clone()) or loss(images, generator=generator)
    )
    for frame in frames[10:]:
        adapter.step(frame)
        assert adapter.last.adapted
    assert all(images.flatten(1).std(1).min() > 0.1 for images in seen)
    assert adapter.stats().skipped == {"blank": 496}


def test_a_dark_noisy_picture_without_contrast_is_blank_and_a_night_scene_is_not():
    random = np.random.default_rng(0)
    covered = attached()
    for _ in range(8):
        covered.step(random.integers(14, 18, (*SIZE, 3), dtype=np.uint8))
    assert covered.last.reason == "blank"
    night = attached()
    assert {reason for _, reason in run(night, [frame // 12 for frame in video(12)])} == {""}


def test_500_times_the_same_frame_teach_for_a_moment_only():
    adapter, frames = attached(), video(12)
    run(adapter, frames[:8])
    reasons = [reason for _, reason in run(adapter, [frames[8]] * 500)]
    assert reasons[:101] == [""] * 101
    assert set(reasons[101:]) == {"frozen"}
    assert run(adapter, frames[9:])[0][1] == ""
    assert adapter.stats().skipped == {"frozen": 399}


def test_every_frame_twice_as_in_a_slower_film_is_an_ordinary_video():
    twice = [frame for frame in video(20) for _ in range(2)]
    assert {reason for _, reason in run(attached(), twice)} == {""}


def test_without_memory_a_blank_frame_is_predicted_by_the_source():
    adapter = attached(CONFIG.replace(carry_weights=False))
    source = adapter.state_dict()["weights"]
    run(adapter, [*video(3), *[BLACK] * 6])
    assert adapter.last.reason == "blank"
    assert same_bits(adapter.state_dict()["weights"], source)


@pytest.mark.parametrize("policy", ["keep", "shrink", "reset"])
def test_a_scene_cut_does_what_the_policy_says(policy):
    one, other = video(16), video(6, seed=5)
    adapter, plain = attached(CONFIG.replace(on_cut=policy)), attached(CONFIG.replace(guards=False))
    expected = run(plain, [*one, *other])
    found = run(adapter, [*one, *other])
    assert same_bits(found[:16], expected[:16])
    assert [reason for _, reason in found[16:]] == ["" if policy == "keep" else "cut", *[""] * 5]
    assert adapter.stats().cuts == 1
    assert same_bits(found[16:], expected[16:]) == (policy == "keep")
    assert adapter.stats().interventions == ({} if policy == "keep" else {"cut": 1})


def test_after_a_cut_that_shrinks_draws_see_the_new_scene_only_until_the_window_is_full_again():
    adapter, lengths = attached(CONFIG.replace(on_cut="shrink")), []
    for frame in [*video(16), *video(4, seed=5)]:
        adapter.step(frame)
        lengths.append(adapter.window)
    assert lengths[15:] == [3, 2, 3, 3, 3]


def test_a_cut_that_resets_begins_with_the_source_weights():
    adapter = attached(CONFIG.replace(on_cut="reset"), optimizer=lambda groups: Spoiling(groups, 3, 0.5))
    source = adapter.state_dict()["weights"]
    run(adapter, video(16))
    assert (adapter.state_dict()["weights"]["model.backbone.0.weight"] - 0.5).abs().max() < 0.1
    adapter.adapt(video(1, seed=5)[0])
    assert adapter.last.reason == "cut"
    assert all((now - source[name]).abs().max() < 0.1 for name, now in adapter.state_dict()["weights"].items())


# ---- the step


def spoil_loss(adapter: StreamAdapter, at: int, spoil) -> None:
    """Change the loss of one call."""
    plain, calls = adapter.branch.loss, itertools.count(1)

    def loss(images, generator=None):
        value = plain(images, generator=generator)
        return spoil(value) if next(calls) == at else value

    adapter.branch.loss = loss


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda loss: loss * math.nan, "non-finite gradient"),
        (lambda loss: loss + math.inf, "non-finite loss"),
        (lambda loss: loss * 1e3, "loss spike"),
    ],
    ids=["gradient", "loss", "spike"],
)
def test_a_step_on_a_bad_loss_is_left_out(spoil, reason):
    adapter, frames = attached(), video(22)
    spoil_loss(adapter, 15, spoil)
    run(adapter, frames[:14])
    before = adapter.state_dict()
    adapter.step(frames[14])
    after = adapter.state_dict()
    assert (adapter.last.adapted, adapter.last.reason) == (False, reason)
    assert same_bits(after["weights"], before["weights"])
    assert same_bits(after["optimizer"], before["optimizer"])
    assert {why for _, why in run(adapter, frames[15:])} == {""}
    stats = adapter.stats()
    assert (stats.frames, stats.adapted, stats.skipped, stats.interventions) == (22, 21, {reason: 1}, {reason: 1})


def test_a_loss_that_stays_high_is_taken_as_usual_after_a_few_frames():
    adapter = attached()
    plain, calls = adapter.branch.loss, itertools.count(1)
    adapter.branch.loss = lambda images, generator=None: plain(images) * (1.0 if next(calls) <= 15 else 100.0)
    reasons = [reason for _, reason in run(adapter, video(40))]
    assert set(reasons[:15]) == {""}
    assert reasons[15] == "loss spike"
    assert set(reasons[25:]) == {""}


def test_a_frame_that_spoils_running_statistics_leaves_them_as_they_were():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    adapter = StreamAdapter(model, encoder="backbone", config=CONFIG.replace(norm_stats="ema"))
    frames = [torch.randn(3, *SIZE) for _ in range(8)]
    run(adapter, frames[:5])
    norm = model.backbone[1]
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    adapter.step(frames[5] * 1e30)
    assert "non-finite statistics" in adapter.last.reason
    assert same_bits([norm.running_mean, norm.running_var], before)
    for frame in frames[6:]:
        assert adapter.step(frame).isfinite().all()
        assert "non-finite statistics" not in adapter.last.reason
    assert not same_bits([norm.running_mean, norm.running_var], before)


# ---- weights and predictions


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_never_reach_a_prediction(value):
    adapter, frames = attached(optimizer=lambda groups: Spoiling(groups, 20, value)), video(40)
    found = run(adapter, frames)
    assert all(prediction.isfinite().all() for prediction, _ in found)
    assert found[19][1] == "rolled back: non-finite prediction"
    assert [reason for _, reason in found[:19]] == [""] * 19
    assert adapter.stats().rolled_back == 1
    assert all(t.isfinite().all() for t in adapter.state_dict()["weights"].values())
    assert adapter.last.adapted


def test_weights_that_are_not_finite_are_noticed_without_a_prediction():
    adapter = attached(optimizer=lambda groups: Spoiling(groups, 20, math.nan))
    reports = [adapter.adapt(frame) for frame in video(40)]
    assert [report.reason for report in reports[:20]] == [""] * 20
    assert {report.reason for report in reports[20:31]} == {"non-finite gradient"}
    assert reports[31].reasons == ("non-finite gradient", "rolled back: non-finite weights")
    assert all(report.adapted for report in reports[32:])
    assert all(t.isfinite().all() for t in adapter.state_dict()["weights"].values())


def test_a_rollback_restores_weights_optimizer_buffers_and_random_state_of_one_moment():
    config, frames = CONFIG.replace(norm_stats="ema"), video(90)
    adapter = attached(config, optimizer=lambda groups: Spoiling(groups, 70, math.nan))
    states = []
    for frame in frames[:69]:
        adapter.step(frame)
        states.append(adapter.state_dict())
    adapter.step(frames[69])
    assert adapter.last.reason == "rolled back: non-finite prediction"
    assert not adapter.last.adapted
    after = adapter.state_dict()
    same = [i for i, each in enumerate(states) if same_bits(each["weights"], after["weights"])]
    assert same == [63]
    for part in ("weights", "optimizer", "random", "gate"):
        assert same_bits(after[part], states[63][part]), part
    assert adapter.window == 1
    assert all(reason == "" for _, reason in run(adapter, frames[70:]))


def test_a_second_rollback_soon_after_the_first_goes_to_the_source():
    class Ever(Spoiling):
        def step(self, closure=None):
            self.taken = max(self.taken, self.at - 1) if self.taken >= self.at else self.taken
            super().step()

    adapter = attached(optimizer=lambda groups: Ever(groups, 70, math.nan))
    source = adapter.state_dict()["weights"]
    found = run(adapter, video(80))
    assert all(prediction.isfinite().all() for prediction, _ in found)
    assert adapter.stats().rolled_back >= 1
    assert all(t.isfinite().all() for t in adapter.state_dict()["weights"].values())
    assert source.keys() == adapter.state_dict()["weights"].keys()


class Classes(nn.Module):
    """Two classes, told apart by the sign of a weight that adapts; other weights see one class everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.encoder(x))


def two_classes(optimizer) -> StreamAdapter:
    torch.manual_seed(0)
    model = Classes()
    with torch.no_grad():
        model.head.weight[1], model.head.bias[1] = -model.head.weight[0], 0.0
        model.head.bias[0] = 0.0
        model.encoder.bias.zero_()
    branch = MAEBranch.attach(model, "encoder")
    return StreamAdapter(model, branch, config=CONFIG, preprocess=NORMALIZE, optimizer=optimizer)


def test_a_collapse_to_one_class_is_taken_back():
    adapter = two_classes(lambda groups: Collapsing(groups, 20, 5.0))
    found = run(adapter, video(60))
    shares = [prediction.argmax(1).float().mean().item() for prediction, _ in found]
    assert all(0.1 < share < 0.9 for share in shares[:19])
    reasons = [reason for _, reason in found]
    assert [reason for reason in reasons if reason] == ["rolled back: class collapse"]
    at = reasons.index("rolled back: class collapse")
    assert at == 19 + 15
    assert all(0.1 < share < 0.9 for share in shares[at:])


def test_one_class_everywhere_that_the_source_sees_too_is_no_collapse():
    adapter = attached(predict=lambda x: torch.zeros(1, 5, 16, 16))
    assert {reason for _, reason in run(adapter, video(40))} == {""}


def test_values_that_the_source_predicts_as_infinite_too_are_the_models_own():
    adapter = attached(predict=lambda x: torch.full((1, 5, 16, 16), -math.inf))
    assert {reason for _, reason in run(adapter, video(20))} == {""}


def test_weights_that_drift_too_far_are_moved_back_to_the_limit():
    config = CONFIG.replace(lr=3e-2, max_drift=0.2)
    adapter = attached(config)
    reasons = [reason for _, reason in run(adapter, video(50))]
    assert reasons[15] == reasons[31] == "drift"
    assert adapter.stats().interventions["drift"] == 3
    at_check = attached(config)
    run(at_check, video(16))
    assert float(at_check.state.weights.distance()) == pytest.approx(0.2, rel=1e-3)
    free = attached(config.replace(max_drift=None))
    assert {reason for _, reason in run(free, video(17))} == {""}
    assert float(free.state.weights.distance()) > 0.2


# ---- as a part of the video


def test_a_stream_that_is_saved_while_the_camera_is_covered_goes_on_with_the_same_decisions():
    frames = [*video(12), *[BLACK] * 12, *video(20)[12:], *[video(1)[0]] * 110]
    whole = attached(CONFIG.replace(on_cut="shrink"))
    expected = run(whole, frames)
    for at in (3, 14, 20, 100):
        first, second = attached(CONFIG.replace(on_cut="shrink")), attached(CONFIG.replace(on_cut="shrink"))
        run(first, frames[:at])
        second.load_state_dict(first.state_dict())
        assert same_bits(run(second, frames[at:]), expected[at:])
        assert same_bits(second.state_dict(), whole.state_dict())


def test_a_rollback_behind_a_saved_state_goes_to_the_same_moment():
    frames, states, spoilt = video(75), [], []

    def predicting(x):
        return x + spoilt.pop() if spoilt else x

    for saved in (False, True):
        adapter = attached(predict=predicting)
        run(adapter, frames[:70])
        if saved:
            state = adapter.state_dict()
            adapter = attached(predict=predicting)
            adapter.load_state_dict(state)
        spoilt.append(math.nan)
        adapter.step(frames[70])
        assert adapter.last.reason == "rolled back: non-finite prediction"
        states.append((adapter.state_dict(), run(adapter, frames[71:])))
    assert same_bits(*states)


def test_a_state_without_guards_goes_on_with_them_and_the_other_way_round():
    frames = video(12)
    for before, after in ((True, False), (False, True)):
        first, second = attached(CONFIG.replace(guards=before)), attached(CONFIG.replace(guards=after))
        run(first, frames[:6])
        second.load_state_dict(first.state_dict())
        assert same_bits(run(second, frames[6:]), run(first, frames[6:]))


def test_damaged_guards_are_refused_and_change_nothing():
    adapter = attached()
    run(adapter, video(5))
    before = adapter.state_dict()
    guards = before["guards"]
    for wrong in (
        3, {**guards, "fresh": -1}, {**guards, "losses": torch.zeros(2)}, {**guards, "good": {"weights": {}}},
        {**guards, "frames": None}, {**guards, "frames": {**guards["frames"], "contrast": math.nan}},
        {**guards, "frames": {**guards["frames"], "thumbnail": torch.zeros(3, 0, 4)}},
        {**guards, "predictions": {"same": 0}}, {**guards, "drift": [[1.0]] * 9},
    ):  # fmt: skip
        with pytest.raises(CheckpointError):
            adapter.load_state_dict({**before, "guards": wrong})
    with pytest.raises(CheckpointError):
        adapter.load_state_dict({**before, "tally": {**before["tally"], "frames": -1}})
    assert same_bits(adapter.state_dict(), before)


def test_a_frame_that_fails_is_unknown_to_the_guards_and_not_counted():
    broken = [False]

    def predict(x):
        if broken[0]:
            raise KeyError("as the test asks")
        return x

    adapter, frames = attached(predict=predict), video(9)
    run(adapter, frames[:6])
    before, stats = adapter.state_dict(), adapter.stats()
    broken[0] = True
    for frame in (frames[6], BLACK, frames[5]):
        with pytest.raises(KeyError):
            adapter.step(frame)
    after = adapter.state_dict()
    assert same_bits(after["guards"], before["guards"])
    assert same_bits(after["tally"], before["tally"])
    assert adapter.stats() == stats


def test_a_reset_forgets_what_the_guards_know_and_the_counts():
    adapter = attached()
    fresh = adapter.state_dict()
    run(adapter, [*video(8), *[BLACK] * 8])
    adapter.reset()
    assert same_bits(adapter.state_dict(), fresh)
    assert (adapter.stats().frames, adapter.stats().skipped) == (0, {})


def test_two_videos_over_one_model_have_guards_of_their_own():
    shared, frames = attached(), video(14)
    waiting = shared.new_state()
    run(shared, [*frames[:8], *[BLACK] * 8])
    waiting = shared.swap(waiting)
    assert shared.stats().frames == 0
    assert same_bits(run(shared, frames), run(attached(), frames))
    shared.swap(waiting)
    assert shared.stats().skipped == {"blank": 4}


# ---- what is said


def test_a_kind_of_intervention_is_logged_once_a_minute(caplog):
    adapter, now = attached(), [0.0]
    adapter.state.tally.clock = lambda: now[0]
    with caplog.at_level(logging.WARNING, "ttt_adapt"):
        run(adapter, [*video(3), *[BLACK] * 10])
        assert [record.getMessage() for record in caplog.records] == ["frame 7, blank: not adapted to (1 so far)"]
        now[0] = 61.0
        run(adapter, [BLACK] * 3)
    assert [record.getMessage() for record in caplog.records][1:] == ["frame 13, blank: not adapted to (7 so far)"]


def test_an_ordinary_video_and_what_the_configuration_asks_for_are_not_logged(caplog):
    with caplog.at_level(logging.DEBUG, "ttt_adapt"):
        adapter = attached(CONFIG.replace(every=2))
        run(adapter, video(8))
    assert caplog.records == []
    assert adapter.stats().skipped == {"every": 4}
    assert adapter.stats().interventions == {}


def test_stats_have_percentiles_of_the_last_steps():
    adapter, now = attached(), [0.0]
    assert adapter.stats().ms == {}
    adapter.state.tally.clock = lambda: now[0]

    def tick(x):
        now[0] += 0.02 if x.mean() > -0.5 else 0.5
        return x

    slow = attached(predict=tick)
    slow.state.tally.clock = lambda: now[0]
    run(slow, [*video(95), *[BLACK] * 5])
    found = slow.stats().ms
    assert found["p50"] == pytest.approx(20.0)
    assert found["p50"] <= found["p95"] < found["p99"] <= 500.0 + 1e-6


# ---- the time of a frame


class Paced:
    """A stream whose steps and predictions take the time that a test says."""

    def __init__(self, step_ms: float, predict_ms: float, **changes) -> None:
        self.now = 0.0
        self.adapter = attached(CONFIG.replace(**changes), predict=self.predict)
        self.adapter.state.budget.clock = lambda: self.now
        plain = self.adapter.branch.loss

        def loss(images, generator=None):
            self.now += step_ms / 1e3
            return plain(images, generator=generator)

        self.adapter.branch.loss, self._predict_ms = loss, predict_ms

    def predict(self, x):
        self.now += self._predict_ms / 1e3
        return x


def test_a_stream_that_is_fast_enough_adapts_to_every_frame():
    paced = Paced(20, 15, max_ms=40)
    assert {reason for _, reason in run(paced.adapter, video(20))} == {""}


@pytest.mark.parametrize(("step_ms", "predict_ms"), [(100, 10), (39, 10), (500, 30)])
def test_a_stream_that_falls_behind_leaves_steps_out_and_keeps_its_frame_rate(step_ms, predict_ms):
    paced = Paced(step_ms, predict_ms, max_ms=40)
    reasons = [reason for _, reason in run(paced.adapter, video(60))]
    assert set(reasons) == {"", "max_ms"}
    assert paced.now <= 60 * 0.04 + (step_ms + predict_ms) / 1e3
    stats = paced.adapter.stats()
    assert stats.skipped == stats.interventions == {"max_ms": reasons.count("max_ms")}
    assert stats.adapted == reasons.count("") > 0


def test_a_frame_gets_as_many_of_its_steps_as_there_is_time_for():
    paced = Paced(10, 10, max_ms=40, iterations=8)
    counts = []
    for frame in video(40):
        paced.adapter.step(frame)
        counts.append(len(paced.adapter.last.losses))
        assert paced.adapter.last.reason == ("max_ms" if counts[-1] < 8 else "")
    assert counts[0] == 8
    assert set(counts[5:]) == {3}


def test_frames_that_get_no_step_are_in_the_window_all_the_same():
    paced = Paced(200, 10, max_ms=40)
    run(paced.adapter, video(3))
    assert [paced.adapter.last.reason, len(paced.adapter.state.window)] == ["max_ms", 3]


def test_a_prediction_by_itself_takes_time_too():
    paced = Paced(20, 30, max_ms=60)
    for frame in video(6):
        paced.adapter.step(frame)
        paced.adapter.predict(frame)
    assert paced.adapter.stats().skipped["max_ms"] > 0


def test_without_a_limit_no_clock_is_asked_for_the_time_of_a_frame():
    assert attached().state.budget is None


# ---- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("guards", 1), ("on_cut", "stop"), ("max_drift", 0.0), ("max_drift", -1), ("max_ms", 0), ("max_ms", "40")],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected"):
        StreamConfig(**{name: value})


def test_a_policy_for_cuts_needs_guards():
    with pytest.raises(ConfigError, match="on_cut is 'reset'; expected 'keep' without guards"):
        StreamConfig(on_cut="reset", guards=False)

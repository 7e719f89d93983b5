"""The gate "calibrated" and streams without gradient steps: what is adapted to, and what comes back bit for bit."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from tape import TapeRecorder
from test_adapter_calibrated import branch_of, clip, drifted
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.calibration.calibrate import calibrate
from ttt_adapt.engine.compiled import CompileEngine
from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.engine.graphs import GraphEngine
from ttt_adapt.errors import ConfigError
from ttt_adapt.model.calibration import Calibration
from ttt_adapt.model.rule import Rule

CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-3, seed=2, gate="calibrated", norm_stats="calibrated")
ENGINES = {
    "eager": EagerEngine,
    "compile": lambda step: CompileEngine(step, backend="aot_eager"),
    "cudagraph": lambda step: GraphEngine(step, TapeRecorder()),
}


@pytest.fixture
def model() -> nn.Module:
    return settle_norms(zoo.UNet())


@pytest.fixture
def calibration(model) -> Calibration:
    return calibrate(model, clip(12))


@pytest.fixture
def usual(model, calibration) -> list[torch.Tensor]:
    """Four stills, which are nearer than the limit; the corrections of two of them are not zero."""
    stills = sorted(zip(calibration.drifts, clip(12), strict=True), key=lambda pair: pair[0])
    drifts = [drift / calibration.usual_drift for drift, _ in stills]
    assert drifts[0] < 1.0 < drifts[-2] < calibration.limit
    return [still for _, still in [*stills[:2], *stills[-3:-1]]]


class Counted:
    """How the model is called: counts its passes, and fails where a test asks for it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.passes, self.fails = model, 0, False

    def __call__(self, x):
        self.passes += 1
        if self.fails:
            raise KeyError("as the test asks")
        return self.model(x)


def gated(model: nn.Module, calibration: Calibration, branch: MAEBranch | None = None, **changes):
    """An adapter with the gate, and what counts its passes."""
    call = Counted(model)
    branch = branch_of(model) if branch is None else branch
    config = CONFIG.replace(**changes)
    return StreamAdapter(model, branch, calibration=calibration, config=config, predict=call), call


def forward_only(model: nn.Module, calibration: Calibration, frames) -> list:
    with StreamAdapter(model, calibration=calibration) as adapter:
        return list(adapter.stream(frames))


def weights(adapter: StreamAdapter) -> dict:
    return adapter.state_dict()["weights"]


def test_usual_frames_are_predicted_as_without_gradient_steps_in_one_pass_each(model, calibration, usual):
    expected = forward_only(model, calibration, usual)
    adapter, call = gated(model, calibration)
    with left_as_it_was(model, "hooks"):
        for frame, prediction in zip(usual, expected, strict=True):
            call.passes = 0
            assert same_bits(adapter.step(frame), prediction)
            assert call.passes == 1
            assert (adapter.last.adapted, adapter.last.reason, adapter.last.losses) == (False, "gate", ())
            assert adapter.drift <= calibration.limit


def test_far_frames_are_adapted_to_with_the_steps_of_a_stream_without_a_gate(model, calibration):
    frames, found = drifted(3), []
    for gate in ("none", "calibrated"):
        with StreamAdapter(
            model, branch_of(model), calibration=calibration, config=CONFIG.replace(gate=gate)
        ) as adapter:
            outputs = list(adapter.stream(frames))
            assert adapter.last.adapted
            assert adapter.last.reason == ""
            found.append((outputs, weights(adapter)))
    assert same_bits(found[0], found[1])


def test_the_source_comes_back_bit_for_bit_with_the_first_usual_frame(model, calibration, usual):
    expected = forward_only(model, calibration, usual)
    adapter, call = gated(model, calibration)
    before = adapter.state_dict()
    for _ in range(2):
        for frame in drifted(3):
            adapter.step(frame)
        after = adapter.state_dict()
        assert not same_bits(after["weights"], before["weights"])
        assert not same_bits(after["optimizer"], before["optimizer"])
        passes = []
        for frame, prediction in zip(usual, expected, strict=True):
            call.passes = 0
            assert same_bits(adapter.step(frame), prediction)
            passes.append(call.passes)
        assert passes == [1, 1, 1, 1]  # each is predicted by the pass that found out that it is usual
        assert same_bits(adapter.state_dict()["weights"], before["weights"])
        assert same_bits(adapter.state_dict()["optimizer"], before["optimizer"])


def test_a_reset_stream_runs_as_the_first_time(model, calibration, usual):
    frames = [*drifted(2), usual[0], *drifted(2), usual[1]]
    adapter, call = gated(model, calibration)
    first = list(adapter.stream(frames))
    adapter.step(drifted(1)[0])
    adapter.reset()
    call.passes = 0
    assert same_bits(adapter.step(usual[0]), first[2])
    assert call.passes == 1
    adapter.reset()
    assert same_bits(list(adapter.stream(frames)), first)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_loaded_stream_goes_on_where_it_was_saved(model, calibration, usual, at):
    frames = [*drifted(2), usual[0], usual[1], *drifted(2), usual[2]]
    adapter, _ = gated(model, calibration)
    for frame in frames[:at]:
        adapter.step(frame)
    state = adapter.state_dict()
    expected = list(adapter.stream(frames[at:]))
    final = adapter.state_dict()
    adapter.load_state_dict(state)
    assert same_bits(list(adapter.stream(frames[at:])), expected)
    assert same_bits(adapter.state_dict()["weights"], final["weights"])
    assert same_bits(adapter.state_dict()["optimizer"], final["optimizer"])


def test_videos_take_turns_as_if_each_had_the_model_alone(model, calibration, usual):
    videos = [[*drifted(2), usual[0], *drifted(1)], [usual[1], *drifted(2), usual[2]]]
    alone = []
    for video in videos:
        adapter, _ = gated(model, calibration)
        alone.append(list(adapter.stream(video)))
        adapter.detach()
    adapter, _ = gated(model, calibration)
    waiting, found = adapter.new_state(), ([], [])
    for pair in zip(*videos, strict=True):
        for frame, outputs in zip(pair, found, strict=True):
            outputs.append(adapter.step(frame))
            waiting = adapter.swap(waiting)
    assert same_bits(list(found), alone)


def test_a_swapped_in_video_does_not_get_the_answer_of_another(model, calibration, usual):
    expected = forward_only(model, calibration, usual[:2])
    adapter, _ = gated(model, calibration)
    adapter.adapt(usual[0])
    adapter.swap(adapter.new_state())
    assert same_bits(adapter.predict(usual[1]), expected[1])
    assert same_bits(adapter.predict(usual[0]), expected[0])


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["usual", "far"])
def test_a_frame_whose_prediction_fails_leaves_the_stream_where_it_was(model, calibration, usual, kind, moved):
    frames = [*(drifted(2) if moved else usual[:2]), usual[2] if kind == "usual" else drifted(3)[2]]
    adapter, call = gated(model, calibration)
    for frame in frames[:2]:
        adapter.step(frame)
    before, last = adapter.state_dict(), adapter.last
    call.fails = True
    with pytest.raises(KeyError):
        adapter.step(frames[2])
    call.fails = False
    assert same_bits(adapter.state_dict(), before)
    assert adapter.last is last
    found = adapter.step(frames[2])
    adapter.load_state_dict(before)
    assert same_bits(adapter.step(frames[2]), found)


def test_adapting_and_predicting_apart_is_a_step(model, calibration, usual):
    frames = [usual[0], *drifted(2), usual[1], usual[2]]
    adapter, _ = gated(model, calibration)
    expected = list(adapter.stream(frames))
    adapter.reset()
    found = []
    for frame in frames:
        adapter.adapt(frame)
        found.append(adapter.predict(frame))
    assert same_bits(found, expected)
    call_of_another = adapter.predict(drifted(1)[0])
    assert not same_bits(call_of_another, expected[-1])


def test_every_other_frame_is_looked_at_only_where_the_stream_says_so(model, calibration, usual):
    adapter, _ = gated(model, calibration, every=2)
    reasons = []
    for frame in [*drifted(3), usual[0], usual[1]]:
        adapter.step(frame)
        reasons.append(adapter.last.reason)
    assert reasons == ["", "every", "", "every", "gate"]


def test_without_carried_weights_usual_frames_and_skipped_ones_are_predicted_by_the_source(model, calibration, usual):
    expected = forward_only(model, calibration, usual)
    adapter, _ = gated(model, calibration, carry_weights=False)
    for frame, prediction in zip(usual, expected, strict=True):
        adapter.step(drifted(1)[0])
        assert adapter.last.adapted
        assert same_bits(adapter.step(frame), prediction)
        assert adapter.last.reason == "gate"


def test_a_rule_that_measures_nowhere_holds_no_frame_for_usual(model, calibration, usual):
    adapter, _ = gated(model, calibration.replace(rule=Rule("none")))
    adapter.step(usual[0])
    assert adapter.drift is None
    assert adapter.last.adapted


def test_a_frame_that_overflows_is_not_usual_and_the_source_comes_back_after_it(model, calibration, usual):
    expected = forward_only(model, calibration, usual[:1])
    adapter, _ = gated(model, calibration)
    adapter.step(torch.full_like(usual[0], 1e30))
    assert adapter.last.reason != "gate"
    assert same_bits(adapter.step(usual[0]), expected[0])


@pytest.mark.parametrize("statistics", ["frozen", "ema", "blend", "batch"])
def test_the_gate_is_refused_with_other_statistics(statistics):
    with pytest.raises(ConfigError, match=f'expected norm_stats="calibrated", got {statistics!r}'):
        StreamConfig(gate="calibrated", norm_stats=statistics)


@pytest.mark.parametrize("statistics", ["auto", "calibrated"])
def test_the_gate_needs_a_calibration(model, statistics):
    config = StreamConfig(gate="calibrated", norm_stats=statistics)
    with (
        left_as_it_was(model),
        pytest.raises(ConfigError, match="no calibration with the drifts of its stills: make one"),
    ):
        StreamAdapter(model, branch_of(model), config=config)


@pytest.mark.parametrize("kind", ["compile", "cudagraph"])
def test_every_engine_opens_and_shuts_the_gate_as_the_eager_one(monkeypatch, model, calibration, usual, kind):
    frames = [*usual[:2], *drifted(4), usual[0], usual[2], *drifted(3), usual[1], usual[1]]
    results = []
    for name in ("eager", kind):
        monkeypatch.setattr("ttt_adapt.adapter.choose_engine", lambda step, _optimizer, n=name: ENGINES[n](step))
        with StreamAdapter(model, branch_of(model), calibration=calibration, config=CONFIG) as adapter:
            source, rows = weights(adapter), []
            for frame in frames:
                rows.append((adapter.step(frame), adapter.last.reason, adapter.drift))
                assert same_bits(weights(adapter), source) == (adapter.last.reason == "gate")
            results.append(rows)
    torch._dynamo.reset()
    assert [reason for _, reason, _ in results[0]] == ["gate"] * 2 + [""] * 4 + ["gate"] * 2 + [""] * 3 + ["gate"] * 2
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine[1] == theirs[1]
        torch.testing.assert_close(mine[0], theirs[0], rtol=2e-3, atol=2e-3)
        assert mine[2] == pytest.approx(theirs[2], rel=1e-2)


# ---- no gradient step


@pytest.mark.parametrize("changes", [{}, {"gate": "surprise"}, {"gate": "calibrated"}, {"every": 2}], ids=str)
def test_without_iterations_a_stream_with_a_branch_is_forward_only(model, calibration, usual, changes):
    frames = [*drifted(3), *usual]
    expected = forward_only(model, calibration, frames)
    config = CONFIG.replace(**{"iterations": 0, "gate": "none", **changes})
    call = Counted(model)
    branch = branch_of(model)
    with (
        left_as_it_was(model),
        StreamAdapter(model, branch, calibration=calibration, config=config, predict=call) as adapter,
    ):
        before = weights(adapter)
        for frame, prediction in zip(frames, expected, strict=True):
            assert same_bits(adapter.step(frame), prediction)
            report = adapter.last
            assert (report.adapted, report.reason, report.losses, report.grad_norm) == (False, "iterations", (), None)
        assert call.passes == len(frames)
        assert same_bits(weights(adapter), before)


@pytest.mark.parametrize("changes", [{"norm_stats": "ema"}, {"carry_weights": False}, {"window": "auto"}], ids=str)
def test_without_iterations_and_calibration_the_source_predicts(model, changes):
    frames = drifted(2)
    with torch.no_grad():
        plain = [model(frame[None]) for frame in frames]
    config = StreamConfig(**{"window": 3, "batch_size": 2, "iterations": 0, **changes})
    with StreamAdapter(model, branch_of(model), config=config) as adapter:
        assert same_bits(list(adapter.stream(frames)), plain)
        assert adapter.last.reason == "iterations"


@pytest.mark.parametrize("changes", [{}, {"gate": "surprise"}, {"every": 2}], ids=str)
def test_without_iterations_no_frame_enters_the_window(model, calibration, changes):
    config = CONFIG.replace(**{"iterations": 0, "gate": "none", **changes})
    with StreamAdapter(model, branch_of(model), calibration=calibration, config=config) as adapter:
        before = adapter.state_dict()
        for frame in (*drifted(2), *drifted(2, (64, 32))):  # without a window, frames may change their size
            adapter.step(frame)
        after = adapter.state_dict()
        assert adapter.last.reason == "iterations"
        for part in ("window", "random", "optimizer"):
            assert same_bits(after[part], before[part])


# ---- the source decides


@pytest.mark.parametrize("kind", ENGINES)
def test_after_a_long_night_the_source_decides_and_comes_back_however_far_the_weights_have_moved(
    monkeypatch, model, calibration, usual, kind
):
    expected = forward_only(model, calibration, usual)
    monkeypatch.setattr("ttt_adapt.adapter.choose_engine", lambda step, _optimizer: ENGINES[kind](step))
    adapter, call = gated(model, calibration, lr=0.3, source_pull=0.0)
    source = weights(adapter)
    for frame in drifted(12):
        adapter.step(frame)
        assert adapter.last.reason != "gate"
    assert not same_bits(weights(adapter), source)
    adapter.predict(usual[0])
    assert adapter.drift > calibration.limit  # to the adapted weights, a usual frame looks like none
    for frame, prediction in zip(usual, expected, strict=True):
        call.passes = 0
        found = adapter.step(frame)
        assert adapter.last.reason == "gate"
        assert adapter.drift <= calibration.limit
        assert same_bits(weights(adapter), source)
        if kind == "eager":
            assert call.passes == 1  # the pass that decided is the prediction
            assert same_bits(found, prediction)
        torch.testing.assert_close(found, prediction, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_far_frame_is_judged_by_the_source_and_adapted_to_from_the_weights_that_the_video_had(model, calibration):
    frames, seen = drifted(4), []
    config = CONFIG.replace(gate="none", lr=0.1)
    with StreamAdapter(model, branch_of(model), calibration=calibration, config=config) as adapter:
        for frame in frames:
            adapter.step(frame)
            seen.append((adapter.last.losses, weights(adapter)))
    with StreamAdapter(
        model, branch_of(model), calibration=calibration, config=config.replace(gate="calibrated")
    ) as adapter:
        for frame, (losses, expected) in zip(frames, seen, strict=True):
            adapter.step(frame)
            assert adapter.last.losses == losses
            assert same_bits(weights(adapter), expected)


# ---- what is forgotten


@pytest.mark.parametrize("gate", ["none", "calibrated"])
def test_there_is_no_drift_before_the_first_prediction_of_a_video(model, calibration, usual, gate):
    adapter, _ = gated(model, calibration, gate=gate)
    state = adapter.state_dict()
    begins = {
        "reset": adapter.reset,
        "swap": lambda: adapter.swap(adapter.new_state()),
        "load": lambda: adapter.load_state_dict(state),
        "detach": adapter.detach,
    }
    for frame in (usual[0], drifted(1)[0]):
        for name, begin in begins.items():
            if name != "detach":
                adapter.step(frame)
                assert adapter.drift is not None
                begin()
                assert adapter.drift is None, name
    adapter.step(usual[0])
    adapter.detach()
    assert adapter.drift is None


def test_nothing_of_the_last_frame_is_held_after_detach(model, calibration, usual):
    held: list[weakref.ref] = []

    def preprocess(frame):
        x = usual[0][None] + float(frame[0, 0, 0])
        held.append(weakref.ref(x))
        return x

    def predict(x):
        output = model(x)
        held.append(weakref.ref(output))
        return output

    adapter = StreamAdapter(
        model, branch_of(model), calibration=calibration, config=CONFIG, preprocess=preprocess, predict=predict
    )
    for value in (0, 200, 0):
        adapter.step(np.full((*usual[0].shape[1:], 3), value, np.uint8))
    assert adapter.last.reason == "gate"
    adapter.adapt(np.full((*usual[0].shape[1:], 3), 0, np.uint8))
    adapter.detach()
    gc.collect()
    assert len(held) >= 8
    assert not [ref for ref in held if ref() is not None]

"""`StreamAdapter` with a calibration: forward only, beside gradient steps, and on every engine."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil

import pytest
import torch
from torch import nn

import models as zoo
from conftest import hooks_of, left_as_it_was, mix_flags, same_bits, settle_norms
from tape import TapeRecorder
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.calibration.calibrate import calibrate
from ttt_adapt.engine.compiled import CompileEngine
from ttt_adapt.engine.eager import EagerEngine
from ttt_adapt.engine.graphs import GraphEngine
from ttt_adapt.errors import CheckpointError, ConfigError, StateError
from ttt_adapt.model.calibration import Calibration

SIZE = (32, 48)


def clip(count: int, size=SIZE, seed: int = 21, scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) * scale + shift for _ in range(count)]


def drifted(count: int, size=SIZE) -> list[torch.Tensor]:
    return clip(count, size, seed=5, scale=0.3, shift=-1.0)


class CalibratedContract:
    """Calibrate, stream drifted frames, give the model back: subclass it per encoder family."""

    size = SIZE

    def make(self) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        return settle_norms(self.make())

    @pytest.fixture
    def calibration(self, model) -> Calibration:
        found = calibrate(model, clip(8, self.size))
        return found.replace(rule=dataclasses.replace(found.rule, strength=0.5))

    def test_calibrating_leaves_the_model_as_it_was(self, model):
        mix_flags(model)
        with left_as_it_was(model):
            calibrate(model, clip(8, self.size))

    def test_far_frames_are_corrected_and_the_model_is_given_back_as_it_was(self, model, calibration):
        frames = drifted(3, self.size)
        with torch.no_grad():
            plain = [model(frame[None]) for frame in frames]
        mix_flags(model)
        with left_as_it_was(model), StreamAdapter(model, calibration=calibration) as adapter:
            assert adapter.drift is None
            found = list(adapter.stream(frames))
            assert hooks_of(model) == 0
            assert adapter.drift > 1.0
        assert not any(same_bits(a, b) for a, b in zip(found, plain, strict=True))

    def test_a_rule_that_is_never_met_gives_the_plain_predictions_bit_for_bit(self, model, calibration):
        frames = drifted(2, self.size)
        with torch.no_grad():
            plain = [model(frame[None]) for frame in frames]
        never = calibration.replace(rule=dataclasses.replace(calibration.rule, strength=1e12))
        with StreamAdapter(model, calibration=never) as adapter:
            assert same_bits(list(adapter.stream(frames)), plain)

    def test_any_order_of_frames_gives_the_same_predictions(self, model, calibration):
        frames = [*drifted(2, self.size), *clip(2, self.size)]
        with StreamAdapter(model, calibration=calibration) as adapter:
            forth = list(adapter.stream(frames))
            back = list(adapter.stream(frames[::-1]))[::-1]
            adapter.reset()
            again = list(adapter.stream(frames))
        assert same_bits(forth, back)
        assert same_bits(forth, again)

    def test_two_adapters_share_nothing(self, model, calibration):
        twin, frames = copy.deepcopy(model), [*drifted(2, self.size), *clip(1, self.size)]
        with StreamAdapter(model, calibration=calibration) as adapter:
            alone = list(adapter.stream(frames))
        with StreamAdapter(model, calibration=calibration) as one, StreamAdapter(twin, calibration=calibration) as two:
            together = [(one.step(a), two.step(b)) for a, b in zip(frames, frames[::-1], strict=True)]
            assert one.drift != two.drift
        assert same_bits([a for a, _ in together], alone)
        assert same_bits([b for _, b in together], alone[::-1])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_callers_grad_mode_changes_nothing(self, model, calibration, mode):
        frames = drifted(2, self.size)
        with StreamAdapter(model, calibration=calibration) as adapter:
            expected = list(adapter.stream(frames))
        with mode(), StreamAdapter(model, calibration=calibration) as adapter:
            assert same_bits(list(adapter.stream(frames)), expected)
            drift = adapter.drift
        with StreamAdapter(model, calibration=calibration) as adapter:
            list(adapter.stream(frames))
            assert adapter.drift == drift


class TestUNet(CalibratedContract):
    def make(self):
        return zoo.UNet()


class TestResNetClassifier(CalibratedContract):
    size = (64, 64)

    def make(self):
        return zoo.resnet()


class TestConvNeXt(CalibratedContract):
    size = (64, 64)

    def make(self):
        return zoo.convnext()


class TestSwin(CalibratedContract):
    size = (64, 96)

    def make(self):
        return zoo.swin()


class TestViTWithRegisters(CalibratedContract):
    def make(self):
        return zoo.vit_registers()


class TestRotaryEva(CalibratedContract):
    size = (42, 56)

    def make(self):
        return zoo.eva()


class TestMaskQueryNet(CalibratedContract):
    size = (64, 80)

    def make(self):
        return zoo.MaskQueryNet()


# ---- the stream


@pytest.fixture
def model() -> nn.Module:
    return settle_norms(zoo.UNet())


@pytest.fixture
def calibration(model) -> Calibration:
    return calibrate(model, clip(8))


def test_a_stream_without_a_branch_reports_so_and_counts_its_frames(model, calibration):
    adapter = StreamAdapter(model, calibration=calibration)
    report = adapter.adapt(clip(1)[0])
    assert (report.adapted, report.reason, report.frame_index) == (False, "no branch", 0)
    adapter.step(clip(1)[0])
    assert adapter.last.frame_index == 1
    adapter.reset()
    assert adapter.last is None


def test_without_a_branch_or_a_calibration_an_adapter_is_refused(model):
    with left_as_it_was(model), pytest.raises(ConfigError, match="calibration=calibrate"):
        StreamAdapter(model)


@pytest.mark.parametrize("statistics", ["frozen", "ema", "blend", "batch"])
def test_a_calibration_that_is_not_used_and_no_branch_leave_nothing_to_do_and_are_refused(
    model, calibration, statistics
):
    config = StreamConfig(norm_stats=statistics)
    with left_as_it_was(model), pytest.raises(ConfigError, match=f"norm_stats is '{statistics}', so the calibration"):
        StreamAdapter(model, calibration=calibration, config=config)


@pytest.mark.skipif(shutil.which("g++") is None and "CXX" not in os.environ, reason="no C++ compiler")
def test_a_stream_without_a_branch_may_be_compiled():
    model = settle_norms(zoo.TinySeg())
    calibration, frames = calibrate(model, clip(8)), [*drifted(2), *clip(1)]
    with StreamAdapter(model, calibration=calibration) as adapter:
        expected = [(adapter.step(frame), adapter.drift) for frame in frames]
    config = StreamConfig.online(engine="compile")
    with left_as_it_was(model), StreamAdapter(model, calibration=calibration, config=config) as adapter:
        assert adapter.engine[0] == "compile"
        for frame, (prediction, drift) in zip(frames, expected, strict=True):
            torch.testing.assert_close(adapter.step(frame), prediction, rtol=1e-4, atol=1e-5)
            assert adapter.drift == pytest.approx(drift, rel=1e-4)
    torch._dynamo.reset()


def test_frames_of_a_forward_only_stream_may_change_their_size(model, calibration):
    frames = [*drifted(1), *drifted(1, (64, 32)), *drifted(1)]
    with StreamAdapter(model, calibration=calibration) as adapter:
        shapes = [tuple(output.shape[-2:]) for output in adapter.stream(frames)]
        first = adapter.step(frames[0])
        assert same_bits(first, adapter.step(frames[2]))
    assert shapes == [SIZE, (64, 32), SIZE]


def test_a_calibration_of_other_weights_is_refused(model, calibration):
    other = settle_norms(zoo.UNet())
    with left_as_it_was(other), pytest.raises(ConfigError, match="other weights than those of this UNet: calibrate"):
        StreamAdapter(other, calibration=calibration)


def test_a_half_precision_copy_of_the_model_takes_its_calibration(model, calibration):
    half = copy.deepcopy(model).half()
    with StreamAdapter(half, calibration=calibration) as adapter:
        assert adapter.step(drifted(1)[0]).dtype == torch.float16


def test_a_state_is_loaded_with_the_same_calibration_only(model, calibration):
    frames = drifted(3)
    adapter = StreamAdapter(model, calibration=calibration)
    adapter.step(frames[0])
    state, expected = adapter.state_dict(), adapter.step(frames[1])
    adapter.reset()
    adapter.load_state_dict(state)
    assert adapter.last.frame_index == 0 if adapter.last else True
    assert same_bits(adapter.step(frames[1]), expected)
    assert adapter.last.frame_index == 1
    adapter.detach()
    other = calibration.replace(rule=dataclasses.replace(calibration.rule, strength=3.0))
    with pytest.raises(CheckpointError, match="pass the same calibration"):
        StreamAdapter(model, calibration=other).load_state_dict(state)


def test_a_detached_adapter_is_refused(model, calibration):
    adapter = StreamAdapter(model, calibration=calibration)
    assert adapter.detach() is model
    with pytest.raises(StateError, match="detached"):
        adapter.step(clip(1)[0])


def test_videos_take_turns_over_one_model(model, calibration):
    frames = drifted(4)
    adapter = StreamAdapter(model, calibration=calibration)
    expected = [adapter.predict(frame) for frame in frames]
    first, found = adapter.state, []
    waiting = adapter.new_state()
    for frame in frames:
        found.append(adapter.step(frame))
        waiting = adapter.swap(waiting)
    assert same_bits(found, expected)
    assert first in (waiting, adapter.state)


def branch_of(model: nn.Module) -> MAEBranch:
    torch.manual_seed(5)
    return MAEBranch.attach(model, "encoder")


def test_at_lr_zero_a_stream_with_a_branch_predicts_as_the_forward_only_one(model, calibration):
    frames = [*drifted(2), *clip(2)]
    with StreamAdapter(model, calibration=calibration) as adapter:
        expected = list(adapter.stream(frames))
    config = StreamConfig(window=3, batch_size=2, lr=0.0, norm_stats="calibrated")
    with StreamAdapter(model, branch_of(model), calibration=calibration, config=config) as adapter:
        assert same_bits(list(adapter.stream(frames)), expected)
        assert adapter.last.adapted


def test_gradient_steps_see_nothing_of_the_correction(model, calibration):
    frames, losses = drifted(3), []
    weights = branch_of(model).state_dict()
    for given in (None, calibration):
        branch = branch_of(model)
        branch.load_state_dict(weights)
        config = StreamConfig(window=3, batch_size=2, lr=1e-3, seed=2, norm_stats="calibrated" if given else "frozen")
        with StreamAdapter(model, branch, calibration=given, config=config) as adapter:
            losses.append([adapter.adapt(frame).losses for frame in frames])
    assert losses[0] == losses[1]


def test_calibrated_statistics_without_a_calibration_are_refused(model):
    config = StreamConfig(norm_stats="calibrated")
    with left_as_it_was(model), pytest.raises(ConfigError, match="this model has no calibration: make one"):
        StreamAdapter(model, branch_of(model), config=config)


def test_an_error_of_predict_leaves_the_model_as_it_was_and_the_stream_goes_on(model, calibration):
    frame, broken = drifted(1)[0], []

    def predict(x):
        output = model(x)
        if broken:
            raise KeyError
        return output

    adapter = StreamAdapter(model, calibration=calibration, predict=predict)
    expected = adapter.step(frame)
    broken.append(True)
    with left_as_it_was(model), pytest.raises(KeyError):
        adapter.step(frame)
    broken.clear()
    assert same_bits(adapter.step(frame), expected)


# ---- engines


@pytest.mark.parametrize("rule", [{}, {"per": "channel"}], ids=str)
@pytest.mark.parametrize("kind", ["compile", "cudagraph"])
@pytest.mark.parametrize("make", [zoo.UNet, zoo.vit])
def test_every_engine_predicts_and_measures_as_the_eager_one(monkeypatch, kind, make, rule):
    model = settle_norms(make())
    found = calibrate(model, clip(8))
    found = found.replace(rule=dataclasses.replace(found.rule, strength=0.5, **rule))
    frames = [*drifted(4), *clip(2), *drifted(4, (64, 32)), *clip(4, (64, 32)), *clip(3), *drifted(2)]
    engines = {
        "eager": EagerEngine,
        "compile": lambda step: CompileEngine(step, backend="aot_eager"),
        "cudagraph": lambda step: GraphEngine(step, TapeRecorder()),
    }
    results = []
    for name in ("eager", kind):
        monkeypatch.setattr("ttt_adapt.adapter.choose_engine", lambda step, _optimizer, n=name: engines[n](step))
        with StreamAdapter(model, calibration=found) as adapter:
            results.append([(adapter.step(frame), adapter.drift) for frame in frames])
    torch._dynamo.reset()
    for (mine, my_drift), (theirs, drift) in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert my_drift == pytest.approx(drift, rel=1e-4)


def test_the_drift_is_that_of_the_last_predicted_frame_also_around_blocks_without_a_pass():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    found: list[float | None] = []

    def predict(x):
        found.append(adapter.drift)
        return model(x)

    calibration = calibrate(model, clip(8))
    with StreamAdapter(model, calibration=calibration, predict=predict) as adapter:
        with adapter.statistics():
            pass
        assert adapter.drift is None
        adapter.step(clip(1)[0])
        drift = adapter.drift
        assert drift > 0.0
        with adapter.statistics():
            pass
        assert adapter.drift == drift
        adapter.step(drifted(1)[0])
        assert found == [None, drift]
        adapter.reset()
        with adapter.statistics():
            pass
        assert adapter.drift is None

"""A call that fails leaves the stream as it was; a state of other weights is refused; adapters are not copied."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models as zoo
from conftest import hooks_of, photograph, same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, FrameError, MemoryLimitError, StateError
from ttt_adapt.objectives import PseudoLabel

NORMALIZE = Normalize((0.5,) * 3, (0.5,) * 3)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2)


class EvenOnly(nn.Module):
    """Takes even sizes only; its encoder takes all."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.down, self.out = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enc(x)
        return self.out(torch.cat([fine, nn.functional.interpolate(self.down(fine), scale_factor=2)], 1))


def image(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def attached(config: StreamConfig = CONFIG, **more: Any) -> StreamAdapter:
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    return StreamAdapter(model, MAEBranch.attach(model, "backbone"), config=config, preprocess=NORMALIZE, **more)


@pytest.mark.parametrize("config", [CONFIG, StreamConfig.no_memory(batch_size=2), CONFIG.replace(window="auto")])
def test_a_first_frame_that_the_model_refuses_does_not_decide_the_size(config):
    torch.manual_seed(0)
    net = EvenOnly().eval()
    with StreamAdapter(net, encoder="down", config=config, preprocess=NORMALIZE) as adapter:
        fresh = adapter.state_dict()
        for odd in ((33, 47), (35, 45)):
            with pytest.raises(FrameError, match="Sizes of tensors"):
                adapter.step(image(*odd))
            assert same_bits(adapter.state_dict(), fresh)
        adapter.step(image(32, 48))
        with pytest.raises(FrameError, match="those of the stream so far are"):
            adapter.step(image(33, 47))
        after = adapter.predict(image(32, 48, seed=5))
    torch.manual_seed(0)
    net = EvenOnly().eval()
    with StreamAdapter(net, encoder="down", config=config, preprocess=NORMALIZE) as adapter:
        adapter.step(image(32, 48))
        assert torch.equal(adapter.predict(image(32, 48, seed=5)), after)


TOO_SMALL = [
    (zoo.PlainSeg, "backbone", (1, 40)),
    (zoo.PlainSeg, "backbone", (1, 1)),
    (zoo.convnext, "stages", (15, 17)),
    (zoo.UNet, "encoder", (40, 1)),
    (zoo.vit, "norm", (33, 31)),
]


@pytest.mark.parametrize(("make", "encoder", "size"), TOO_SMALL)
@pytest.mark.parametrize("before", [0, 1])
def test_a_frame_of_a_size_that_the_model_does_not_take_is_refused_with_the_way_and_changes_nothing(
    make, encoder, size, before
):
    torch.manual_seed(9)
    model = settle_norms(make())
    with StreamAdapter(model, MAEBranch.attach(model, encoder), config=CONFIG) as adapter:
        if before:
            adapter.predict(torch.randn(3, 64, 96))
        was = adapter.state_dict()
        for call in (adapter.step, adapter.predict):
            with pytest.raises(FrameError, match=rf"{size[0]} x {size[1]}.*(resize the frames|use larger frames)"):
                call(torch.randn(3, *size))
            assert same_bits(adapter.state_dict(), was)
        adapter.step(torch.randn(3, 64, 96))


@pytest.mark.parametrize("size", [(1, 1), (5, 16)])
@pytest.mark.parametrize("objective", [lambda m: MAEBranch.attach(m, "backbone"), PseudoLabel])
def test_a_frame_of_one_patch_is_refused_by_size_patch_and_way(objective, size):
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    with StreamAdapter(model, objective(model), config=CONFIG) as adapter:
        fresh = adapter.state_dict()
        with pytest.raises(FrameError, match=f"{size[0]} x {size[1]}.*one patch of 16 x 16.*larger frames or crops"):
            adapter.step(torch.randn(3, *size))
        assert same_bits(adapter.state_dict(), fresh)
        adapter.step(torch.randn(3, 32, 48))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("times", [1, 100])
def test_an_error_that_is_not_of_the_size_stays_what_it_is(error, times):
    calls: list[int] = []

    def predict(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) <= times:
            raise error("my own")
        return x

    with attached(predict=predict) as adapter, pytest.raises(error, match="^my own$"):
        adapter.step(image(33, 47))


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("call", ["step", "predict"])
def test_an_error_of_what_is_in_a_frame_stays_what_it_is(before, call):
    def predict(x: Tensor) -> Tensor:
        if (x > 0.9).any():  # a frame in another size may have lost this pixel
            raise ValueError("no object was found")
        return x

    frame = torch.zeros(3, 256, 320)
    frame[0, 1, 1], frame[0, 0, 0] = 1, -1
    with attached(predict=predict) as adapter:
        if before:
            adapter.step(torch.zeros(3, 256, 320))
        with pytest.raises(ValueError, match="^no object was found$"):
            getattr(adapter, call)(frame)


def test_an_error_that_an_image_without_content_has_in_every_size_stays_what_it_is():
    def predict(x: Tensor) -> Tensor:
        if (x > 0.9).sum() != 1:
            raise ValueError("expected one object")
        return x

    frame = torch.zeros(3, 256, 320)
    frame[0, 0, 0], frame[0, 1, 1], frame[0, 3, 3] = 1, 1, -1  # in half the size, one of them is left
    with attached(predict=predict) as adapter, pytest.raises(ValueError, match="^expected one object$"):
        adapter.step(frame)


def test_a_frame_of_the_size_of_the_stream_that_fails_is_predicted_once():
    calls: list[int] = []

    def predict(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the disk is full")
        return x

    with attached(predict=predict) as adapter:
        adapter.step(image(32, 48))
        with pytest.raises(RuntimeError, match="^the disk is full$"):
            adapter.step(image(32, 48))
    assert len(calls) == 2


def test_a_size_that_a_stream_without_a_branch_does_not_take_is_refused():
    torch.manual_seed(9)
    model = settle_norms(zoo.PlainSeg())
    branch = MAEBranch.attach(model, "backbone")
    calibration = branch.calibrate([NORMALIZE(image(32, 48, seed=i))[0] for i in range(8)])
    with StreamAdapter(model, calibration=calibration) as adapter:
        adapter.predict(torch.randn(3, 32, 48))
        drift = adapter.drift
        with pytest.raises(FrameError, match="2 x 3.*takes 128 x 160"):
            adapter.step(torch.randn(3, 2, 3))
        assert adapter.drift == drift
        assert adapter.state.progress.frame_index == 0


def test_a_frame_without_a_gradient_step_that_fails_is_not_counted():
    calls: list[int] = []

    def predict(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no")
        return x

    with attached(CONFIG.replace(iterations=0), predict=predict) as adapter:
        with pytest.raises(ValueError, match="no"):
            adapter.step(image(33, 47))
        assert (adapter.state.progress.frame_index, adapter.last) == (0, None)
        adapter.step(image(32, 48))
        assert adapter.state.progress.frame_index == 1


PLACES = ("preprocess", "objective", "model", "optimizer", "predict")
ERRORS = (ValueError("burst"), torch.OutOfMemoryError("burst"), KeyboardInterrupt("burst"))


class Bursting:
    """A stream that raises an error in one place once it is told so."""

    def __init__(self, place: str, error: BaseException, config: StreamConfig) -> None:
        self.place, self.error, self.armed = place, error, False
        torch.manual_seed(9)
        self.model = settle_norms(zoo.TinySeg())
        branch = MAEBranch.attach(self.model, "backbone")
        loss, forward = branch.loss, self.model.backbone.forward
        branch.loss = lambda *a, **k: self.burst("objective") or loss(*a, **k)  # type: ignore[method-assign]
        self.model.backbone.forward = lambda x: self.burst("model") or forward(x)
        self.adapter = StreamAdapter(
            self.model,
            branch,
            config=config,
            preprocess=lambda frame: self.burst("preprocess") or NORMALIZE(frame),
            predict=lambda x: self.burst("predict") or self.model(x),
        )
        optimizer = self.adapter.state.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: self.burst("optimizer"))

    def burst(self, place: str) -> None:
        if self.armed and place == self.place:
            raise self.error


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("before", [0, 4])
def test_an_error_anywhere_in_a_step_leaves_nothing(place, error, before):
    stream = Bursting(place, error, CONFIG.replace(gate="none" if before else "surprise", norm_stats="ema"))
    with stream.adapter as adapter:
        for i in range(before):
            adapter.step(image(32, 48, seed=i))
        was, report, flags = adapter.state_dict(), adapter.last, photograph(stream.model)
        stream.armed = True
        with pytest.raises((type(error), MemoryLimitError)):
            adapter.step(image(32, 48, seed=7))
        stream.armed = False
        now = adapter.state_dict()
        moved = {"weights", "optimizer"} if before and place in ("optimizer", "predict") else set()
        for name in was.keys() - moved:
            assert same_bits(now[name], was[name]), name
        assert adapter.last is report
        assert hooks_of(stream.model) == 0
        assert photograph(stream.model)["training"] == flags["training"]
        adapter.step(image(32, 48, seed=8))


def test_a_prediction_that_fails_leaves_the_drift_of_the_last_one():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    branch.calibrate([NORMALIZE(image(32, 48, seed=i))[0] for i in range(8)])
    fail: list[int] = []

    def predict(x: Tensor) -> Tensor:
        found = model(x)
        if fail:
            raise ValueError("late")
        return found

    with StreamAdapter(model, branch, config=CONFIG.replace(norm_stats="calibrated"), predict=predict) as adapter:
        adapter.step(torch.randn(3, 32, 48))
        drift = adapter.drift
        fail.append(1)
        with pytest.raises(ValueError, match="late"):
            adapter.step(5 * torch.randn(3, 32, 48))
        assert adapter.drift == drift


# ---- whose weights a state is of


def stream_of(seed: int, branch_seed: int, objective: str = "mae") -> StreamAdapter:
    torch.manual_seed(seed)
    model = settle_norms(zoo.TinySeg())
    torch.manual_seed(branch_seed)
    branch = MAEBranch.attach(model, "backbone") if objective == "mae" else PseudoLabel(model, average=0.9)
    return StreamAdapter(model, branch, config=CONFIG)


@pytest.mark.parametrize(("other", "what"), [((1, 5), "of the model"), ((0, 6), "of the objective")])
def test_a_state_over_other_source_weights_is_refused_and_changes_nothing(other, what):
    with stream_of(0, 5) as adapter:
        adapter.step(torch.randn(3, 32, 48))
        state = adapter.state_dict()
    with stream_of(*other) as adapter:
        adapter.step(torch.randn(3, 32, 48))
        before = adapter.state_dict()
        with pytest.raises(CheckpointError, match=f"other source weights.*{what}.*began with"):
            adapter.load_state_dict(state)
        assert same_bits(adapter.state_dict(), before)
    with stream_of(0, 5) as adapter:
        adapter.load_state_dict(state)
        assert same_bits(adapter.state_dict(), state)


def test_a_state_of_another_head_is_refused_where_only_the_encoder_is_adapted():
    with stream_of(0, 5, "pseudo-labels") as adapter:
        state = adapter.state_dict()
    torch.manual_seed(0)
    model = settle_norms(zoo.TinySeg())
    with torch.no_grad():
        [*model.parameters()][-1].add_(1.0)
    with (
        StreamAdapter(model, PseudoLabel(model, average=0.9), config=CONFIG) as adapter,
        pytest.raises(CheckpointError, match="other source weights of the model"),
    ):
        adapter.load_state_dict(state)


def test_the_source_of_a_state_is_that_of_the_beginning_whenever_it_is_saved():
    with stream_of(0, 5) as adapter:
        for _ in range(3):
            adapter.step(torch.randn(3, 32, 48))
        late = adapter.state_dict()["source"]
        adapter.reset()
        assert adapter.state_dict()["source"] == late
    with stream_of(0, 5) as adapter:
        assert adapter.state_dict()["source"] == late


# ---- copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda it: copy.deepcopy({"a": [it]})])
@pytest.mark.parametrize("what", ["adapter", "state"])
def test_an_adapter_and_its_state_are_not_copied_and_stay_as_they_are(copied, what):
    with attached() as adapter:
        adapter.step(image(32, 48))
        before = adapter.state_dict()
        with pytest.raises(StateError, match=r"cannot be copied or pickled.*state_dict\(\)"):
            copied(adapter if what == "adapter" else adapter.state)
        assert same_bits(adapter.state_dict(), before)
        adapter.step(image(32, 48, seed=1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_branch_is_copied_with_its_model_and_its_calibration(copied):
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    calibration = branch.calibrate(list(torch.randn(8, 3, 32, 48)))
    other = copied(branch)
    assert other.model is not model
    assert other.calibration.digest == calibration.digest == copied(calibration).digest
    x = torch.randn(2, 3, 32, 48)
    losses = [each.loss(x, generator=torch.Generator().manual_seed(1)) for each in (branch, other)]
    assert torch.equal(*losses)
    with (
        StreamAdapter(other.model, other, config=CONFIG) as adapter,
        StreamAdapter(model, branch, config=CONFIG) as own,
    ):
        assert torch.equal(adapter.step(x[0]), own.step(x[0]))


# ---- a first frame that fails, and the frames after it


@pytest.mark.parametrize("stats", ["frozen", "ema"])
@pytest.mark.parametrize("pull", [0.0, 0.1])
@pytest.mark.parametrize("before", [0, 2])
def test_after_a_prediction_that_fails_the_stream_goes_on_as_if_the_frame_was_never_there(stats, pull, before):
    def run(fails: bool) -> list[Any]:
        broken: list[bool] = []

        def predict(x: Tensor) -> Tensor:
            if broken:
                raise ValueError("no")
            return adapter.branch.model(x)

        config = CONFIG.replace(norm_stats=stats, source_pull=pull, restart_optimizer=True)
        with attached(config, predict=predict) as adapter:
            norms = [m for m in adapter.branch.model.modules() if isinstance(m, nn.BatchNorm2d)]
            for seed in range(before):
                adapter.step(image(32, 48, seed=seed))
            was = [norm.running_mean.clone() for norm in norms]
            if fails:
                broken.append(True)
                with pytest.raises(ValueError, match="no"):
                    adapter.step(image(32, 48, seed=8))
                broken.clear()
                adapter.predict(image(32, 48, seed=9))
                assert same_bits([norm.running_mean for norm in norms], was)
            outputs = [adapter.step(image(32, 48, seed=seed)) for seed in (5, 6)]
            return outputs if not before else [adapter.state_dict()["progress"]]

    assert same_bits(run(True), run(False))


def test_a_warning_that_is_an_error_leaves_the_model_free():
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg()).train()
    branch = MAEBranch.attach(model, "backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="never trained"):
            StreamAdapter(model, branch, config=CONFIG)
    assert all(module.training for module in model.modules())
    StreamAdapter(model, branch, config=CONFIG).detach()


class Observed(nn.Module):
    """A model that counts its predictions and remembers the range of its frames."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = settle_norms(zoo.TinySeg())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("highest", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.highest = torch.maximum(self.highest, x.detach().max())
        return self.inner(x)


def test_a_state_of_a_model_that_counts_its_predictions_is_of_the_same_source():
    def adapter() -> StreamAdapter:
        torch.manual_seed(9)
        model = Observed().eval()
        return StreamAdapter(model, MAEBranch.attach(model, "inner.backbone"), config=CONFIG, preprocess=NORMALIZE)

    with adapter() as first:
        fresh = first.state_dict()["source"]
    with adapter() as first, adapter() as second:
        first.step(image(32, 48))
        state = first.state_dict()
        assert state["source"] == fresh
        second.predict(image(32, 48))
        second.load_state_dict(state)
        assert same_bits(second.step(image(32, 48, seed=1)), first.step(image(32, 48, seed=1)))

"""What a model's own passes keep of a video belongs to the stream: saved, loaded, undone, reset and swapped with it."""

from __future__ import annotations

import io
from collections import OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import same_bits
from memories import Counting, Memory, Observer, Recurrent, RunningScale, model
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, StateError
from ttt_adapt.objectives import PseudoLabel

CONFIG = StreamConfig(window=2, batch_size=2, lr=1e-3)


class WithHead(nn.Module):
    """Keeps something behind its encoder, where no pass of a branch comes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.layer, self.head = layer, nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.backbone(x)))


class Shifted(nn.Module):
    """Takes a part of the channels from the frame before, in an attribute that its first pass makes."""

    def forward(self, x: Tensor) -> Tensor:
        before = getattr(self, "before", torch.zeros_like(x))
        self.before = x.detach()
        return torch.cat([before[:, :2], x[:, 2:]], 1)


class EveryOther(nn.Module):
    """Keeps the features of every second frame, in a buffer that its first pass makes, and adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.count % 2 == 0:
            self.register_buffer("key", x.detach(), persistent=False)
        self.count += 1
        return x + 0.5 * self.key


class Queue(nn.Module):
    """Averages over the last three frames; keeps them, and remarks of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: deque[Tensor] = deque(maxlen=3)
        self.remarks: dict[Any, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.frames.append(x.detach())
        size, key = x.shape[-2:], (len(self.frames), "frames")
        self.remarks = OrderedDict({key: [size, {1, 2}, None, 0.5], "kind": (x.dtype, x.device), "name": b"x"})
        self.last = np.asarray(x.detach().mean().item())
        return torch.stack([*self.frames]).mean(0) + float(self.last)


class Stream(Memory):
    """An object with a state that is another one after every pass."""


class Opaque(nn.Module):
    """Keeps what only it understands."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()

    def forward(self, x: Tensor) -> Tensor:
        calls = self.stream.calls
        self.stream = Stream()
        self.stream.calls = calls + 1
        return x * (1 + 0.1 * calls)


LAYERS = [Observer, RunningScale, Recurrent, Counting, Shifted, EveryOther, Queue]
PLACES = {"encoder": (model, "0"), "head": (WithHead, "backbone")}
KINDS = ("branch", "pseudo-labels", "calibration")
WAYS = [(layer, "head", "branch") for layer in LAYERS]
WAYS += [(layer, "encoder", "branch") for layer in (Observer, RunningScale, Recurrent, Counting)]
WAYS += [(layer, "head", kind) for layer in (Recurrent, Counting) for kind in KINDS[1:]]
ALL = pytest.mark.parametrize(("layer", "place", "kind"), WAYS)


def frames(count: int = 5, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 32, 48, generator=generator) for _ in range(count)]


def attached(layer, place: str = "head", kind: str = "branch", wrap=lambda net: net, **more: Any) -> StreamAdapter:
    """An adapter on a model that is the same in every call."""
    torch.manual_seed(3)
    make, encoder = PLACES[place]
    net = make(layer()).eval()
    torch.manual_seed(1)
    if kind == "branch":
        return StreamAdapter(wrap(net), MAEBranch.attach(net, encoder), config=CONFIG, **more)
    if kind == "pseudo-labels":
        return StreamAdapter(wrap(net), PseudoLabel(net, threshold=0.0), config=CONFIG, **more)
    branch = MAEBranch.attach(net, encoder)
    return StreamAdapter(wrap(net), calibration=branch.calibrate(frames(8, seed=5)), **more)


def read(state: dict[str, Any]) -> dict[str, Any]:
    """A state that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@ALL
def test_a_stream_that_is_saved_and_loaded_goes_on_as_if_it_never_stopped(layer, place, kind):
    with attached(layer, place, kind) as adapter:
        wanted = [adapter.step(frame) for frame in frames()]
        adapter.reset()
        assert same_bits([adapter.step(frame) for frame in frames(2)], wanted[:2])
        state = read(adapter.state_dict())
        adapter.step(frames(1, seed=8)[0])
        adapter.load_state_dict(state)  # also where the model saw other frames since
        assert same_bits([adapter.step(frame) for frame in frames()[2:]], wanted[2:])
    with attached(layer, place, kind) as adapter:
        adapter.load_state_dict(state)
        assert same_bits([adapter.step(frame) for frame in frames()[2:]], wanted[2:])
        adapter.reset()
        assert same_bits([adapter.step(frame) for frame in frames()], wanted)


@ALL
@pytest.mark.parametrize("at", [0, 2])
def test_a_prediction_that_fails_leaves_the_memory_of_a_model_alone(layer, place, kind, at):
    fails: list[bool] = []

    def predict(x: Tensor) -> Tensor:
        found = adapter.branch.model(x)
        if fails:
            raise KeyError("burst")
        return found

    with attached(layer, place, kind, predict=predict) as adapter:
        for frame in frames(at):
            adapter.step(frame)
        before = adapter.state_dict()["passes"]
        fails.append(True)
        for call in (adapter.step, adapter.predict, lambda frame: adapter.forward(frame[None])):
            with pytest.raises(KeyError, match="burst"):
                call(frames(1, seed=7)[0])
        fails.clear()
        now = adapter.state_dict()["passes"]
        if before:  # at the first frame nobody knows yet what passes change
            assert same_bits(now, before)
        else:
            adapter.load_state_dict(adapter.state_dict())
        predictions = [adapter.predict(frame) for frame in frames(2, seed=9)]
    with attached(layer, place, kind) as adapter:
        for frame in frames(at):
            adapter.step(frame)
        if kind == "calibration" or at == 0:  # gradient steps stay where they finished
            assert same_bits([adapter.predict(frame) for frame in frames(2, seed=9)], predictions)


@ALL
def test_two_videos_that_take_turns_keep_their_own_memory(layer, place, kind):
    clips = [frames(4), frames(4, seed=6)]
    wanted = []
    for clip in clips:
        with attached(layer, place, kind) as adapter:
            wanted.append([adapter.step(frame) for frame in clip])
    with attached(layer, place, kind) as adapter:
        found, states = [[], []], [adapter.state, adapter.new_state()]
        for pair in zip(*clips, strict=True):
            for video, frame in enumerate(pair):
                adapter.swap(states[video])
                found[video].append(adapter.step(frame))
        assert same_bits(found, wanted)
        waiting = states[0]
        saved = waiting.state_dict()
        assert same_bits(saved["passes"], read(saved)["passes"])


def test_the_state_of_a_model_that_keeps_nothing_holds_nothing_of_it():
    with attached(nn.Identity) as adapter:
        adapter.step(frames(1)[0])
        assert adapter.state_dict()["passes"] == {}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")], ids=["parallel", "compiled"]
)
def test_the_memory_of_a_wrapped_model_goes_on_over_the_plain_one(wrap):
    with attached(Recurrent) as adapter:
        wanted = [adapter.step(frame) for frame in frames()]
    with attached(Recurrent, wrap=wrap) as adapter:
        for frame in frames(2):
            adapter.step(frame)
        state = read(adapter.state_dict())
    assert state["passes"]["attributes"]
    with attached(Recurrent) as adapter:
        adapter.load_state_dict(state)
        assert same_bits([adapter.step(frame) for frame in frames()[2:]], wanted[2:])


class Smoothed(nn.Module):
    """A wrapper with a memory of its own: it averages predictions over time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.mean = inner, None

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        self.mean = found.detach() if self.mean is None else self.mean.lerp(found.detach(), 0.5)
        return self.mean


def test_the_memory_of_a_module_around_the_model_of_the_branch_is_saved_too():
    with attached(nn.Identity, wrap=Smoothed) as adapter:
        wanted = [adapter.step(frame) for frame in frames()]
        adapter.reset()
        for frame in frames(2):
            adapter.step(frame)
        state = read(adapter.state_dict())
    with attached(nn.Identity, wrap=Smoothed) as adapter:
        adapter.load_state_dict(state)
        assert same_bits([adapter.step(frame) for frame in frames()[2:]], wanted[2:])


def test_a_memory_of_other_objects_is_an_error_when_it_is_saved_and_the_stream_goes_on():
    with attached(Opaque) as adapter:
        for frame in frames(2):
            adapter.step(frame)
        with pytest.raises(StateError, match=r"layer.stream holds a .*Stream\).*tensors, numbers"):
            adapter.state_dict()
        assert adapter.step(frames(1)[0]).isfinite().all()


def test_a_gate_that_looks_at_a_frame_leaves_the_memory_alone():
    def run(gate: str) -> list[int]:
        torch.manual_seed(3)
        net = WithHead(Counting()).eval()
        branch = MAEBranch.attach(net, "backbone")
        branch.calibrate(frames(8, seed=5))
        config = CONFIG.replace(norm_stats="calibrated", gate=gate)
        with StreamAdapter(net, branch, config=config) as adapter:
            for frame in frames(4):
                adapter.step(frame)
            return [net.layer.calls, len(net.layer.means), int(net.layer.passes), net.layer.memory.calls]

    assert run("calibrated") == run("none") == [4] * 4


def test_running_statistics_of_the_video_do_not_count_a_frame_twice():
    torch.manual_seed(3)
    net = WithHead(Counting())
    net.backbone.append(nn.BatchNorm2d(8))
    net.eval()
    with StreamAdapter(net, MAEBranch.attach(net, "backbone"), config=CONFIG.replace(norm_stats="ema")) as adapter:
        for frame in frames(4):
            adapter.step(frame)
        assert [net.layer.calls, int(net.layer.passes), net.layer.memory.calls] == [4, 4, 4]
        moved = net.backbone[-1].running_mean.clone()
        assert moved.any()
    assert not net.backbone[-1].running_mean.any()


# ---- damaged, or of another model


def damaged(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, "passes": {**state["passes"], **changes}}


def test_a_damaged_memory_is_refused_and_changes_nothing():
    with attached(Queue) as adapter:
        for frame in frames(2):
            adapter.step(frame)
        state = adapter.state_dict()
        one, two = frames(2, seed=4)
        attributes = state["passes"]["attributes"]
        bad: list[Any] = [
            {**state, "passes": None},
            {**state, "passes": [1]},
            damaged(state, hash="0" * 32),
            damaged(state, hash=None),
            damaged(state, attributes=None),
            damaged(state, attributes={}),
            damaged(state, attributes={0: 1}),
            damaged(state, buffers={"layer.frames": torch.zeros(1)}),
            damaged(state, more=1),
            damaged(state, attributes={**attributes, "layer.frames": {"deque": [], "most": 3}}),
            damaged(state, attributes={**attributes, "layer.frames": {"deque": [torch.zeros(1, device="meta")]}}),
            damaged(state, attributes={**attributes, "layer.frames": object()}),
            damaged(state, attributes={**attributes, "layer.forward": 3}),
        ]
        adapter.step(one)
        before = adapter.state_dict()
        for each in bad:
            with pytest.raises(CheckpointError):
                adapter.load_state_dict(each)
        assert same_bits(adapter.state_dict(), before)
        adapter.step(two)


class Other(nn.Module):
    """Has a layer, a number and an object where other models keep a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.calls, self.memory = nn.Identity(), "none", Memory()

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("layer", [Recurrent, Counting])
@pytest.mark.parametrize("other", [nn.Identity, Other])
def test_a_memory_of_another_model_is_refused_and_changes_nothing(layer, other):
    with attached(layer) as adapter:
        adapter.step(frames(1)[0])
        state = {name: value for name, value in adapter.state_dict().items() if name != "source"}
    with attached(other) as adapter:
        before = adapter.state_dict()
        if layer is Recurrent and other is nn.Identity:  # a first pass of this model might make it
            adapter.load_state_dict(state)
            return
        with pytest.raises(CheckpointError, match="go on over the model"):
            adapter.load_state_dict(state)
        assert same_bits(adapter.state_dict(), before)


def test_a_state_of_an_early_version_begins_with_the_memory_of_the_beginning():
    with attached(Recurrent) as adapter:
        wanted = adapter.step(frames(1)[0])
        state = {name: value for name, value in adapter.state_dict().items() if name != "passes"}
        for frame in frames(3):
            adapter.step(frame)
        adapter.load_state_dict({**state, "weights": attached(Recurrent).state_dict()["weights"]})
        assert adapter.branch.model.layer.before is None
        assert wanted.isfinite().all()


def test_a_named_tuple_is_undone_and_swapped_and_refused_in_a_file():
    kept = namedtuple("kept", "h c")

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state: Any = None

        def forward(self, x: Tensor) -> Tensor:
            h = x.detach() if self.state is None else self.state.h
            self.state = kept(0.5 * h + 0.5 * x.detach(), len(x))
            return x + self.state.h

    clips = [frames(3), frames(3, seed=6)]
    wanted = []
    for clip in clips:
        with attached(Cell) as adapter:
            wanted.append([adapter.step(frame) for frame in clip])
    with attached(Cell) as adapter:
        found, states = [[], []], [adapter.state, adapter.new_state()]
        for pair in zip(*clips, strict=True):
            for video, frame in enumerate(pair):
                adapter.swap(states[video])
                found[video].append(adapter.step(frame))
        assert same_bits(found, wanted)
        with pytest.raises(StateError, match=r"layer.state holds a .*kept"):
            adapter.state_dict()


def test_a_loop_in_inference_mode_keeps_the_memory_of_a_model_too():
    with attached(Recurrent) as adapter, torch.inference_mode():
        wanted = [adapter.step(frame) for frame in frames()]
        adapter.reset()
        for frame in frames(2):
            adapter.step(frame)
        state = read(adapter.state_dict())
        adapter.step(frames(1, seed=7)[0])
        adapter.load_state_dict(state)
        assert same_bits([adapter.step(frame) for frame in frames()[2:]], wanted[2:])

"""What a model's own passes keep of a video belongs to the stream: saved, loaded, undone, reset and swapped with it."""

from __future__ import annotations

import copy
import io
import itertools
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import same_bits
from memories import Counting, Memory, Observer, Recurrent, RunningScale, model
from tape import TapeRecorder
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.engine.graphs import GraphEngine
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


def test_a_frame_that_is_only_predicted_leaves_the_memory_alone_and_adapting_then_predicting_is_a_step():
    frames = [torch.randn(3, 32, 48) for _ in range(4)]
    net = model(Recurrent())
    with StreamAdapter(net, MAEBranch.attach(net, "0"), config=CONFIG) as adapter:
        wanted = [adapter.step(frame) for frame in frames]
        adapter.reset()
        found = []
        for frame in frames:
            adapter.predict(frames[-1])
            adapter.forward(frames[0][None])
            adapter.adapt(frame)
            adapter.predict(frames[-2].clone())
            found.append(adapter.predict(frame))
            adapter.predict(frame)
        assert same_bits(found, wanted)


def test_a_recording_engine_predicts_eagerly_where_a_module_around_the_model_of_the_branch_keeps_something(monkeypatch):
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x) * self.calls

    torch.manual_seed(1)
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), nn.Conv2d(8, 5, 1)).eval()
    frames, whole = [torch.randn(3, 32, 48) for _ in range(6)], Around(inner).eval()
    plain = copy.deepcopy(whole)
    with torch.no_grad():
        wanted = [plain(frame[None]) for frame in frames]
    monkeypatch.setattr("ttt_adapt.adapter.choose_engine", lambda step, _optimizer: GraphEngine(step, TapeRecorder()))
    with StreamAdapter(whole, MAEBranch.attach(inner, "0"), config=CONFIG.replace(lr=0.0, weight_decay=0.0)) as adapter:
        assert same_bits([adapter.step(frame) for frame in frames], wanted)


class Kept:
    """What a model keeps outside of its modules."""

    def __init__(self) -> None:
        self.before: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        mixed = x if self.before is None else 0.5 * x + 0.5 * self.before
        self.before = mixed.detach()
        return mixed


@dataclass(slots=True)
class Slim:
    before: Tensor | None = None


class Elsewhere(nn.Module):
    """Keeps the frame before in an object that `make` makes, and lets `call` use it."""

    def __init__(self, make: Callable[[], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.kept, self.call = make(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.kept, x)


def mixed_in(kept: Any, x: Tensor) -> Tensor:
    return Kept.__call__(kept, x)


def nested() -> Any:
    outer: Any = SimpleHolder()
    outer.inner = SimpleHolder()
    outer.inner.inner = SimpleHolder()
    outer.inner.inner.inner = Kept()
    return outer


class SimpleHolder:
    """Holds another object."""


HIDDEN = {
    "an object in a list": lambda: Elsewhere(lambda: [Kept(), Kept()], lambda kept, x: kept[1](x)),
    "an object in a dict": lambda: Elsewhere(lambda: {"a": Kept()}, lambda kept, x: kept["a"](x)),
    "a dataclass with slots": lambda: Elsewhere(Slim, mixed_in),
    "an object that can be called": lambda: Elsewhere(Kept, mixed_in),
    "an object four deep": lambda: Elsewhere(nested, lambda kept, x: kept.inner.inner.inner(x)),
    "a module in a plain list": lambda: Elsewhere(lambda: [Recurrent()], lambda kept, x: kept[0](x)),
    "a random generator": lambda: Elsewhere(
        lambda: torch.Generator().manual_seed(0), lambda kept, x: x + torch.randn(x.shape, generator=kept)
    ),
    "a counter": lambda: Elsewhere(itertools.count, lambda kept, x: x * (1 + 0.1 * next(kept))),
}


class KeyFrame(nn.Module):
    """Adds the features of every fifth pass to those that follow."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.calls, self.buffer = 0, buffer
        if buffer:
            self.register_buffer("key", torch.zeros(8, 1, 1))
        else:
            self.key = torch.zeros(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, self.calls = x + self.key, self.calls + 1
        if self.calls % 5 == 0:
            key = x.detach().mean((0, 2, 3))[:, None, None]
            self.key = self.key.copy_(key) if self.buffer else key
        return x


class NewCache(nn.Module):
    """Makes the object that it keeps its frames in with the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = SimpleHolder()
            self.cache.frames = []
        self.cache.frames.append(x.detach())
        return x + self.cache.frames[max(len(self.cache.frames) - 2, 0)]


class SometimesFails(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if float(x.detach()[0, 0, 0, 0]) == 7.0:
            raise RuntimeError("a bad frame")
        return out


MADE_LATE = {"a key in a buffer": lambda: KeyFrame(True), "a key in an attribute": lambda: KeyFrame(False)}


@pytest.mark.parametrize(
    ("place", "kind"),
    [(place, kind) for place in ("encoder", "head") for kind in [*HIDDEN, *MADE_LATE]]
    + [("head", "an object that is made anew")],  # in an encoder it is bound to the first size that it is examined with
)
def test_what_a_model_keeps_in_any_place_and_writes_at_any_time_belongs_to_its_video(kind, place):
    make = {**HIDDEN, **MADE_LATE, "an object that is made anew": NewCache}[kind]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return SometimesFails(model(make()) if place == "encoder" else WithHead(make())).eval()

    def plain(video: list[Tensor]) -> list[Tensor]:
        net = build()
        with torch.no_grad():
            return [net(frame[None]) for frame in video]

    def goes(step: Callable[[Tensor], Tensor], video: list[Tensor]) -> list[Tensor]:
        outputs = []
        for i, frame in enumerate(video):
            if i in (3, 6):
                with pytest.raises(RuntimeError, match="a bad frame"):
                    step(torch.cat([torch.full((3, 1, 48), 7.0), frame[:, 1:]], 1))
            outputs.append(step(frame))
        return outputs

    videos = [[torch.randn(3, 32, 48) for _ in range(8)] for _ in range(2)]
    wanted, net = [plain(video) for video in videos], build()
    encoder = "inner.0" if place == "encoder" else "inner.backbone"
    config = StreamConfig(window=2, batch_size=1, lr=0.0, weight_decay=0.0)
    with StreamAdapter(net, MAEBranch.attach(net, encoder), config=config) as adapter:
        for _ in range(2):
            assert same_bits(goes(adapter.step, videos[0]), wanted[0])
            adapter.reset()
        one, other = adapter.open_stream("one"), adapter.open_stream("other")
        found = [(one.step(a), other.step(b)) for a, b in zip(*videos, strict=True)]
        assert same_bits([list(each) for each in zip(*found, strict=True)], wanted)
    with torch.no_grad():
        assert same_bits([net(frame[None]) for frame in videos[0]], wanted[0])


def test_places_where_equal_values_are_put_at_every_pass_and_those_that_others_write_between_passes_stay():
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.scale = (0, 0), 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.size = tuple(1000 + n for n in x.shape)
            return x * self.scale

    net = model(Notes())
    with StreamAdapter(net, MAEBranch.attach(net, "0"), config=CONFIG) as adapter:
        for _ in range(4):
            adapter.step(torch.randn(3, 32, 48))
        net[0][2].scale = 2.0
        adapter.step(torch.randn(3, 32, 48))
        adapter.reset()
        assert net[0][2].scale == 2.0

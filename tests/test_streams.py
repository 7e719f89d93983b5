"""Many streams over one model: each is what an adapter of its own would be."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading

import pytest
import torch

import models as zoo
from conftest import left_as_it_was, same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.calibration.calibrate import calibrate
from ttt_adapt.errors import CheckpointError, ConfigError, FrameError, StateError
from ttt_adapt.objectives import PseudoLabel

SIZE = (32, 48)
FAST = {"window": 3, "batch_size": 2, "lr": 1e-2, "seed": 11}
PRESETS = {
    "online": StreamConfig.online(**FAST),
    "paper": StreamConfig.paper(**FAST),
    "no memory": StreamConfig.no_memory(batch_size=2),
    "ema": StreamConfig.online(norm_stats="ema", **FAST),
    "surprise": StreamConfig.online(gate="surprise", **FAST),
    "auto window": StreamConfig.online(**{**FAST, "window": "auto"}),
    "every": StreamConfig.online(every=2, **FAST),
    "norms": StreamConfig.online(adapt="norms", **FAST),
    "bias": StreamConfig.online(adapt="bias", **FAST),
    "last": StreamConfig.online(adapt="last:1", **FAST),
    "low rank": StreamConfig.online(adapt="lora:2", **FAST),
}


def clip(count: int, seed: int = 21, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(3, *SIZE, generator=generator)).clamp(-1.9, 1.9) for _ in range(count)]


def clips(count: int, frames: int = 4) -> list[list[torch.Tensor]]:
    """Videos in which usual frames and dark ones take turns."""
    videos = [clip(frames, seed) for seed in range(count)]
    return [
        [0.3 * frame - 1.0 if (seed + i) % 2 else frame for i, frame in enumerate(video)]
        for seed, video in enumerate(videos)
    ]


def model_for(config: StreamConfig):
    """A model on which the configuration finds something to adapt, and where its encoder ends; always the same one."""
    torch.manual_seed(9)
    if config.adapt[:4] in ("last", "lora"):
        return zoo.vit(), "norm"
    return settle_norms(zoo.TinySeg()), "backbone"


def attached(config: StreamConfig, **more) -> StreamAdapter:
    model, encoder = model_for(config)
    return StreamAdapter(model, MAEBranch.attach(model, encoder), config=config, **more)


def calibrated(**more) -> StreamAdapter:
    """A gated stream on a calibrated model, where some frames are usual and others are not."""
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone")
    branch.calibrate(clip(8))
    return StreamAdapter(model, branch, config=StreamConfig.online(gate="calibrated", **FAST), **more)


def forward_only(**more) -> StreamAdapter:
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    found = calibrate(model, clip(8))
    found = found.replace(rule=dataclasses.replace(found.rule, strength=0.5))
    return StreamAdapter(model, calibration=found, **more)


def teacher(**more) -> StreamAdapter:
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    objective = PseudoLabel(model, threshold=0.0, average=0.9)
    return StreamAdapter(model, objective, config=StreamConfig(**FAST), **more)


MAKERS = {name: lambda config=config, **more: attached(config, **more) for name, config in PRESETS.items()}
MAKERS |= {"calibrated with gate": calibrated, "without a branch": forward_only, "teacher": teacher}


def seen(stream, frame):
    """What a user sees of a step."""
    output = stream.step(frame)
    last = stream.last
    return output, last.losses, last.reason, last.frame_index, stream.window, stream.drift


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("limits", [{}, {"resident": 1}], ids=["resident", "parked"])
def test_interleaved_streams_are_adapters_of_their_own_bit_for_bit(make, limits):
    videos = clips(3)
    alone, shared = [make() for _ in videos], make(**limits)
    streams = [shared, shared.open_stream("a"), shared.open_stream("b")]
    for frames in zip(*videos, strict=True):
        for own, stream, frame in zip(alone, streams, frames, strict=True):
            assert same_bits(seen(stream, frame), seen(own, frame))
    for own, stream in zip(alone, streams, strict=True):
        assert same_bits(stream.state_dict(), own.state_dict())
        assert stream.drift == own.drift


@pytest.mark.parametrize("name", ["online", "low rank"])
def test_streams_of_two_threads_are_those_of_one(name):
    videos = clips(2, 8)
    alone, shared = [MAKERS[name]() for _ in videos], MAKERS[name]()
    streams = [shared.open_stream("a"), shared.open_stream("b")]
    wanted = [[own.step(frame) for frame in frames] for own, frames in zip(alone, videos, strict=True)]
    found: list[list[torch.Tensor]] = [[], []]

    def watch(i: int) -> None:
        found[i] += [streams[i].step(frame) for frame in videos[i]]

    threads = [threading.Thread(target=watch, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits(found, wanted)


def test_a_stream_that_steps_twice_copies_nothing_and_one_in_turn_copies_what_is_adapted(monkeypatch):
    shared = attached(PRESETS["norms"])
    a, b = shared.open_stream("a"), shared.open_stream("b")
    frames = clip(4)
    for stream in (a, b, a, b):
        stream.adapt(frames[0])
    copied: list[int] = []
    plain = torch._foreach_copy_

    def counted(places, values, *rest):
        copied.append(sum(place.numel() for place in places))
        return plain(places, values, *rest)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    b.predict(frames[1])
    assert copied == []
    a.predict(frames[1])
    weights = a.state_dict()["weights"]
    assert copied == [sum(tensor.numel() for tensor in weights.values())] * 2  # one leaves, one enters
    assert all(tensor.ndim == 1 for tensor in weights.values())


# ---- names, and what ends a stream


def test_a_name_is_open_once_and_free_again_after_close():
    adapter = attached(PRESETS["online"])
    first = adapter.open_stream("cam-3")
    adapter.open_stream("cam-4")
    assert adapter.streams == ["cam-3", "cam-4"]
    with pytest.raises(StateError, match="'cam-3' is open"):
        adapter.open_stream("cam-3")
    first.close()
    first.close()
    assert adapter.streams == ["cam-4"]
    assert adapter.open_stream("cam-3").last is None
    assert adapter.streams == ["cam-4", "cam-3"]


@pytest.mark.parametrize("name", ["", None, 3, b"cam"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="expected text"):
        attached(PRESETS["online"]).open_stream(name)


def test_a_closed_stream_refuses_everything_and_the_others_go_on():
    adapter, alone = attached(PRESETS["online"]), attached(PRESETS["online"])
    frames = clip(3)
    with adapter.open_stream("a") as stream:
        stream.step(frames[0])
        saved = stream.state_dict()
    calls = [
        lambda: stream.step(frames[0]), lambda: stream.adapt(frames[0]), lambda: stream.predict(frames[0]),
        lambda: stream.reset(), lambda: stream.state_dict(), lambda: stream.load_state_dict(saved),
        lambda: stream.last, lambda: stream.window, lambda: stream.drift,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StateError, match="'a' is closed"):
            call()
    assert same_bits([adapter.step(frame) for frame in frames], [alone.step(frame) for frame in frames])


def test_detaching_ends_all_streams_and_gives_back_the_source():
    model, encoder = model_for(PRESETS["ema"])
    with left_as_it_was(model):
        adapter = StreamAdapter(model, encoder=encoder, config=PRESETS["ema"])
        stream = adapter.open_stream("a")
        stream.step(clip(1)[0])
        adapter.detach()
    with pytest.raises(StateError):
        stream.step(clip(1)[0])
    with pytest.raises(StateError, match="detached"):
        adapter.open_stream("b")
    assert adapter.streams == []


def test_a_stream_keeps_its_model_while_the_adapter_is_out_of_sight():
    adapter, alone = attached(PRESETS["online"]), attached(PRESETS["online"])
    stream = adapter.open_stream("a")
    del adapter
    gc.collect()
    frames = clip(2)
    assert same_bits([stream.step(frame) for frame in frames], [alone.step(frame) for frame in frames])


def test_a_stream_can_be_neither_copied_nor_pickled():
    with pytest.raises(StateError, match="cannot be copied"):
        copy.deepcopy(attached(PRESETS["online"]).open_stream("a"))


# ---- what one stream does is nothing to another


def test_reset_and_load_of_one_stream_leave_the_others_alone():
    adapter, frames = attached(PRESETS["online"]), clip(4)
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    for frame in frames[:2]:
        a.step(frame)
        b.step(frame)
    before, saved = b.state_dict(), a.state_dict()
    a.reset()
    assert a.last is None
    assert same_bits(b.state_dict(), before)
    a.load_state_dict(saved)
    assert same_bits(b.state_dict(), before)
    assert same_bits([a.step(frame) for frame in frames[2:]], [b.step(frame) for frame in frames[2:]])


def test_a_state_goes_from_a_stream_to_an_adapter_of_its_own_and_back():
    shared, alone, frames = attached(PRESETS["online"]), attached(PRESETS["online"]), clip(4)
    stream = shared.open_stream("a")
    shared.step(frames[3])
    stream.step(frames[0])
    alone.load_state_dict(stream.state_dict())
    assert same_bits(alone.step(frames[1]), stream.step(frames[1]))
    stream.load_state_dict(alone.state_dict())
    assert same_bits(alone.step(frames[2]), stream.step(frames[2]))


def test_a_bad_frame_of_one_stream_changes_no_stream():
    adapter, frames = attached(PRESETS["online"]), clip(3)
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    a.step(frames[0])
    b.step(frames[1])
    before = a.state_dict(), b.state_dict()
    with pytest.raises(FrameError):
        a.step(torch.zeros(3, 64, 64))
    assert same_bits((a.state_dict(), b.state_dict()), before)
    b.step(torch.zeros(3, *SIZE))
    assert same_bits(a.state_dict(), before[0])


def test_streams_may_have_frames_of_different_sizes():
    adapter = attached(PRESETS["online"])
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    for _ in range(2):
        assert a.step(torch.rand(3, 32, 48)).shape[-2:] != b.step(torch.rand(3, 64, 64)).shape[-2:]


def test_weights_that_somebody_else_changes_are_carried_into_no_stream():
    adapter, frames = attached(PRESETS["online"]), clip(3)
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    a.step(frames[0])
    b.step(frames[0])
    weight = next(iter(adapter.branch.encoder_parameters().values()))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(StateError, match="changed by somebody else"):
        a.step(frames[1])
    with torch.no_grad():
        weight.copy_(kept)
    assert same_bits(a.step(frames[1]), b.step(frames[1]))


# ---- parking


@pytest.mark.parametrize("name", ["online", "ema", "auto window", "paper", "low rank"])
def test_streams_that_are_parked_in_files_come_back_bit_for_bit(tmp_path, name):
    videos = clips(4, 3)
    alone, shared = [MAKERS[name]() for _ in videos], MAKERS[name](resident=2, park=tmp_path)
    streams = [shared.open_stream(f"cam/{i}") for i in range(len(videos))]
    for frames in zip(*videos, strict=True):
        for own, stream, frame in zip(alone, streams, frames, strict=True):
            assert same_bits(seen(stream, frame), seen(own, frame))
    assert [stream.parked for stream in streams] == [True, True, False, False]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    streams[0].close()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    shared.detach()
    del shared, streams, stream
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_stream_that_was_idle_the_longest_is_parked_and_the_adapters_own_never():
    adapter, frame = attached(PRESETS["online"], resident=2), clip(1)[0]
    a, b, c = (adapter.open_stream(name) for name in "abc")
    for stream in (a, b, a, c):
        stream.step(frame)
    assert [stream.parked for stream in (a, b, c)] == [False, True, False]
    adapter.step(frame)
    assert [stream.parked for stream in (a, b, c)] == [False, True, False]
    assert b.last.frame_index == 0
    b.predict(frame)
    assert [stream.parked for stream in (a, b, c)] == [True, False, False]


def test_a_learning_rate_of_the_users_own_outlives_parking(tmp_path):
    config = PRESETS["paper"]  # it restarts the optimizer, which puts the settings back

    def run(**limits):
        made = []

        def optimizer(groups):
            made.append(torch.optim.SGD(groups))
            return made[-1]

        adapter = attached(config, optimizer=optimizer, **limits)
        a, b = adapter.open_stream("a"), adapter.open_stream("b")
        outputs = []
        for frame in clip(3):
            outputs += [a.step(frame), b.step(2.0 * frame)]
        return outputs

    assert same_bits(run(resident=1, park=tmp_path), run())


def test_a_parked_file_that_is_gone_is_said_and_the_other_streams_go_on(tmp_path):
    adapter, frame = attached(PRESETS["online"], resident=1, park=tmp_path), clip(1)[0]
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    a.step(frame)
    b.step(frame)
    next(tmp_path.rglob("*.safetensors")).unlink()
    before = b.state_dict()
    with pytest.raises(CheckpointError, match="cannot be read"):
        a.step(frame)
    assert same_bits(b.state_dict(), before)
    a.close()
    assert adapter.open_stream("a").step(frame) is not None


@pytest.mark.parametrize("limits", [{"resident": 0}, {"resident": True}, {"resident": 1.5}, {"park": 3}], ids=str)
def test_limits_that_make_no_sense_are_refused_and_the_model_stays_free(limits):
    model, encoder = model_for(PRESETS["online"])
    with left_as_it_was(model):
        with pytest.raises(ConfigError):
            StreamAdapter(model, encoder=encoder, **limits)
        StreamAdapter(model, encoder=encoder).detach()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match='expected "cpu", or a folder'):
        attached(PRESETS["online"], resident=1, park=tmp_path / "file")


def test_no_other_stream_can_be_called_inside_of_the_statistics_of_one():
    adapter = attached(PRESETS["ema"])
    one, two = adapter.open_stream("one"), adapter.open_stream("two")
    with one.statistics():
        one.predict(clip(1)[0])
        with pytest.raises(StateError, match=r"inside of `with stream\.statistics\(\)`"):
            two.predict(clip(1)[0])
    two.predict(clip(1)[0])
    adapter.detach()
    with pytest.raises(StateError, match="detached"), adapter.statistics():
        pass

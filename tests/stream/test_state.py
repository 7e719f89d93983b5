"""One video is a thing: what belongs to it is reset, saved, loaded, undone and swapped together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import models as zoo
from conftest import same_bits, settle_norms
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, MemoryLimitError, StateError
from ttt_adapt.objectives import PseudoLabel
from ttt_adapt.stream.state import StreamState
from ttt_adapt.stream.state_part import Part

SIZE = (32, 48)
CONFIG = StreamConfig(window=3, batch_size=2, lr=1e-2, source_pull=0.1, seed=11)


def clip(count: int, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *SIZE, generator=generator) for _ in range(count)]


def attached(config: StreamConfig = CONFIG, objective=None, **more) -> StreamAdapter:
    """An adapter on a model and an objective that are the same in every call."""
    torch.manual_seed(9)
    model = settle_norms(zoo.TinySeg())
    branch = MAEBranch.attach(model, "backbone") if objective is None else objective(model)
    return StreamAdapter(model, branch, config=config, **more)


# ---- a field that somebody adds


class Smiles(Part):
    """Counts the gradient steps of a video, in a way that a failed step shows."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def state_dict(self) -> int:
        return self.count

    def prepare_load(self, saved: Any) -> Callable[[], None]:
        if not isinstance(saved, int):
            raise CheckpointError(f"smiles are {saved!r}")
        return lambda: self._put_back(saved)

    def mark(self) -> Callable[[], None]:
        count = self.count
        return lambda: self._put_back(count)

    def _put_back(self, count: int) -> None:
        self.count = count


@dataclass(eq=False)
class SmilingState(StreamState):
    smiles: Smiles = field(default_factory=Smiles)


@pytest.fixture
def smiling(monkeypatch) -> StreamAdapter:
    monkeypatch.setattr("ttt_adapt.adapter.StreamState", SmilingState)
    adapter = attached()
    plain = adapter.branch.loss

    def loss(images, generator=None):
        adapter.state.smiles.count += 1
        return plain(images, generator=generator)

    adapter.branch.loss = loss
    return adapter


def test_a_field_that_is_added_is_reset_saved_and_loaded(smiling):
    for frame in clip(3):
        smiling.step(frame)
    saved = smiling.state_dict()
    assert saved["smiles"] == smiling.state.smiles.count == 3
    smiling.reset()
    assert smiling.state.smiles.count == 0
    smiling.load_state_dict(saved)
    assert smiling.state.smiles.count == 3


def test_a_field_that_is_added_is_undone_after_a_failed_step(smiling):
    frames, plain = clip(3), smiling.branch.loss
    smiling.step(frames[0])

    def burst(*given, **named):
        plain(*given, **named)
        raise KeyError("burst")

    smiling.branch.loss = burst
    with pytest.raises(KeyError, match="burst"):
        smiling.step(frames[1])
    assert smiling.state.smiles.count == 1


def test_a_field_that_is_added_is_required_and_checked_before_anything_changes(smiling):
    smiling.step(clip(1)[0])
    before = smiling.state_dict()
    with pytest.raises(CheckpointError, match="smiles missing"):
        smiling.load_state_dict({name: value for name, value in before.items() if name != "smiles"})
    with pytest.raises(CheckpointError, match="smiles are 'wide'"):
        smiling.load_state_dict({**before, "progress": {"frame_index": 7}, "smiles": "wide"})
    assert same_bits(smiling.state_dict(), before)


def test_a_field_that_is_added_belongs_to_each_video(smiling):
    smiling.step(clip(1)[0])
    first = smiling.swap(smiling.new_state())
    assert (first.smiles.count, smiling.state.smiles.count) == (1, 0)


# ---- several videos over one model


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"carry_weights": False}, {"norm_stats": "ema"}, {"norm_stats": "blend"}, {"gate": "surprise"},
        {"window": "auto"}, {"every": 2}, {"restart_optimizer": True}, {"iterations": 2}, {"drop_path": True},
    ],
    ids=str,
)  # fmt: skip
def test_two_videos_that_take_turns_over_one_model_are_two_adapters_bit_for_bit(changes):
    config = CONFIG.replace(**changes)
    clips = [clip(6), clip(6, seed=5)]
    alone = [attached(config) for _ in clips]
    shared = attached(config)
    addresses = [tensor.data_ptr() for tensor in shared.branch.model.state_dict().values()]
    states = [shared.state, shared.new_state()]
    for frames in zip(*clips, strict=True):
        for adapter, state, frame in zip(alone, states, frames, strict=True):
            shared.swap(state)
            assert same_bits(shared.step(frame), adapter.step(frame))
            assert shared.last.losses == adapter.last.losses
            assert shared.last.frame_index == adapter.last.frame_index
            assert shared.window == adapter.window
    for adapter, state in zip(alone, states, strict=True):
        shared.swap(state)
        assert same_bits(shared.state_dict(), adapter.state_dict())
    assert [tensor.data_ptr() for tensor in shared.branch.model.state_dict().values()] == addresses


def test_what_an_objective_remembers_belongs_to_the_video_too():
    def teacher(model):
        return PseudoLabel(model, threshold=0.0, average=0.9)

    clips = [clip(4), clip(4, seed=5)]
    alone = [attached(objective=teacher) for _ in clips]
    shared = attached(objective=teacher)
    states = [shared.state, shared.new_state()]
    for frames in zip(*clips, strict=True):
        for adapter, state, frame in zip(alone, states, frames, strict=True):
            shared.swap(state)
            assert same_bits(shared.step(frame), adapter.step(frame))


def test_a_video_that_waits_is_reset_saved_and_loaded_without_the_model():
    shared, frames = attached(), clip(4)
    waiting = shared.new_state()
    for frame in frames[:2]:
        shared.step(frame)
    now = shared.state_dict()
    waiting.load_state_dict(shared.state.state_dict())
    assert same_bits(waiting.state_dict(), shared.state.state_dict())
    waiting.reset()
    assert same_bits(shared.state_dict(), now)
    shared.swap(waiting)
    assert same_bits([shared.step(frame) for frame in frames], [*map(attached().step, frames)])


def test_detaching_gives_back_the_source_weights_whichever_video_is_in_the_model():
    model = settle_norms(zoo.TinySeg())
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = StreamAdapter(model, encoder="backbone", config=CONFIG)
    adapter.step(clip(1)[0])
    adapter.swap(adapter.new_state())
    adapter.step(clip(1, seed=3)[0])
    adapter.detach()
    assert same_bits(dict(model.state_dict()), source)


def test_a_state_of_another_adapter_is_refused_and_changes_nothing():
    adapter, other = attached(), attached()
    adapter.step(clip(1)[0])
    before = adapter.state_dict()
    for state in (other.state, other.new_state(), None, []):
        with pytest.raises(StateError, match="no state of this adapter"):
            adapter.swap(state)
    assert same_bits(adapter.state_dict(), before)


def test_states_of_a_detached_adapter_touch_the_model_no_more():
    adapter = attached()
    branch, current, waiting = adapter.branch, adapter.state, adapter.new_state()
    adapter.step(clip(1)[0])
    saved = current.state_dict()
    adapter.detach()
    model = {name: tensor.clone() for name, tensor in branch.model.state_dict().items()}
    again = StreamAdapter(branch.model, branch, config=CONFIG)
    for state in (current, waiting):
        with pytest.raises(StateError, match="no state of this adapter"):
            again.swap(state)
        with pytest.raises(StateError, match="detached"):
            state.reset()
        with pytest.raises(StateError, match="detached"):
            state.load_state_dict(saved)
    assert same_bits(dict(branch.model.state_dict()), model)


def test_a_video_that_waits_pulls_no_weights_of_the_one_in_the_model():
    adapter = attached()
    waiting = adapter.new_state()
    adapter.step(clip(1)[0])
    before = adapter.state_dict()
    with pytest.raises(StateError, match="not in the model"):
        waiting.weights.pull(1.0)
    assert same_bits(adapter.state_dict(), before)


@pytest.mark.parametrize("changes", [{"gate": "surprise"}, {"window": "auto"}, {}], ids=str)
def test_a_frame_that_cannot_be_committed_is_in_no_part_of_the_state(monkeypatch, changes):
    adapter, frames = attached(CONFIG.replace(**changes)), clip(5)
    for frame in frames[:4]:
        adapter.step(frame)
    before, last = adapter.state_dict(), adapter.last
    with monkeypatch.context() as patch:
        patch.setattr("ttt_adapt.sharing.frame.StepReport", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapter.step(frames[4])
    after = adapter.state_dict()
    for name in ("window", "random", "gate", "auto", "progress"):
        assert same_bits(after[name], before[name]), name
    assert adapter.last is last


def test_a_load_that_runs_out_of_memory_changes_nothing(monkeypatch):
    adapter, other = attached(), attached()
    for frame in clip(2):
        adapter.step(frame)
    saved, before = adapter.state_dict(), other.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(MemoryLimitError):
            other.load_state_dict(saved)
    assert same_bits(other.state_dict(), before)


# ---- states that an earlier version saved


def as_format_0(state: dict[str, Any]) -> dict[str, Any]:
    """A state in the layout that the version without format numbers wrote: written out, key by key."""
    return {
        "config": {
            "window": 3, "batch_size": 2, "iterations": 1, "carry_weights": True, "source_pull": 0.1,
            "restart_optimizer": False, "lr": 0.01, "encoder_lr_scale": 1.0, "weight_decay": 0.05, "grad_clip": None,
            "crop_size": None, "micro_batch": None, "grad_checkpointing": False, "precision": "fp32",
            "norm_stats": "frozen", "norm_momentum": None, "drop_path": False, "engine": "auto", "deferred": False,
            "every": 1, "gate": "none", "seed": 11,
        },
        "setting": {
            "objective": "MAEBranch", "masking": "pixels", "patch_size": 16, "mask_ratio": 0.8, "loss_on": "masked",
            "norm_pix_loss": False, "preprocess": "Normalize", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
            "size": None,
        },
        "weights": state["weights"],
        "optimizer": {"kind": "FusedAdamW", "state": state["optimizer"]["state"]},
        "window": {"frames": state["window"]["frames"], "seen": state["window"]["seen"]},
        "random": state["random"],
        "gate": [],
        "auto": None,
        "frame_index": state["window"]["seen"],
    }  # fmt: skip


def old_stream(config: StreamConfig = CONFIG) -> StreamAdapter:
    return attached(config, preprocess=Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))


def bytes_clip(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8))


def test_a_state_without_a_format_number_goes_on_with_the_same_bits(tmp_path):
    adapter, frames = old_stream(), bytes_clip(7)
    for frame in frames[:4]:
        adapter.step(frame)
    torch.save(as_format_0(adapter.state_dict()), tmp_path / "old.pt")
    expected = [adapter.step(frame) for frame in frames[4:]]
    other = old_stream()
    other.load_state_dict(torch.load(tmp_path / "old.pt", weights_only=True))
    assert same_bits([other.step(frame) for frame in frames[4:]], expected)
    assert other.last.frame_index == 6


def test_a_state_that_was_saved_in_the_deferred_order_is_refused_with_its_format_and_the_way_on():
    adapter = old_stream()
    adapter.step(bytes_clip(1)[0])
    before = adapter.state_dict()
    old = as_format_0(before)
    with pytest.raises(CheckpointError, match=r"format 0.*deferred=True.*call predict\(frame\) before adapt\(frame\)"):
        adapter.load_state_dict({**old, "config": {**old["config"], "deferred": True}})
    assert same_bits(adapter.state_dict(), before)


@pytest.mark.parametrize("number", [2, -1, "1", None])
def test_a_state_of_a_format_that_is_not_known_is_refused_with_its_number(number):
    adapter = attached()
    state = adapter.state_dict()
    assert state["format"] == 1
    with pytest.raises(CheckpointError, match=f"has format {number!r}, and this version.*reads formats up to 1"):
        adapter.load_state_dict({**state, "format": number})

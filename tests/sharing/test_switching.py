"""Streams take turns in a model; what fails while they are exchanged costs neither of them a bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memories
from conftest import same_bits
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import MemoryLimitError, StateError
from ttt_adapt.model.model_memory import ModelMemory
from ttt_adapt.stream.adapted_weights import AdaptedWeights
from ttt_adapt.stream.source import SourceWeights

CONFIG = StreamConfig(window=2, batch_size=1, lr=1e-2, seed=5)


def clip(count: int, seed: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 32, 48, generator=generator) for _ in range(count)]


def attached(**more) -> StreamAdapter:
    """A stream over a model that keeps features of the frame before; always the same one."""
    model = memories.model(memories.Recurrent())
    return StreamAdapter(model, MAEBranch.attach(model, "0"), config=CONFIG, **more)


def two_streams(frames, **more):
    """An adapter, and two streams that have seen different frames; the second one is in the model."""
    adapter = attached(**more)
    a, b = adapter.open_stream("a"), adapter.open_stream("b")
    for frame in frames:
        a.step(frame)
        b.step(-frame)
    return adapter, a, b


def fails_once(monkeypatch, owner, name: str, error: BaseException, call: int = 1) -> None:
    """From now on, the call with this number raises an error, and all later ones are as before."""
    plain, calls = getattr(owner, name), []

    def burst(*given, **named):
        calls.append(name)
        if len(calls) == call:
            raise error
        return plain(*given, **named)

    monkeypatch.setattr(owner, name, burst)


FAULTS = {
    "copying the memory": (ModelMemory, "values", 1),
    "writing the memory": (ModelMemory, "write", 1),
    "copying the weights": (torch, "_foreach_copy_", 1),
    "writing the weights": (torch, "_foreach_copy_", 2),
    "after the weights": (torch, "clear_autocast_cache", 1),
}
ERRORS = {
    "interrupted": (KeyboardInterrupt(), KeyboardInterrupt),
    "out of memory": (torch.OutOfMemoryError("out of memory"), MemoryLimitError),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(("error", "seen"), ERRORS.values(), ids=ERRORS)
def test_a_switch_that_fails_changes_no_stream(monkeypatch, fault, error, seen):
    frames = clip(4)
    _, a, b = two_streams(frames[:2])
    _, calm_a, calm_b = two_streams(frames[:2])
    owner, name, call = fault
    fails_once(monkeypatch, owner, name, error, call)
    with pytest.raises(seen):
        a.step(frames[2])
    for turn in frames[2:]:
        assert same_bits(b.step(-turn), calm_b.step(-turn))
        assert same_bits(a.step(turn), calm_a.step(turn))
    assert same_bits(b.state_dict(), calm_b.state_dict())
    assert same_bits(a.state_dict(), calm_a.state_dict())


def test_a_switch_whose_undo_fails_too_is_undone_before_the_next_call(monkeypatch):
    frames = clip(3)
    _, a, b = two_streams(frames[:2])
    _, calm_a, calm_b = two_streams(frames[:2])

    def burst(*_given):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(ModelMemory, "write", burst)
        with pytest.raises(MemoryLimitError):
            a.step(frames[2])
    assert same_bits(b.step(-frames[2]), calm_b.step(-frames[2]))
    assert same_bits(a.step(frames[2]), calm_a.step(frames[2]))


def test_weights_that_are_not_in_the_model_cannot_leave_it():
    weight = nn.Parameter(torch.zeros(3))
    weights = AdaptedWeights({"w": weight}, SourceWeights({"w": weight}))
    weights.leave()
    with pytest.raises(StateError, match="not in the model"):
        weights.leave()


def test_detach_keeps_the_weights_of_the_adapters_own_stream_whoever_was_called_last():
    frames = clip(2)
    shared, alone = attached(), attached()
    shared.step(frames[0])
    alone.step(frames[0])
    shared.open_stream("a").step(frames[1])
    shared.open_stream("b").predict(frames[1])
    assert same_bits(shared.detach(keep_adapted=True).state_dict(), alone.detach(keep_adapted=True).state_dict())

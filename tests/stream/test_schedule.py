"""The surprise gate, alone and in the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import models as zoo
from conftest import same_bits
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import ConfigError
from ttt_adapt.stream.schedule import SurpriseGate

SIZE = (32, 48)
CONFIG = StreamConfig(window=2, batch_size=2, lr=1e-2, gate="surprise", seed=3)


def clip(count: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, *SIZE, generator=generator) * (1.0 + 2.0 * (t % 5 == 4)) for t in range(count)]


def attached(config: StreamConfig = CONFIG) -> StreamAdapter:
    torch.manual_seed(9)
    model = zoo.PlainSeg()
    return StreamAdapter(model, MAEBranch.attach(model, "backbone"), config=config)


def test_the_gate_opens_above_mean_plus_deviation_of_the_last_fifty():
    gate, losses = SurpriseGate(), np.random.default_rng(0).gamma(2.0, size=200).tolist()
    opened = 0
    for t, loss in enumerate(losses):
        past = losses[max(t - 50, 0) : t]
        expected = t < 2 or loss > np.mean(past) + np.std(past)
        assert gate.is_open(loss) == expected
        opened += expected
        gate.record(loss)
    assert gate.state_dict() == losses[-50:]
    assert 10 < opened < 60


def test_a_loss_that_is_not_finite_is_no_measure_of_surprise():
    gate = SurpriseGate([1.0, 2.0])
    gate.record(float("nan"))
    gate.record(float("inf"))
    assert gate.state_dict() == [1.0, 2.0]


def test_a_shut_gate_leaves_weights_and_optimizer_alone_and_says_so():
    adapter = attached()
    shut = 0
    history = []
    for frame in clip():
        before = adapter.state_dict()
        report = adapter.adapt(frame)
        surprise = len(history) < 2 or report.losses[0] > np.mean(history) + np.std(history)
        assert report.adapted == surprise
        assert report.reason == ("" if surprise else "gate")
        history.append(report.losses[0])
        after = adapter.state_dict()
        if not surprise:
            shut += 1
            assert same_bits(before["weights"], after["weights"])
            assert same_bits(before["optimizer"], after["optimizer"])
    assert 3 < shut < 10


def test_the_first_loss_of_a_frame_decides_for_all_its_iterations():
    adapter = attached(CONFIG.replace(iterations=3))
    counts = {(len(report.losses), report.adapted) for report in map(adapter.adapt, clip())}
    assert counts == {(3, True), (1, False)}


def test_while_the_gate_is_shut_nothing_is_pulled_and_no_gradient_is_taken(monkeypatch):
    adapter = attached(CONFIG.replace(source_pull=0.5))
    taken = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: taken.append(1) or grad(*args, **kwargs))
    source = adapter.state_dict()["weights"]
    shut = 0
    for frame in clip():
        before, count = adapter.state_dict()["weights"], len(taken)
        if not adapter.adapt(frame).adapted:
            shut += 1
            assert len(taken) == count
            assert same_bits(adapter.state_dict()["weights"], before)
            assert not same_bits(before, source)
    assert shut > 3


def test_reset_forgets_the_losses_and_resume_is_exact():
    adapter = attached()
    whole = []
    for t, frame in enumerate(clip()):
        if t == 7:
            state = adapter.state_dict()
        whole.append((adapter.step(frame), adapter.last.losses, adapter.last.reason))
    assert len(state["gate"]) == 7
    adapter.reset()
    assert adapter.state_dict()["gate"] == []
    again = [(adapter.step(frame), adapter.last.losses, adapter.last.reason) for frame in clip()]
    assert same_bits(again, whole)
    other = attached()
    other.load_state_dict(state)
    rest = [(other.step(frame), other.last.losses, other.last.reason) for frame in clip()[7:]]
    assert same_bits(rest, whole[7:])


def test_a_step_that_fails_is_no_entry_in_the_gate(monkeypatch):
    adapter = attached()
    adapter.adapt(clip()[0])
    monkeypatch.setattr(
        adapter.state.optimizer.optimizer, "step", lambda: (_ for _ in ()).throw(RuntimeError("broken"))
    )
    with pytest.raises(RuntimeError, match="broken"):
        adapter.adapt(clip()[1])
    assert len(adapter.state_dict()["gate"]) == 1


def test_an_unknown_gate_is_refused():
    with pytest.raises(ConfigError, match="gate is 'open'"):
        StreamConfig(gate="open")


def test_without_carried_weights_the_gate_looks_at_the_source_model_on_every_frame():
    adapter = attached(CONFIG.replace(window=1, carry_weights=False))
    source, seen = adapter.state.state_dict()["weights"], []
    plain = adapter.branch.loss  # the gate takes it without a gradient, the step with one

    def watched(images, generator=None):
        if not torch.is_grad_enabled():
            seen.append(same_bits(adapter.state.state_dict()["weights"], source))
        return plain(images, generator=generator)

    adapter.branch.loss = watched
    reports = [adapter.adapt(frame) for frame in clip()]
    assert any(report.adapted for report in reports)
    assert seen == [True] * len(reports)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_gate_takes_a_batch_in_the_same_parts_as_the_gradient_step(micro_batch):
    whole, parted = (attached(CONFIG.replace(batch_size=4, micro_batch=size)) for size in (None, micro_batch))
    sizes = []
    parted.branch.model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    for frame in clip(3):
        assert parted.adapt(frame).losses == pytest.approx(whole.adapt(frame).losses, rel=1e-4)
        surprises = parted.state.gate.state_dict()
        assert surprises == pytest.approx(whole.state.gate.state_dict(), rel=1e-4)
    assert max(sizes) == micro_batch

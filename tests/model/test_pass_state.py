"""Passes that are no predictions leave buffers and the memory of a model alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import same_bits
from memories import Counting, Observer, Recurrent, RunningScale, model
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig, calibrate
from ttt_adapt.model.pass_state import PassState
from ttt_adapt.objectives import PseudoLabel, Rotation

CONFIG = StreamConfig(window=2, batch_size=2, lr=0.0, weight_decay=0.0)


def memory_of(net: nn.Module) -> list:
    """All that the layers above keep, as plain values."""
    kept = [(name, buffer.tolist()) for name, buffer in net.named_buffers()]
    layer = net[0][2]
    plain = {name: repr(value) for name, value in vars(layer).items() if not name.startswith("_")}
    inner = vars(layer.memory) if isinstance(layer, Counting) else {}
    return [*kept, {name: value for name, value in plain.items() if name != "memory"}, repr(inner)]


LAYERS = pytest.mark.parametrize("make", [Observer, RunningScale, Recurrent, Counting])


@LAYERS
@pytest.mark.parametrize("attach", [MAEBranch.attach, Rotation.attach])
def test_attaching_and_a_loss_with_its_backward_pass_leave_the_memory_of_a_model_alone(make, attach):
    net = model(make())
    before, objects = memory_of(net), {id(buffer) for buffer in net.buffers()}
    branch = attach(net, "0")
    assert memory_of(net) == before
    for mode in (False, True):
        net.train(mode)
        for _ in range(2):
            branch.loss(torch.randn(2, 3, 32, 48)).backward()
    net.eval()
    assert memory_of(net) == before
    assert {id(buffer) for buffer in net.buffers()} == objects


@LAYERS
def test_a_stream_at_lr_zero_predicts_what_the_plain_model_does_and_gives_it_back_as_it_was(make):
    net = model(make())
    frames = [torch.randn(3, 32, 48) for _ in range(4)]
    plain = copy.deepcopy(net)
    with torch.no_grad():
        wanted = [plain(frame[None]) for frame in frames]
    before = memory_of(net)
    for attach in (MAEBranch.attach, lambda m, _: PseudoLabel(m, threshold=0.0)):
        with StreamAdapter(net, attach(net, "0"), config=CONFIG) as adapter:
            assert same_bits([adapter.step(frame) for frame in frames], wanted)
            adapter.reset()  # a new video
            assert same_bits([adapter.step(frame) for frame in frames], wanted)
        assert memory_of(net) == before


@LAYERS
def test_what_a_model_keeps_of_a_video_stays_with_that_video_in_a_swap(make):
    frames = [[torch.randn(3, 32, 48) for _ in range(3)] for _ in range(2)]
    net = model(make())
    before = memory_of(net)
    with StreamAdapter(net, MAEBranch.attach(net, "0"), config=CONFIG) as adapter:
        wanted = []
        for video in frames:
            adapter.reset()
            wanted.append([adapter.step(frame) for frame in video])
        adapter.reset()
        found, other = [[], []], adapter.new_state()
        for pair in zip(*frames, strict=True):
            for video, frame in enumerate(pair):
                found[video].append(adapter.step(frame))
                other = adapter.swap(other)
        assert same_bits(found, wanted)
    assert memory_of(net) == before


@LAYERS
def test_calibrating_leaves_the_memory_of_a_model_alone(make):
    net = model(make())
    before = memory_of(net)
    stills = list(np.random.default_rng(0).integers(0, 256, (16, 32, 48, 3), dtype=np.uint8))
    calibrate(net, stills, branch=MAEBranch.attach(net, "0"), preprocess=Normalize(), drifts="night:3")
    assert memory_of(net) == before


def test_a_memory_that_takes_the_size_of_the_batch_begins_each_masked_pass_as_it_was_when_the_branch_came():
    net = model(Recurrent())
    branch = MAEBranch.attach(net, "0")
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        wanted = branch.loss(images, generator=torch.Generator().manual_seed(0))
        net(images[:1, :, :16])  # of another batch and another size
        kept = net[0][2].before
        found = branch.loss(images, generator=torch.Generator().manual_seed(0))
    assert same_bits(found, wanted)
    assert net[0][2].before is kept


def test_layers_that_a_model_makes_in_its_first_pass_stay():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: nn.Module | None = None
            self.ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.inner, self.ready = nn.Conv2d(8, 8, 1), True
            return self.inner(x)

    net = model(Late())
    with PassState(net).kept(), torch.no_grad():
        expected = net(torch.ones(1, 3, 32, 48))
    assert same_bits(net(torch.ones(1, 3, 32, 48)).detach(), expected)


def test_a_branch_on_a_model_with_a_memory_can_be_copied_and_pickled():
    net = model(Counting())
    branch = MAEBranch.attach(net, "0")
    for twin, other in (copy.deepcopy((net, branch)), pickle.loads(pickle.dumps((net, branch)))):
        before = memory_of(twin)
        other.loss(torch.randn(1, 3, 32, 48))
        assert memory_of(twin) == before
    assert branch.pass_state.changing

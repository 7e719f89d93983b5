"""Kinds of damage that a saved stream may have: each is refused by the library, and the stream stays as it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import models as zoo
from conftest import same_bits, settle_norms
from ttt_adapt import MAEBranch, StreamAdapter, StreamConfig
from ttt_adapt.errors import CheckpointError, TTTAdaptError

SIZE = (64, 64)


@pytest.fixture(scope="module")
def stream():
    torch.manual_seed(0)
    model = settle_norms(zoo.resnet())
    branch = MAEBranch.attach(model, patch_size=16)
    with StreamAdapter(model, branch, config=StreamConfig(window=2, batch_size=1, lr=1e-3)) as adapter:
        for x in torch.randn(2, 3, *SIZE):
            adapter.step(x)
        yield adapter


def nested(like: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([like, like])


def endless(like: torch.Tensor) -> torch.Tensor:
    """A tensor of a terabyte that takes no room."""
    return torch.zeros((), dtype=like.dtype).expand(2**40)


def array(like: torch.Tensor) -> np.ndarray:
    return like.numpy()


PLACES = {
    "a weight": lambda state: (state["weights"], next(iter(state["weights"]))),
    "a moment": lambda state: (state["optimizer"]["state"]["state"][0], "exp_avg"),
    "a count": lambda state: (state["optimizer"]["state"]["state"][0], "step"),
    "the window": lambda state: (state["window"], "frames"),
    "the random state": lambda state: (state, "random"),
}


@pytest.mark.parametrize("damage", [nested, endless, array])
@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_of_another_make_is_refused_before_memory_is_taken_for_it(stream, place, damage):
    before = stream.state_dict()
    state = copy.deepcopy(before)
    around, name = PLACES[place](state)
    around[name] = damage(around[name])
    with pytest.raises(CheckpointError):
        stream.load_state_dict(state)
    assert same_bits(stream.state_dict(), before)


NUMBERS = {
    "the parameters of a group": lambda state: (state["optimizer"]["state"]["param_groups"][0], "params"),
    "a rate": lambda state: (state["optimizer"]["state"]["param_groups"][0], "lr"),
    "the name of a group": lambda state: (state["optimizer"]["state"]["param_groups"][0], "name"),
    "the count of the window": lambda state: (state["window"], "seen"),
    "the position": lambda state: (state["progress"], "frame_index"),
    "a setting": lambda state: (state["setting"], "patch_size"),
    "the configuration": lambda state: (state["config"], "window"),
    "the kind of optimizer": lambda state: (state["optimizer"], "kind"),
    "the hash of the source": lambda state: (state["source"], "model"),
    "the format": lambda state: (state, "format"),
}


@pytest.mark.parametrize("damage", [torch.zeros(3), np.zeros(3)], ids=["tensor", "array"])
@pytest.mark.parametrize("place", NUMBERS)
def test_what_compares_by_elements_is_refused_where_one_value_is_expected(stream, place, damage):
    before = stream.state_dict()
    state = copy.deepcopy(before)
    around, name = NUMBERS[place](state)
    around[name] = damage
    with pytest.raises(TTTAdaptError):
        stream.load_state_dict(state)
    assert same_bits(stream.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 1e6), ("lr", 2e-3), ("weight_decay", 50.0), ("betas", (0.0, 0.999)), ("eps", 1e9)]
)
def test_a_state_with_other_settings_of_the_optimizer_is_refused_by_their_name(stream, name, value):
    before = stream.state_dict()
    state = copy.deepcopy(before)
    for group in state["optimizer"]["state"]["param_groups"]:
        group[name] = value
    with pytest.raises(CheckpointError, match=f"as {name} in its group"):
        stream.load_state_dict(state)
    assert same_bits(stream.state_dict(), before)


class Halving(torch.optim.SGD):
    """Halves its rate in every step."""

    def step(self, closure=None):
        done = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5
        return done


def scheduled(groups):
    """An optimizer that came with a schedule, which has already changed its rate when a state is saved."""
    optimizer = torch.optim.SGD(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    return optimizer


@pytest.mark.parametrize("make", [Halving, scheduled, None])
def test_a_rate_that_was_changed_on_the_way_goes_on_after_a_load(make):
    torch.manual_seed(0)
    model = settle_norms(zoo.TinySeg())
    config = StreamConfig(window=2, batch_size=1, lr=1e-3)
    with StreamAdapter(model, encoder="backbone", config=config, optimizer=make) as adapter:
        frames = torch.randn(3, 3, *SIZE)
        adapter.step(frames[0])
        groups = adapter.state.optimizer.optimizer.param_groups
        if make is not Halving:
            groups[0]["lr"] *= 0.25
        state = adapter.state_dict()
        rate = groups[0]["lr"]
        expected = [adapter.step(x) for x in frames[1:]]
        if make is Halving:
            adapter.reset()
        adapter.load_state_dict(state)
        assert adapter.state.optimizer.optimizer.param_groups[0]["lr"] == rate
        assert same_bits([adapter.step(x) for x in frames[1:]], expected)

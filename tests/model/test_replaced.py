from __future__ import annotations

import torch
from torch import nn

from ttt_adapt.model.replaced import ReplacementCounter


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_values_that_change_in_place_are_no_replacement():
    model = small()
    counter = ReplacementCounter(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    model.load_state_dict(small().state_dict())
    model.train()(torch.randn(2, 3, 4, 4))
    assert counter.count() == counter.count() == 0


def test_every_kind_of_object_is_noticed_and_named_when_it_is_replaced():
    model, extra = small(), nn.Linear(2, 2)
    counter = ReplacementCounter(model, extra)
    changes = {
        "weight": lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
        "running_mean": lambda: setattr(model[1], "running_mean", torch.zeros(4)),
        "1": lambda: model.__setitem__(1, nn.BatchNorm2d(4)),
        "bias": lambda: setattr(extra, "bias", None),
    }
    for number, (name, change) in enumerate(changes.items(), 1):
        change()
        assert counter.count() == number
        assert counter.last_replaced == name
        assert counter.count() == number


def test_a_tensor_that_moves_to_other_memory_is_noticed():
    model = small()
    counter = ReplacementCounter(model)
    model[0].weight.data = model[0].weight.detach().clone()
    assert counter.count() == 1
    assert counter.last_replaced == "weights"


def test_additions_are_noticed_at_the_next_replacement():
    model = small()
    counter = ReplacementCounter(model)
    model.add_module("more", nn.Linear(2, 2))
    assert counter.count() == 0
    model[1] = nn.Identity()
    assert counter.count() == 1
    model.more.weight = nn.Parameter(torch.zeros(2, 2))
    assert counter.count() == 2

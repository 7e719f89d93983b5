"""Passes with other tensors leave the model with its own, also where it has one module or tensor in several places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import left_as_it_was
from ttt_adapt import MAEBranch
from ttt_adapt.model.other_weights import with_other_weights
from ttt_adapt.objectives import PseudoLabel


class Shared(nn.Module):
    """As CoaT: one module under several names, and one tensor in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 4, 4)
        self.first = self.second = self.third = nn.Conv2d(8, 8, 1)
        self.head, self.tied = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)
        self.tied.weight = self.head.weight
        self.register_buffer("scale", torch.ones(1))
        with torch.no_grad():
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(self.backbone(x)).relu()).relu())
        return self.scale * (self.head(x) + self.tied(x))


def test_a_tensor_is_replaced_in_all_of_its_places_and_comes_back():
    model, x = Shared().eval(), torch.randn(1, 3, 16, 24)
    others = {name: torch.randn_like(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    twin = Shared().eval()
    twin.load_state_dict(others, strict=False)
    with left_as_it_was(model), with_other_weights(model, others):
        assert model.third.weight is others["first.weight"]
        assert torch.equal(model(x), twin(x))


def test_it_comes_back_after_an_error_too_and_an_unknown_name_changes_nothing():
    model = Shared()
    with left_as_it_was(model), pytest.raises(RuntimeError), with_other_weights(model, {"scale": torch.zeros(7)}):
        model(torch.randn(1, 3, 16, 24))
    with left_as_it_was(model), pytest.raises(KeyError), with_other_weights(model, {"none": torch.zeros(7)}):
        pass


class SharedBlock(nn.Module):
    """A block of a transformer with one layer under two names, whose weights are 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.first = self.second = nn.Linear(16, 16)
        nn.init.zeros_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return x + self.second(self.first(x))


class SharedVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(SharedBlock() for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_attaching_leaves_a_module_under_several_names_as_it_was():
    model = SharedVit().eval()
    with left_as_it_was(model):
        branch = MAEBranch.attach(model)
    assert branch.masking == "tokens"


def test_an_average_teacher_leaves_a_module_under_several_names_as_it_was():
    model, x = Shared().eval(), torch.randn(1, 3, 16, 24)
    objective = PseudoLabel(model, threshold=0.0, average=0.5)
    with torch.no_grad():
        model.first.weight += 1
    with left_as_it_was(model):
        taught = objective.teach(x)
    assert not torch.equal(taught, model(x))

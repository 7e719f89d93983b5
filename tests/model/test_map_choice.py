"""Which of an encoder's maps are read: one of each stride, the deepest, and fine ones that have parameters alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_adapt import MAEBranch
from ttt_adapt.model.encoder import inspect_encoder


class Branches(nn.Module):
    """Two stems; the map that joins them comes first, and maps of one of them alone come behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.detail, self.context = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(3, 6, 8, 8)
        self.join, self.deep = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1)

    def forward(self, x):
        context = self.context(x)
        return [self.join(self.detail(x) + context), context, self.deep(context)]


class Dilated(nn.Module):
    """Three stages of one stride, as in a network for dense prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 6, 8, 8), *(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))])

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps


class UNet(nn.Module):
    """Down to stride 8 and up again to stride 1; the maps on the way up are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 4, 4), nn.Conv2d(4, 4, 2, 2)])
        self.up = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        fine = self.down[0](x)
        middle = self.down[1](fine)
        coarse = self.down[2](middle)
        middle = self.up[0](middle + nn.functional.interpolate(coarse, scale_factor=2.0))
        return [coarse, middle, self.up[1](fine + nn.functional.interpolate(middle, scale_factor=4.0))]


class Ladder(nn.Module):
    """Stages of stride 2, 4 and 8, each a part of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 2, 2) for i in range(3))

    def forward(self, x):
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps


def with_head(encoder: nn.Module) -> nn.Module:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = encoder

        def forward(self, x):
            return sum(each.mean() for each in self.backbone(x))

    return Model().eval()


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (Branches, [(0, 8, False), (2, 16, False)]),
        (Dilated, [(2, 8, False)]),
        (UNet, [(2, 1, True), (1, 4, False), (0, 8, False)]),
        (Ladder, [(0, 2, False), (1, 4, False), (2, 8, False)]),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_of_each_stride_the_map_is_read_on_which_most_parameters_act(encoder, expected, frozen):
    model = with_head(encoder()).requires_grad_(not frozen)
    maps = inspect_encoder(model, "backbone").maps
    assert [(spec.index, spec.stride, spec.own) for spec in maps] == expected
    assert {p.requires_grad for p in model.parameters()} == {not frozen}


@pytest.mark.parametrize("encoder", [Branches, Dilated, UNet, Ladder])
def test_every_parameter_of_encoder_and_branch_gets_a_gradient(encoder):
    branch = MAEBranch.attach(with_head(encoder()), "backbone", masking="pixels")
    named = {**branch.encoder_parameters(), **dict(branch.named_parameters())}
    loss = branch.loss(branch.info.probe_images(), generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert [name for name, gradient in zip(named, found, strict=True) if gradient is None] == []

"""Where the statistics of a frame are measured and corrected, in every family of models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models as zoo
from conftest import left_as_it_was, mix_flags
from ttt_adapt.model.points import KINDS, SIDES, Point, points_of_pass
from ttt_adapt.model.probe import evaluating
from ttt_adapt.model.tone import levels_of

FAMILIES = {
    # model, size: kind -> (how many points, layouts, prefixes, channels of the first)
    "resnet": (zoo.resnet, (64, 96), {"batchnorm": (21, "nchw", 0, 64), "blocks": (4, "nchw", 0, 8)}),
    "convnext": (zoo.convnext, (64, 96), {"norms": (9, None, 0, 16), "blocks": (5, "nchw", 0, 16)}),
    "swin": (zoo.swin, (64, 96), {"norms": (15, None, 0, 24), "blocks": (5, "nhwc", 0, 24)}),
    "vit": (zoo.vit, (32, 48), {"norms": (5, "tokens", 1, 48), "blocks": (2, "tokens", 1, 48)}),
    "registers": (zoo.vit_registers, (32, 48), {"norms": (4, "tokens", 4, 48), "blocks": (2, "tokens", 4, 48)}),
    "eva": (zoo.eva, (42, 56), {"norms": (4, "tokens", 1, 48), "blocks": (2, "tokens", 1, 48)}),
    "dinov3": (zoo.dinov3, (32, 48), {"norms": (5, "tokens", 5, 48), "blocks": (2, "tokens", 5, 48)}),
    "unet": (zoo.UNet, (32, 48), {"batchnorm": (10, "nchw", 0, 8)}),
    "queries": (zoo.MaskQueryNet, (64, 80), {"batchnorm": (5, "nchw", 0, 8)}),
    "windows": (lambda: zoo.WindowNet(), (64, 64), {"norms": (5, "tokens", 0, 16), "blocks": (2, "tokens", 0, 16)}),
}


def find_points(model: nn.Module, size: tuple[int, int]) -> dict[str, list[Point]]:
    """The points of a model in evaluation mode on one image of this size."""
    images = torch.randn(1, 3, *size)
    with evaluating(model), torch.no_grad():
        return points_of_pass(model, images, lambda: model(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_found_with_their_layout_channels_and_prefix_tokens(family):
    make, size, expected = FAMILIES[family]
    model = make()
    mix_flags(model)
    with left_as_it_was(model):
        found = find_points(model, size)
    for kind, (count, layout, prefix, channels) in expected.items():
        points = found[kind]
        assert len(points) == count, [point.name for point in points]
        assert {point.layout for point in points} == {layout} or layout is None
        assert {point.prefix for point in points} == {prefix}
        assert points[0].channels == channels
        assert all(model.get_submodule(point.name) is point.module for point in points)
        assert {point.side for point in points} == {SIDES[kind]}
    assert list(found) == [kind for kind in KINDS if kind in {*expected, "input"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_point_is_that_of_the_convolution_that_sees_the_image(family):
    make, size, _ = FAMILIES[family]
    model, seen = make(), []
    (point,) = find_points(model, size)["input"]
    assert (point.side, point.layout, point.channels, point.prefix) == ("input", "nchw", 3, 0)
    assert model.get_submodule(point.name) is point.module
    images = torch.randn(1, 3, *size)
    point.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with evaluating(model), torch.no_grad():
        model(images)
    levels, variance = point.moments(seen[0])
    assert seen[0].shape[1] == 3
    assert torch.equal(levels, levels_of(seen[0]))
    torch.testing.assert_close(variance, seen[0].var((0, 2, 3), correction=0))


def test_a_model_that_goes_over_the_image_in_windows_has_points_in_its_layers_and_none_at_the_input():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.UNet()

        def forward(self, x):
            return torch.cat([self.net(window) for window in x.chunk(2, 3)], 3)

    found = find_points(Windows(), (32, 96))
    assert list(found) == ["batchnorm"]
    assert len(found["batchnorm"]) == 10


def test_patches_and_moments_leave_prefix_tokens_out():
    point = find_points(zoo.vit_registers(), (32, 48))["blocks"][0]
    x = torch.randn(2, 4 + 6, 48)
    mean, variance = point.moments(x)
    torch.testing.assert_close(mean, x[:, 4:].mean((0, 1)))
    torch.testing.assert_close(variance, x[:, 4:].var((0, 1), correction=0))
    x[:, :4] = 1e6
    for changed, before in zip(point.moments(x), (mean, variance), strict=True):
        assert torch.equal(changed, before)


class Shared(nn.Module):
    """One norm in two places, a pooled gate with a norm, and a query with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.own, self.shared = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.query, self.norm = nn.Parameter(torch.randn(1, 5, 8)), nn.LayerNorm(8)

    def forward(self, x):
        x = self.shared(self.own(self.one(x)))
        x = self.shared(self.two(x)) * self.gate(x).sigmoid()
        return x + self.norm(self.query).mean(1)[..., None, None]


def test_shared_layers_pooled_gates_and_queries_are_left_out():
    found = find_points(Shared(), (32, 48))
    assert {kind: [point.name for point in points] for kind, points in found.items()} == {
        "batchnorm": ["own"],
        "input": ["one"],
    }


def test_a_frame_in_several_passes_has_the_points_of_one_pass():
    model = Shared()
    images = torch.randn(1, 3, 32, 64)

    def slide():
        for part in images.split(32, dim=3):
            model.eval()(part)

    found = points_of_pass(model, images, slide)
    assert [point.name for point in found["batchnorm"]] == ["own"]


class Blocks(nn.Module):
    """Blocks without any norm, which return a tuple where `tuples` asks for it."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(Block(tuples) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Block(nn.Module):
    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.mix, self.tuples = nn.Conv2d(8, 8, 3, padding=1), tuples

    def forward(self, x):
        x = x + self.mix(x).relu()
        return (x, "something else") if self.tuples else x


@pytest.mark.parametrize("tuples", [False, True])
def test_a_model_without_norms_has_its_blocks(tuples):
    found = find_points(Blocks(tuples), (32, 48))
    assert [(p.name, p.layout, p.channels) for p in found["blocks"]] == [(f"blocks.{i}", "nchw", 8) for i in range(3)]
    assert found.keys() == {"blocks", "input"}


def test_a_model_with_neither_norms_nor_blocks_has_its_input_and_one_without_a_convolution_has_none():
    assert find_points(zoo.PlainSeg(), (32, 48)).keys() == {"input"}
    assert find_points(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 2)), (32, 48)) == {}


def test_an_image_of_other_channels_than_the_models_has_no_input_point():
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.stem(x.mean(1, keepdim=True)))

    assert find_points(Grey(), (32, 48)).keys() == {"batchnorm"}


def test_batchnorm_of_sequences_is_no_point():
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.other = nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.BatchNorm1d(12)

        def forward(self, x):
            return self.other(self.norm(self.stem(x)).flatten(2))

    assert [p.name for p in find_points(Sequences(), (32, 24))["batchnorm"]] == ["norm"]

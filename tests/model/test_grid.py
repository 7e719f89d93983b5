"""Where the features of an encoder lie in the image is found by trial."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ttt_adapt.errors import EncoderError, FeatureMapError
from ttt_adapt.model.grid import find_maps

SIZE = (64, 96)
OTHERS = [(128, 96)]


def found(run, size=SIZE, others=OTHERS) -> list[tuple]:
    torch.manual_seed(0)
    specs = find_maps(run, torch.randn(1, 3, *size), others)
    return [(s.index, s.layout, s.channels, s.stride, s.prefix, s.middle, s.suffix, s.by_columns) for s in specs]


class Tokens(nn.Module):
    """Patches of `stride` pixels in some order, each mixed with its neighbours and with the mean of all."""

    def __init__(self, order: str = "front", stride: int = 16, extra: int = 2, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.extra = order, nn.Parameter(torch.randn(1, extra, width))
        self.stem, self.mix = nn.Conv2d(3, width, stride, stride), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.stem(x)
        grid = grid + 0.1 * self.mix(grid)
        grid = grid + grid.mean((2, 3), keepdim=True)
        patches = (grid.transpose(2, 3) if "columns" in self.order else grid).flatten(2).transpose(1, 2)
        extra = self.extra.expand(len(x), -1, -1) + patches.mean(1, keepdim=True)
        half = patches.shape[1] // 2
        tokens = torch.cat(
            {
                "front": [extra, patches],
                "behind": [patches, extra],
                "around": [extra[:, :1], patches, extra[:, 1:]],
                "middle": [patches[:, :half], extra, patches[:, half:]],
                "columns": [extra, patches],
                "none": [patches],
                "tokens first": [extra, patches],
                "channels first": [extra, patches],
                "shuffled": [patches[:, torch.randperm(half * 2, generator=torch.Generator().manual_seed(0))]],
            }[self.order],
            1,
        )
        axes = {"tokens first": (1, 0, 2), "channels first": (0, 2, 1)}
        return tokens.permute(axes.get(self.order, (0, 1, 2)))


@pytest.mark.parametrize("others", [OTHERS, []], ids=["two sizes", "one size"])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("front", ("tokens", 8, 16, 2, 0, 0, False)),
        ("none", ("tokens", 8, 16, 0, 0, 0, False)),
        ("behind", ("tokens", 8, 16, 0, 0, 2, False)),
        ("around", ("tokens", 8, 16, 1, 0, 1, False)),
        ("middle", ("tokens", 8, 16, 0, 2, 0, False)),
        ("columns", ("tokens", 8, 16, 2, 0, 0, True)),
        ("tokens first", ("tokens_first", 8, 16, 2, 0, 0, False)),
        ("channels first", ("channels_first", 8, 16, 2, 0, 0, False)),
    ],
)
def test_tokens_in_any_known_order_are_found_where_they_lie(order, expected, others):
    if order == "channels first" and not others:
        pytest.skip("from one size nothing tells tokens from channels")
    assert found(Tokens(order), others=others) == [(0, *expected)]


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_number_of_tokens_at_two_sizes_tells_their_stride(stride):
    assert found(Tokens(stride=stride, extra=1)) == [(0, "tokens", 8, stride, 1, 0, 0, False)]


def test_tokens_in_an_order_of_their_own_are_refused_with_that_reason():
    with pytest.raises(FeatureMapError, match="neither row by row nor column by column"):
        find_maps(Tokens("shuffled"), torch.randn(1, 3, 128, 192), [(256, 192)])


def test_tokens_that_answer_to_all_pixels_alike_are_taken_row_by_row():
    def run(x: Tensor) -> Tensor:
        cells = x.unfold(2, 16, 16).unfold(3, 16, 16).mean((1, 4, 5)).flatten(1)[..., None]  # [B, N, 1]
        return cells.mean(1, keepdim=True).expand_as(cells).repeat(1, 1, 4)

    assert found(run) == [(0, "tokens", 4, 16, 0, 0, 0, False)]


def patches(x: Tensor, stride: int, channels: int) -> Tensor:
    return nn.functional.avg_pool2d(x, stride).repeat(1, channels, 1, 1)[:, :channels]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: patches(x, 4, 7), [(0, "nchw", 7, 4)]),
        (lambda x: patches(x, 4, 7).permute(0, 2, 3, 1), [(0, "nhwc", 7, 4)]),
        (lambda x: patches(x, 4, 16), [(0, "nchw", 16, 4)]),
        (lambda x: patches(x, 4, 16).permute(0, 2, 3, 1), [(0, "nhwc", 16, 4)]),
        (lambda x: [patches(x, 16, 9), patches(x, 4, 5)], [(1, "nchw", 5, 4), (0, "nchw", 9, 16)]),
        (lambda x: (patches(x, 4, 5), (patches(x, 8, 9), x.mean((2, 3)))), [(0, "nchw", 5, 4), (1, "nchw", 9, 8)]),
        (lambda x: {"a": patches(x, 8, 5), "b": patches(x, 8, 6)}, [(0, "nchw", 5, 8), (1, "nchw", 6, 8)]),
        (lambda x: patches(x[..., 8:-8, 8:-8], 8, 5), [(0, "nchw", 5, 8)]),
    ],
    ids=["nchw", "nhwc", "as many channels as rows", "and last", "list", "nested", "one stride twice", "no padding"],
)
def test_maps_are_found_in_any_nesting_the_finest_first(run, expected):
    assert [each[:4] for each in found(run)] == expected


def test_maps_of_convolutions_without_padding_have_the_stride_of_the_convolutions():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, 2) for _ in range(4)))
    assert found(net, (128, 160), [(192, 128)]) == [(0, "nchw", 3, 16, 0, 0, 0, False)]


def test_a_grid_of_the_same_size_for_all_images_is_a_map_only_where_it_answers_to_pixels():
    def resized(x: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(x, (4, 6)).flatten(2).transpose(1, 2)
        return cells + 0.1 * cells.mean(1, keepdim=True)

    def queries(x: Tensor) -> Tensor:
        return torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(0)) * x.mean()

    assert found(resized) == [(0, "tokens", 3, 16, 0, 0, 0, False)]
    with pytest.raises(FeatureMapError, match="the same for 128 x 96: they are no grid over the image"):
        find_maps(queries, torch.randn(1, 3, *SIZE), OTHERS)


def no_maps(shapes: list[tuple]):
    return lambda x: [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    "shapes",
    [[(1, 7)], [(1, 7, 1, 1)], [(1, 3, 7)], [], [(1, 9), (9,)], [(4, 7, 8, 12)], [(1, 1, 7)]],
    ids=["pooled", "pooled map", "few tokens", "nothing", "vectors", "windows in the batch", "one token"],
)
def test_what_is_no_feature_map_is_refused_with_its_shapes(shapes):
    with pytest.raises(FeatureMapError, match="64 x 96.*expected.*name an earlier module") as caught:
        find_maps(no_maps(shapes), torch.randn(1, 3, *SIZE), OTHERS)
    assert isinstance(caught.value, EncoderError)
    assert isinstance(caught.value, ValueError)
    for shape in shapes:
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: nn.functional.pad(x, (8, 8, 8, 8)), "4 cells more than the image .* pads"),
        (lambda x: x[..., 8:-8, 8:-8], "4 cells fewer than the image .* crops"),
    ],
)
def test_a_map_with_a_wide_border_is_refused_with_the_number_of_its_cells(change, reason, channels_last):
    def run(x: Tensor) -> Tensor:
        cells = patches(change(x), 4, 5)
        return cells.permute(0, 2, 3, 1) if channels_last else cells

    with pytest.raises(FeatureMapError, match=reason):
        find_maps(run, torch.randn(1, 3, 128, 160), [(192, 128)])

"""Features in one form: which tensors an encoder returned, and how they become maps."""

from __future__ import annotations

import pytest
import torch

from ttt_adapt.errors import EncoderError
from ttt_adapt.model.features import MapSpec, describe_map, from_map, tensors, to_maps

SIZE = (64, 96)
GRID = (4, 6)


def summary(tensor: torch.Tensor, stride: int | None = None) -> tuple | None:
    spec = describe_map(tuple(tensor.shape), SIZE, stride, index=2)
    return spec and (spec.index, spec.layout, spec.channels, spec.stride, spec.prefix)


def test_tensors_come_out_depth_first_and_other_things_are_passed_over():
    a, b, c, d = (torch.zeros(i) for i in range(4))
    assert [t.numel() for t in tensors({"x": [d, (c, None)], "y": {"z": b, "n": 3}, "w": a})] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("output", "stride", "expected"),
    [
        (torch.zeros(1, 7, 16, 24), None, (2, "nchw", 7, 4, 0)),
        (torch.zeros(1, 16, 24, 7), None, (2, "nhwc", 7, 4, 0)),
        (torch.zeros(1, 24, 7), 16, (2, "tokens", 7, 16, 0)),
        (torch.zeros(1, 25, 7), 16, (2, "tokens", 7, 16, 1)),
        (torch.zeros(1, 29, 7), 16, (2, "tokens", 7, 16, 5)),
        (torch.zeros(1, 7), 16, None),
        (torch.zeros(1, 7, 1, 1), 16, None),
        (torch.zeros(1, 3, 7), 16, None),
        (torch.zeros(1, 24, 7), None, None),
    ],
    ids=["nchw", "nhwc", "tokens", "class token", "registers", "pooled", "pooled map", "few tokens", "no side"],
)
def test_the_shape_of_a_tensor_tells_its_layout_where_the_side_of_a_token_is_known(output, stride, expected):
    assert summary(output, stride) == expected


ORDERS = {
    "rows": {},
    "class token": {"prefix": 1},
    "registers behind": {"suffix": 4},
    "class token and registers": {"prefix": 1, "suffix": 4},
    "class token in the middle": {"middle": 1},
    "columns": {"by_columns": True},
    "tokens first": {"layout": "tokens_first", "prefix": 2},
    "channels first": {"layout": "channels_first"},
    "channels last": {"layout": "nhwc"},
    "channels second": {"layout": "nchw"},
}


def arranged(values: torch.Tensor, spec: MapSpec) -> torch.Tensor:
    """Maps [B, C, h, w] in the layout of `spec`, with -1 in the tokens beside the patches; written cell by cell."""
    b, c, h, w = values.shape
    if spec.layout in ("nchw", "nhwc"):
        return values if spec.layout == "nchw" else values.permute(0, 2, 3, 1)
    cells = [(y, x) for y in range(h) for x in range(w)]
    cells = sorted(cells, key=lambda cell: cell[::-1]) if spec.by_columns else cells
    row = [values[:, :, y, x] for y, x in cells]
    extra = torch.full((b, c), -1.0)
    row[len(row) // 2 : len(row) // 2] = [extra] * spec.middle
    tokens = torch.stack([extra] * spec.prefix + row + [extra] * spec.suffix, 1)
    return {"tokens": tokens, "tokens_first": tokens.transpose(0, 1), "channels_first": tokens.transpose(1, 2)}[
        spec.layout
    ]


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_a_map_in_any_layout_comes_out_channels_first_with_every_cell_in_its_place(order):
    values = torch.randn(2, 7, *GRID)
    spec = MapSpec(1, channels=7, stride=16, **{"layout": "tokens", **order})
    (found,) = to_maps([torch.zeros(2, 3), arranged(values, spec)], [spec], SIZE)
    assert torch.equal(found, values)


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_a_map_goes_back_into_the_layout_that_it_came_from(order):
    values = torch.randn(2, 7, *GRID)
    spec = MapSpec(0, channels=7, stride=16, **{"layout": "tokens", **order})
    like = arranged(values, spec)
    back = from_map(values, spec, like)
    assert torch.equal(back, torch.where(like == -1, 0, like))


def test_maps_come_in_the_order_of_their_specs():
    fine, coarse = torch.randn(2, 5, 16, 24), torch.randn(2, 9, *GRID)
    specs = [MapSpec(1, "nchw", 5, 4), MapSpec(0, "nchw", 9, 16)]
    assert all(torch.equal(a, b) for a, b in zip(to_maps((coarse, fine), specs, SIZE), (fine, coarse), strict=True))


def test_specs_hold_for_images_of_another_size_and_for_cells_that_the_image_fills_in_part():
    spec = MapSpec(0, "tokens", 7, 16, 1)
    assert to_maps(torch.zeros(3, 1 + 10, 7), [spec], (32, 80))[0].shape == (3, 7, 2, 5)
    assert to_maps(torch.zeros(3, 1 + 10, 7), [spec], (30, 70))[0].shape == (3, 7, 2, 5)


def test_a_map_that_lacks_the_border_of_the_image_is_stretched_over_it():
    spec = MapSpec(0, "nchw", 7, 8)
    ramp = torch.arange(10.0).expand(1, 7, 6, 10)
    (found,) = to_maps(ramp, [spec], SIZE)
    assert found.shape == (1, 7, 8, 12)
    assert found[0, 0, 0].diff().min() >= 0
    assert (found.min(), found.max()) == (0, 9)


def test_another_number_of_tokens_than_the_image_has_patches_is_an_error_with_both_numbers():
    with pytest.raises(EncoderError, match=r"23 patch tokens for images of 64 x 96.*expected 24.*16 x 16 pixels"):
        to_maps(torch.zeros(1, 24, 7), [MapSpec(0, "tokens", 7, 16, 1)], SIZE)

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from ttt_adapt.errors import EncoderError, TTTAdaptError
from ttt_adapt.model.features import describe, tensors, to_maps

SIZE = (64, 96)


def summary(output, stride=None):
    return [(s.index, s.layout, s.channels, s.stride, s.prefix) for s in describe(output, SIZE, stride)]


def test_tensors_come_out_depth_first_and_other_things_are_passed_over():
    a, b, c, d = (torch.zeros(i) for i in range(4))
    assert [t.numel() for t in tensors({"x": [d, (c, None)], "y": {"z": b, "n": 3}, "w": a})] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("output", "stride", "expected"),
    [
        (torch.zeros(1, 7, 16, 24), None, [(0, "nchw", 7, 4, 0)]),
        (torch.zeros(1, 16, 24, 7), None, [(0, "nhwc", 7, 4, 0)]),
        (torch.zeros(1, 24, 7), 16, [(0, "tokens", 7, 16, 0)]),
        (torch.zeros(1, 25, 7), 16, [(0, "tokens", 7, 16, 1)]),
        (torch.zeros(1, 29, 7), 16, [(0, "tokens", 7, 16, 5)]),
        (
            [torch.zeros(1, 9, 4, 6), torch.zeros(1, 5, 16, 24)],
            None,
            [(1, "nchw", 5, 4, 0), (0, "nchw", 9, 16, 0)],
        ),
        (
            (torch.zeros(1, 5, 16, 24), (torch.zeros(1, 9, 8, 12), torch.zeros(1, 9))),
            None,
            [(0, "nchw", 5, 4, 0), (1, "nchw", 9, 8, 0)],
        ),
        (
            OrderedDict(res2=torch.zeros(1, 5, 16, 24), res5=torch.zeros(1, 9, 2, 3)),
            None,
            [(0, "nchw", 5, 4, 0), (1, "nchw", 9, 32, 0)],
        ),
    ],
    ids=["nchw", "nhwc", "tokens", "class token", "registers", "list", "nested tuple", "dict"],
)
def test_the_layout_of_the_features_is_found(output, stride, expected):
    assert summary(output, stride) == expected


def test_maps_come_finest_first_channels_first_and_without_prefix_tokens():
    nhwc, tokens = torch.randn(2, 16, 24, 5), torch.randn(2, 3 + 24, 7)
    output = {"tokens": tokens, "map": nhwc}
    specs = describe(output, SIZE, 16)
    fine, coarse = to_maps(output, specs, SIZE)
    assert torch.equal(fine, nhwc.permute(0, 3, 1, 2))
    for row in range(4):
        for column in range(6):
            assert torch.equal(coarse[:, :, row, column], tokens[:, 3 + 6 * row + column])


def test_specs_hold_for_images_of_another_size():
    specs = describe(torch.zeros(1, 1 + 24, 7), SIZE, 16)
    assert to_maps(torch.zeros(3, 1 + 10, 7), specs, (32, 80))[0].shape == (3, 7, 2, 5)


def test_of_two_maps_with_one_stride_the_later_is_taken():
    assert summary([torch.zeros(1, 5, 8, 12), torch.zeros(1, 6, 8, 12)]) == [(1, "nchw", 6, 8, 0)]


@pytest.mark.parametrize(
    "output",
    [torch.zeros(1, 7), torch.zeros(1, 7, 1, 1), torch.zeros(1, 3, 7), [], None, {"logits": torch.zeros(1, 9)}],
    ids=["pooled", "pooled map", "few tokens", "empty", "nothing", "dict of vectors"],
)
def test_what_is_no_feature_map_is_refused_with_its_shapes(output):
    with pytest.raises(EncoderError, match="64 x 96.*expected.*name an earlier module") as caught:
        describe(output, SIZE, 16)
    assert isinstance(caught.value, TTTAdaptError)
    assert isinstance(caught.value, ValueError)
    for tensor in tensors(output):
        assert str(tuple(tensor.shape)) in str(caught.value)

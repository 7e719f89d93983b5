"""The adapted weights of a video, and the source weights in their place for a moment."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_adapt.stream.adapted_weights import AdaptedWeights
from ttt_adapt.stream.source import SourceWeights


def moved() -> tuple[nn.Parameter, AdaptedWeights, torch.Tensor, torch.Tensor]:
    """A weight that a stream has moved; its values before and after."""
    weight = nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    weights = AdaptedWeights({"w": weight}, SourceWeights({"w": weight}))
    with torch.no_grad():
        weight.add_(1.5)
    weights.moved = True
    return weight, weights, before, weight.detach().clone()


def test_the_source_weights_stand_in_for_a_block_and_the_video_gets_its_own_back_bit_for_bit():
    weight, weights, before, after = moved()
    address = weight.data_ptr()
    with weights.as_source():
        assert torch.equal(weight, before)
    assert torch.equal(weight, after)
    assert weight.data_ptr() == address
    assert weights.moved


def test_a_block_that_fails_leaves_the_video_its_own_weights():
    weight, weights, _, after = moved()
    with pytest.raises(ZeroDivisionError), weights.as_source():
        raise ZeroDivisionError
    assert torch.equal(weight, after)


def test_weights_that_did_not_move_stay_where_they_are():
    weight, weights, before, _ = moved()
    weights.pull(1.0)
    assert not weights.moved
    with weights.as_source():
        assert torch.equal(weight, before)
    assert torch.equal(weight, before)

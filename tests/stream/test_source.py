from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_adapt.stream.source import SourceWeights


def live() -> dict[str, torch.Tensor]:
    return {
        "weight": nn.Parameter(torch.randn(4, 3)),
        "half": torch.randn(5).half(),
        "count": torch.tensor(7),
    }


def test_a_copy_of_the_source_never_aliases_the_live_tensors():
    tensors = live()
    kept = SourceWeights(tensors)
    source = {name: t.detach().clone() for name, t in tensors.items()}
    with torch.no_grad():
        for t in tensors.values():
            t.add_(1)
    kept.restore()
    for name, t in tensors.items():
        assert torch.equal(t, source[name]), name


def test_restoring_writes_in_place_and_bit_for_bit():
    tensors = live()
    tensors["weight"].data[0, 0] = float("nan")
    tensors["weight"].data[0, 1] = -0.0
    pointers = {name: t.data_ptr() for name, t in tensors.items()}
    source = {name: t.detach().numpy().tobytes() for name, t in tensors.items()}
    kept = SourceWeights(tensors)
    with torch.no_grad():
        for t in tensors.values():
            t.zero_()
    for _ in range(2):
        kept.restore()
    assert {name: t.data_ptr() for name, t in tensors.items()} == pointers
    assert {name: t.detach().numpy().tobytes() for name, t in tensors.items()} == source


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_a_pull_moves_that_fraction_of_the_way(fraction):
    weight = nn.Parameter(torch.randn(6, dtype=torch.float64))
    source = weight.detach().clone()
    kept = SourceWeights({"weight": weight})
    with torch.no_grad():
        weight.add_(torch.randn(6))
    adapted = weight.detach().clone()
    kept.pull(fraction)
    torch.testing.assert_close(weight.detach(), adapted + fraction * (source - adapted), rtol=1e-12, atol=1e-12)
    if fraction == 1.0:
        assert torch.equal(weight, source)
    if fraction == 0.0:
        assert torch.equal(weight, adapted)


def test_a_pull_leaves_counters_alone_until_it_is_whole():
    tensors = live()
    kept = SourceWeights(tensors)
    tensors["count"].fill_(9)
    kept.pull(0.5)
    assert tensors["count"] == 9
    kept.pull(1.0)
    assert tensors["count"] == 7


def test_it_works_inside_inference_mode_and_leaves_no_graph():
    tensors = live()
    kept = SourceWeights(tensors)
    with torch.inference_mode():
        kept.pull(0.5)
        kept.restore()
    assert tensors["weight"].requires_grad
    assert tensors["weight"].grad_fn is None
    assert not tensors["weight"].is_inference()


def test_nothing_to_keep_is_no_error():
    SourceWeights({}).restore()
    SourceWeights({}).pull(0.5)


def test_what_is_whole_is_left_alone_by_a_partial_pull_and_restored_by_a_full_one():
    weight, mean = torch.ones(3), torch.ones(3)
    kept = SourceWeights({"weight": weight, "mean": mean}, whole=["mean"])
    weight.zero_()
    mean.zero_()
    kept.pull(0.25)
    assert weight.tolist() == [0.25] * 3
    assert mean.tolist() == [0.0] * 3
    kept.pull(1.0)
    assert mean.tolist() == [1.0] * 3

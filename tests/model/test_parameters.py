from __future__ import annotations

import pytest
import torch
from torch import nn

from ttt_adapt.errors import CheckpointError
from ttt_adapt.model.parameters import check_state, split_by_decay


class Small(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.body = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.words = nn.Embedding(5, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.tokens_to_scores = nn.Linear(4, 2)


def test_kernels_and_matrices_decay_and_all_else_does_not():
    module = Small()
    names = {id(p): name for name, p in module.named_parameters()}
    with_decay, without = split_by_decay(module.named_parameters(), [module])
    decayed = ["body.weight", "tokens_to_scores.weight"]
    assert [names[id(p)] for p in with_decay] == decayed
    assert [names[id(p)] for p in without] == [name for name in names.values() if name not in decayed]


def test_embedding_tables_are_those_of_the_given_modules():
    module = Small()
    named = [("words.weight", module.words.weight)]
    assert split_by_decay(named, [module.body]) == ([module.words.weight], [])
    assert split_by_decay(named, [module.body, module]) == ([], [module.words.weight])


def test_a_state_with_other_names_or_shapes_is_refused_with_both_listed():
    own = {name: torch.zeros(2, 3) for name in "abc"}
    check_state(own, dict(own), "this model")
    other = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "d": torch.zeros(1)}
    message = r"do not belong to this model: missing \(1\): c; unknown \(1\): d; other shapes \(1\): b: \(3, 2\), exp"
    with pytest.raises(CheckpointError, match=message):
        check_state(own, other, "this model")
    with pytest.raises(CheckpointError, match=r"missing \(9\): p0, p1, p2, p3, p4 \.\.\.$"):
        check_state({f"p{i}": 0 for i in range(9)}, {}, "this model")

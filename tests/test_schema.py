"""What may stand in the JSON of saved files, and how values are shown in messages."""

from __future__ import annotations

import pytest
import torch

from ttt_adapt.errors import CheckpointError, DataError
from ttt_adapt.schema import read_json, shown


def test_a_name_that_stands_twice_in_a_dict_is_refused_by_name():
    assert read_json('{"a": {"b": 1}, "b": {"b": 2}}', "here") == {"a": {"b": 1}, "b": {"b": 2}}
    for text in ('{"a": 1, "b": 2, "a": 1}', '[{"c": {"a": 1, "a": 2}}]'):
        with pytest.raises(DataError, match="here is not JSON: .*'a' stands twice in one dict"):
            read_json(text, "here", DataError)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff", "nothing"])
def test_other_text_is_an_error_of_the_library(text):
    with pytest.raises(CheckpointError, match="here is not JSON"):
        read_json(text, "here")


def test_a_value_in_a_message_is_short_whatever_it_is():
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    assert shown(torch.zeros(2, 3)) == "a tensor (2, 3) of torch.float32"
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)])
    for value in (nested, Odd(), 10**5000, "x" * 10**6, [[[[[[1]]]]]] * 1000):
        assert 0 < len(shown(value)) < 400

"""Peak memory: what is counted, and what is unknown."""

from __future__ import annotations

import pytest
import torch

from ttt_adapt.evaluation.peak_memory import PeakMemory


def test_peak_memory_counts_what_a_block_allocates_even_if_it_is_gone_at_the_end():
    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * 2**18)  # 64 MiB
        del block
    if memory.mib is None:
        pytest.skip("this system does not say how much memory a process uses")
    assert 50 < memory.mib < 200


def test_memory_that_the_system_does_not_tell_is_unknown(tmp_path):
    with PeakMemory(torch.device("cpu"), account=tmp_path / "none") as memory:
        pass
    assert memory.mib is None

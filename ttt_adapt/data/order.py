"""The order in which a clip's frames are shown where it is not their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def shuffled_epochs(count: int, seed: int) -> Iterator[list[int]]:
    """Endlessly, epoch by epoch: the numbers from 0 to `count` - 1 in random order, drawn from `seed`."""
    random = np.random.default_rng(seed)
    while True:
        yield random.permutation(count).tolist()

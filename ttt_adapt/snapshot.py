"""Snapshot: one copy of the source weights; restoring and pulling back write in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """A copy of live tensors that never aliases them.

    Args:
        live: name -> the tensors that change. The snapshot writes back into these very objects.
    """

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        self._live = list(live.values())  # not detached: a detached alias misses `model.to(...)`
        self._copies = [tensor.detach().clone() for tensor in self._live]
        self._floats = [i for i, tensor in enumerate(self._live) if tensor.is_floating_point()]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, bit for bit."""
        if self._live:
            torch._foreach_copy_(self._live, self._copies)

    @torch.no_grad()
    def pull(self, fraction: float) -> None:
        """Move the live tensors `fraction` of the way to the copies; 1 restores them exactly."""
        if fraction == 1.0:
            self.restore()
        elif fraction > 0.0 and self._floats:
            live = [self._live[i] for i in self._floats]
            torch._foreach_lerp_(live, [self._copies[i] for i in self._floats], fraction)


def copied(value: Any) -> Any:
    """A nested state with every tensor cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value

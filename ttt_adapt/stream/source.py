"""SourceWeights: one copy of the weights as they were before adaptation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ttt_adapt.errors import StateError


class Derived(Protocol):
    """Weights of a model that follow from the tensors that a stream changes, such as low-rank factors."""

    def derive(self) -> None:
        """Write them anew, from the present values of these tensors."""
        ...

    def restore(self) -> None:
        """Write their source values, bit for bit."""
        ...

    def originals(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """`tensors` with the source values in the place of such weights."""
        ...

    def release(self) -> None:
        """Let go of the model."""
        ...


class SourceWeights:
    """A copy of live tensors that never shares memory with them.

    Args:
        live: name -> the tensors that change. `restore` and `pull` write into these very tensors.
        whole: names of the tensors that are restored completely or not at all: a partial pull leaves them alone.
        derived: weights of the model that follow from the live tensors.
    """

    def __init__(self, live: Mapping[str, Tensor], whole: Collection[str] = (), derived: Derived | None = None) -> None:
        self._derived = derived
        self._live = list(live.values())  # not detached: a detached alias misses `model.to(...)`
        self._copies = [tensor.detach().clone() for tensor in self._live]
        pulled = [name not in whole and tensor.is_floating_point() for name, tensor in live.items()]
        self._pulled = [tensor for tensor, chosen in zip(self._live, pulled, strict=True) if chosen]
        self._targets = [tensor for tensor, chosen in zip(self._copies, pulled, strict=True) if chosen]
        self._released = False

    def check(self) -> None:
        """Refuse to go on after `release`.

        Raises:
            StateError: the adapter was detached.
        """
        if self._released:
            raise StateError("the adapter of this video is detached and its model is free: make a new StreamAdapter")

    def release(self) -> None:
        """Let go of the live tensors and free the copies: the model is free."""
        self._released = True
        self._live, self._copies, self._pulled, self._targets = [], [], [], []
        if self._derived is not None:
            self._derived.release()
            self._derived = None

    def originals(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """`tensors` with the copies in the place of those that are live; errors as in `check`."""
        self.check()
        copies = {id(live): copy for live, copy in zip(self._live, self._copies, strict=True)}
        found = {name: copies.get(id(tensor), tensor) for name, tensor in tensors.items()}
        return found if self._derived is None else self._derived.originals(found)

    @property
    def values(self) -> Sequence[Tensor]:
        """The copies, in the order of the live tensors; errors as in `check`."""
        self.check()
        return self._copies

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back into the live tensors, bit for bit; errors as in `check`."""
        self.check()
        if self._live:
            torch._foreach_copy_(self._live, self._copies)
        if self._derived is not None:
            self._derived.restore()

    def derive(self) -> None:
        """Make the weights that follow from the live tensors, after somebody wrote these."""
        if self._derived is not None:
            self._derived.derive()

    @torch.no_grad()
    def pull(self, fraction: float) -> None:
        """Move the live tensors `fraction` of the way back to the copies; 1 restores them exactly."""
        if fraction == 1.0:
            self.restore()
        elif fraction > 0.0 and self._pulled:
            torch._foreach_lerp_(self._pulled, self._targets, fraction)
            self.derive()

    @torch.no_grad()
    def distance(self) -> Tensor:
        """The norm of the difference of live tensors and copies, over that of the copies; without those of `whole`."""
        if not self._pulled:
            return torch.zeros(())
        pairs = list(zip(self._pulled, self._targets, strict=True))
        found = [[torch.dist(live, copy), torch.linalg.vector_norm(copy)] for live, copy in pairs]
        norms = torch.stack([torch.stack(pair).to(found[0][0].device, torch.float32) for pair in found]).norm(dim=0)
        return norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)


def copied(value: Any) -> Any:
    """A nested state with every tensor cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value

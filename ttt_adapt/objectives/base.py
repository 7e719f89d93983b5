"""The protocol that every label-free objective follows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Objective(Protocol):
    """Anything with trainable parameters and a label-free loss on frames; `MAEBranch` is one.

    The members below are all that `StreamAdapter` uses, with those of `StatefulObjective` where an objective has them.
    """

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        ...

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss, with graph, of images [B, 3, H, W] as the model takes them."""
        ...

    def encoder_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name -> parameter inside the user's model that the loss adapts."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the objective's own, outside the user's model."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the objective's own modules to training or evaluation mode."""
        ...

    def detach(self) -> None:
        """Let go of the model; may be called twice."""
        ...


@runtime_checkable
class StatefulObjective(Protocol):
    """What an `Objective` has beside its members if it remembers more of the stream than weights."""

    def memory(self) -> Mapping[str, Tensor]:
        """Name -> tensor that changes with the stream: saved with it, and as it was again after a reset or detach."""
        ...

    def after_step(self) -> None:
        """Called after every gradient step, without gradients."""
        ...


@runtime_checkable
class SplitLoss(Protocol):
    """An objective whose random draws can be made apart from its loss: `loss(x) == loss_of(x, draw(x))`."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """All that is random about the loss of `images`, [B, ...]."""
        ...

    def loss_of(self, images: Tensor, drawn: Tensor) -> Tensor:
        """The loss with these draws; nothing else is random, and no value on the device decides what is computed."""
        ...

    def weight(self, images: Tensor, drawn: Tensor) -> Tensor:
        """A scalar, what the loss divides by: that of a batch is the mean of its parts', weighted by this."""
        ...

    def settings(self) -> Hashable:
        """What the loss depends on beside images, draws and weights."""
        ...

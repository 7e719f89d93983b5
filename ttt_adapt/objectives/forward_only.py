"""The objective of a stream without a gradient: nothing is trained, and a frame is only predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import StateError


class ForwardOnly:
    """Stands in for an objective where a stream has none: `StreamAdapter(model, calibration=...)`.

    Args:
        model: the user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._model

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Refuse.

        Raises:
            StateError: always.
        """
        raise StateError("this stream has no objective and takes no gradient step: attach an MAEBranch to adapt by one")

    def encoder_parameters(self) -> Mapping[str, nn.Parameter]:
        """Nothing is trained."""
        return {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing is trained."""
        return iter(())

    def train(self, mode: bool = True) -> Any:
        """Do nothing."""
        return self

    def detach(self) -> None:
        """Do nothing: nothing was added to the model."""

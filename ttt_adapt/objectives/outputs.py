"""What objectives on a model's own predictions share: no parameters beside the model's, and class scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ttt_adapt.errors import ConfigError


class OutputObjective:
    """An objective on what the model predicts; all that it trains lies in the model.

    Args:
        model: the user's model.
        parameters: name -> what is trained.
        logits: the model's output -> class scores [B, C, ...]; the output itself by default.

    Raises:
        ConfigError: no parameters.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], logits: Callable[[Any], Tensor] | None = None
    ) -> None:
        if not parameters:
            raise ConfigError(f"{type(model).__name__} has no parameters that {type(self).__name__} could adapt")
        self._model, self._parameters, self._logits = model, dict(parameters), logits

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._model

    def encoder_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name in the model -> parameter that is trained."""
        return self._parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: all that is trained lies in the model."""
        return iter(())

    def train(self, mode: bool = True) -> Any:
        """Nothing to set."""
        return self

    def detach(self) -> None:
        """Nothing to let go of."""

    def scores(self, output: Any) -> Tensor:
        """The model's output as class scores [B, C, ...].

        Raises:
            ConfigError: the output is no tensor of class scores, and `logits` does not make it one.
        """
        found = output if self._logits is None else self._logits(output)
        if not isinstance(found, Tensor) or found.ndim < 2 or found.shape[1] < 2:
            got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{type(self).__name__} needs class scores [B, C, ...] and got {got}: pass logits=, which makes them "
                "of the model's output"
            )
        return found

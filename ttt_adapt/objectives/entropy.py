"""Tent: train scale and shift of the normalisation layers so that the entropy of the predictions falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.norms import batch_statistics, is_norm, norm_layers
from ttt_adapt.objectives.base import OutputObjective


class Entropy(OutputObjective):
    """Tent (Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021).

    The loss is the mean entropy of the predicted distributions, equation (1) of that paper. It trains the scale and
    shift of every normalisation layer. In the loss, BatchNorm uses the statistics of the batch. Tent also predicts with
    the statistics of the current frame: `StreamConfig(norm_stats="batch")` does that.

    Args:
        model: a model that predicts classes.
        logits: makes class scores [B, C, ...] of the model's output; by default the output is taken as it is.

    Raises:
        ConfigError: the model has no normalisation layer with scale and shift.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor] | None = None) -> None:
        affine = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
        if not affine:
            raise ConfigError(
                f"{type(model).__name__} has no normalisation layer with scale and shift: Tent has nothing to adapt"
            )
        super().__init__(model, {name: p for name, p in model.named_parameters() if id(p) in affine}, logits)

    def loss(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Entropy of the softmax, averaged over images [B, 3, H, W] and pixels, a scalar. Nothing in it is random."""
        with batch_statistics(norm_layers(self.model)):
            scores = self.scores(self.model(images))  # [B, C, ...]
        return -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()

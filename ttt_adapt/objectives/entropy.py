"""Tent: minimise the entropy of the predictions by the affine parameters of the normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ttt_adapt.errors import ConfigError
from ttt_adapt.model.norms import batch_statistics, norm_layers
from ttt_adapt.objectives.base import OutputObjective


class Entropy(OutputObjective):
    """Tent (Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021).

    Scale and shift of every normalisation layer are trained on the mean entropy of the predicted distributions,
    equation (1) of that paper; where the model has BatchNorm, the loss is taken with the statistics of its own batch.
    To predict with those of the current frame, as Tent does, use `StreamConfig(norm_stats="batch")`.

    Args:
        model: a model that predicts classes.
        logits: the model's output -> class scores [B, C, ...]; the output itself by default.

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
        """Mean over images and pixels of the entropy of the softmax; images [B, 3, H, W]; nothing is random."""
        with batch_statistics(norm_layers(self.model)):
            scores = self.scores(self.model(images))
        return -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises: BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm and layers made of them."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, kinds) or "RMSNorm" in type(module).__name__ or "RmsNorm" in type(module).__name__

"""The mask channel of a first layer that is no convolution over the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.model.features import MapSpec


class MapMaskChannel(nn.Module):
    """What is added to the map that a first layer returns, to tell it which pixels are hidden.

    Each cell of the map gets a linear function of the mask in its s x s pixels; `model.stem.hidden_on_map` adds it. As
    in `MaskChannel`, 1 = hidden, and the weights start at zero.

    Args:
        spec: the map, with C channels at stride s.
    """

    def __init__(self, spec: MapSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(spec.channels, 1, spec.stride, spec.stride))
        self.stride = spec.stride

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, h * s, w * s], 1 = hidden -> [B, C, h, w]."""
        return F.conv2d(hidden, self.weight, None, self.stride)

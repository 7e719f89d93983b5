"""The mask channel: how a model for 3-channel images is told which pixels are hidden."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskChannel(nn.Module):
    """A fourth input channel for the model's first convolution, as a convolution of its own.

    A convolution over 4 channels is one over 3 channels plus one over the fourth. The model keeps the first;
    this module is the second, and `model.hooks.hidden_channel` adds the two. Its input is 1 = hidden and its weights
    start at zero, so that the model's output does not change before training, nor where nothing is hidden.

    Args:
        stem: the model's first convolution.
    """

    def __init__(self, stem: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(stem.out_channels, 1, *stem.kernel_size))
        self.stride, self.dilation, self.padding = stem.stride, stem.dilation, stem.padding
        self.same = type(stem).__name__ == "Conv2dSame"  # timm's layer that pads as TensorFlow does

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, H, W], 1 = hidden -> [B, C, h, w], the shape of the stem's output."""
        if self.same:
            hidden = self._pad_same(hidden)
        return F.conv2d(hidden, self.weight, None, self.stride, self.padding, self.dilation)

    def _pad_same(self, hidden: Tensor) -> Tensor:
        """Pad as TensorFlow's "SAME": the output has ceil(size / stride) cells, the odd pixel at the end."""
        pads: list[int] = []
        for axis in (1, 0):  # F.pad wants the last axis first
            size, stride, kernel = hidden.shape[-2 + axis], self.stride[axis], self.weight.shape[-2 + axis]
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * self.dilation[axis] + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(hidden, pads)

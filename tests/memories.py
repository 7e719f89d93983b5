"""Layers that keep something of the frames that they saw, and a model around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Observer(nn.Module):
    """Remembers the range of what it sees, in place and in evaluation mode too, as observers of quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(float("inf")))
        self.register_buffer("highest", torch.tensor([]))

    def forward(self, x: Tensor) -> Tensor:
        self.lowest.copy_(torch.minimum(self.lowest, x.detach().min()))
        self.highest.resize_(x.shape[1]).copy_(x.detach().amax((0, 2, 3)))
        return x


class RunningScale(nn.Module):
    """Divides by a running deviation that a backward pass needs and that every pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.lerp_(x.detach().std()[None], 0.1)
        return x * self.scale


class Recurrent(nn.Module):
    """Mixes the features of the pass before into its own, from a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        mixed = x if self.before is None else 0.5 * x + 0.5 * self.before
        self.before = mixed.detach()
        return mixed


class Memory:
    """What a layer keeps outside of its own attributes."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, []


class Counting(nn.Module):
    """Counts its passes, in a buffer, an attribute, a list, and an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.calls, self.means, self.memory = 0, [], Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.calls += 1
        self.memory.calls += 1
        self.means.append(x.detach().mean())
        self.memory.seen.append(x.shape)
        return x * (1 + 0.01 * self.passes)


def model(layer: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), layer, nn.Conv2d(8, 8, 3, 2, 1))
    return nn.Sequential(encoder, nn.Conv2d(8, 5, 1)).eval()

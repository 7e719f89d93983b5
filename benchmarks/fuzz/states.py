"""Damaged states of streams: they are refused by an error of the library, or taken whole, and then steps are made."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.mutations import damaged
from ttt_adapt import MAEBranch, Normalize, StreamAdapter, StreamConfig
from ttt_adapt.errors import TTTAdaptError
from ttt_adapt.objectives import PseudoLabel

SIZE = (32, 48)


def tiny(seed: int = 0) -> nn.Module:
    """A small convolutional model with BatchNorm: an encoder "0", a head behind it."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(encoder, nn.Conv2d(8, 4, 1)).eval()


class Recurrent(nn.Module):
    """Keeps the features of the frame before, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None
        self.count, self.seen = 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else 0.5 * x + 0.5 * self.before
        self.before, self.count, self.seen = x.detach(), self.count + 1, [*self.seen[-3:], self.count]
        return x


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer that a user may bring."""
    return torch.optim.SGD(groups, momentum=0.9)


def adapters() -> list[StreamAdapter]:
    """Streams with all parts that a state may have."""
    normalize, few = Normalize((0.5,) * 3, (0.5,) * 3), {"window": 3, "batch_size": 2, "lr": 1e-3}
    models = [tiny() for _ in range(5)]
    models[4].insert(1, Recurrent())
    branches = [MAEBranch.attach(model, "0") for model in models[:3]]
    return [
        StreamAdapter(models[0], branches[0], config=StreamConfig(**few), preprocess=normalize),
        StreamAdapter(models[1], branches[1], config=StreamConfig(**{**few, "window": "auto"}, norm_stats="ema")),
        StreamAdapter(models[2], branches[2], config=StreamConfig(**few, gate="surprise"), optimizer=sgd),
        StreamAdapter(models[3], PseudoLabel(models[3], average=0.9), config=StreamConfig(**few)),
        StreamAdapter(models[4], MAEBranch.attach(models[4], "0"), config=StreamConfig(**few)),
    ]


def frame(adapter: StreamAdapter, dice: random.Random) -> Tensor:
    """A frame as this stream takes it."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    if adapter.state_dict()["setting"]["preprocess"] == "Normalize":
        return torch.randint(256, (*SIZE, 3), generator=generator, dtype=torch.uint8)
    return torch.randn(3, *SIZE, generator=generator)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states hold the same numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b.to(a.dtype))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


_HOW = ("fused", "foreach")
"""Settings of an optimizer that say how a step runs, not what it does."""


def taken_whole(state: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a stream's state is what it was given; its optimizer may add flags that an earlier one lacks."""
    own, theirs = state["optimizer"]["state"], given["optimizer"]["state"]
    pairs = zip(own["param_groups"], theirs["param_groups"], strict=True)
    settings = all(same(mine[key], value) for mine, other in pairs for key, value in other.items() if key not in _HOW)
    parts = [name for name in ("weights", "window", "random", "gate", "progress") if state[name] is not None]
    parts += ["auto"] if state["auto"] is not None else []
    parts += ["passes"] if "passes" in given else []
    return settings and same(own["state"], theirs["state"]) and all(same(state[n], given[n]) for n in parts)


class States:
    """Damages states and loads them."""

    def __init__(self) -> None:
        dice = random.Random(0)
        self.streams = adapters()
        for stream in self.streams:
            for _ in range(4):
                stream.step(frame(stream, dice))
        self.good = [stream.state_dict() for stream in self.streams]

    def trial(self, dice: random.Random) -> str:
        """One damaged state: "refused" or "taken".

        Raises:
            AssertionError: the state was taken in part, or its refusal changed something.
        """
        index = dice.randrange(len(self.streams))
        stream, good = self.streams[index], self.good[index]
        bad = damaged(good, dice)
        try:
            stream.load_state_dict(bad)
        except TTTAdaptError:
            assert same(stream.state_dict(), good), "the refusal changed something"
            return "refused"
        assert taken_whole(stream.state_dict(), bad), "it was taken in part"
        try:
            for _ in range(2):
                stream.step(frame(stream, dice))
        except TTTAdaptError:
            return "taken, then a step was refused"
        finally:
            stream.load_state_dict(good)
        return "taken"

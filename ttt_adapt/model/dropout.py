"""Dropout and stochastic depth in the gradient step: find these layers, and let them drop as a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_PATHS = ("DropPath", "StochasticDepth")
"""Endings of the names of stochastic depth: in timm, OpenMMLab and Hugging Face, and in torchvision."""


def drop_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that drop activations (`nn.Dropout` and its relatives) or whole paths (stochastic depth) in training.

    Not among them are layers that drop tokens (timm's PatchDropout), and dropout that a module calls as a function:
    that one follows the training flag of the module.
    """
    return [m for m in model.modules() if isinstance(m, _DropoutNd) or type(m).__name__.endswith(_PATHS)]


@contextmanager
def dropping(layers: Sequence[nn.Module], seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block, these layers drop, and `seed` decides what.

    The layers draw from PyTorch's global random source. Its state is restored after the block.

    Args:
        layers: layers in evaluation mode, from `drop_layers`.
        seed: of the random source, in [0, 2**64).
        device: where the layers run.
    """
    if not layers:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

"""Dropout and stochastic depth in the gradient step: which layers they are, and what they draw from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def drop_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that drop activations or whole paths while training: `nn.Dropout` and its kin, and stochastic depth.

    timm, OpenMMLab and Hugging Face call the latter DropPath, with or without a prefix, torchvision StochasticDepth.
    Layers that drop tokens (timm's PatchDropout) are none of them, and neither is dropout inside of a function, which
    looks at the flag of the module that calls it.
    """
    return [m for m in model.modules() if isinstance(m, _DropoutNd) or type(m).__name__.endswith(_PATHS)]


_PATHS = ("DropPath", "StochasticDepth")


@contextmanager
def dropping(layers: Sequence[nn.Module], seed: int, device: torch.device) -> Iterator[None]:
    """Have these layers drop inside the block, as `seed` decides.

    They draw from PyTorch's global random source, which afterwards is as it was before.
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

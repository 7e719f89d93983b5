"""Where a model's first layer is told which pixels are hidden, if this layer is no plain convolution over the images.

Space-to-depth before the first convolution, a linear layer over patches, or a cosine transform: whatever comes first,
the output of the first layer is a map over the image, and the mask channel is added there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_adapt.errors import FeatureMapError
from ttt_adapt.model.features import MapSpec, from_map, tensors, to_maps
from ttt_adapt.model.grid import find_maps
from ttt_adapt.model.hooks import hooks, run_encoder
from ttt_adapt.model.probe import other_sizes
from ttt_adapt.model.threads import in_this_thread

FIRST_LAYERS = 4
"""How many of the layers that run first may be the stem."""


def find_stem(model: nn.Module, encoder: nn.Module, images: Tensor) -> tuple[str, nn.Module, MapSpec] | None:
    """Path, module and output map of the first layer with weights that returns a map over the image; None without one.

    Args:
        model: the user's model.
        encoder: the module where the encoder ends.
        images: random images [1, C, H, W] that the model takes.
    """
    layers = [
        m for m in model.modules() if not list(m.children()) and any(p.ndim > 1 for p in m.parameters(recurse=False))
    ]
    names, called = {m: name for name, m in model.named_modules()}, list[nn.Module]()
    with torch.no_grad():
        with hooks(m.register_forward_pre_hook(in_this_thread(lambda m, _args: called.append(m))) for m in layers):
            run_encoder(model, encoder, images)
        for layer in list(dict.fromkeys(called))[:FIRST_LAYERS]:
            if (spec := _map_of(model, layer, images)) is not None:
                return names[layer], layer, spec
    return None


def _map_of(model: nn.Module, layer: nn.Module, images: Tensor) -> MapSpec | None:
    """The map that a layer returns; None where it returns none, or one that does not depend on the images."""

    def run(x: Tensor) -> Any:
        return run_encoder(model, layer, x)

    plain, other = (next(tensors(run(x)), None) for x in (images, -images))
    if plain is None or other is None or plain.shape != other.shape or torch.equal(plain, other):
        return None
    try:
        return find_maps(run, images, other_sizes((images.shape[-2], images.shape[-1])))[0]
    except FeatureMapError:
        return None


@contextmanager
def hidden_on_map(stem: nn.Module, spec: MapSpec, conv: Callable[[Tensor], Tensor], hidden: Tensor) -> Iterator[None]:
    """Inside the block, add `conv(hidden)` to the map that the model's first layer returns.

    Where nothing is hidden, nothing is added.

    Args:
        stem: the layer.
        spec: the map in its output.
        conv: the mask channel's convolution, [B, 1, h * s, w * s] -> [B, C, h, w], for the stride s of `spec`.
        hidden: [B, 1, H, W], 1 where a pixel is hidden.
    """
    size = (hidden.shape[-2], hidden.shape[-1])

    def add(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        h, w = to_maps(output, [spec], size)[0].shape[-2:]
        bottom, right = h * spec.stride - size[0], w * spec.stride - size[1]
        return output + from_map(conv(F.pad(hidden, (0, right, 0, bottom))), spec, output)

    with hooks([stem.register_forward_hook(in_this_thread(add))]):
        yield
